"""tools/benchmark.py does what its figures are read from: both programs on the same work, to the same picture."""

import importlib.util
import sys
from pathlib import Path


def test_both_sides_do_the_same_work(monkeypatch, capsys):
    path = Path(__file__).parents[1] / "tools" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sizes = dict(area=64, condition=56, blocks=1, heads=1, vae_base=8, vl_hidden=64, vl_layers=1, picture=150)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (sizes | dict(steps=1, repeats=1)).items()]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words, "--reference", "--true-cfg=2"])
    result = benchmark.measure(benchmark.arguments())
    assert result["largest_difference"] <= 1 and result["pixels_changed"] > 0.05
    assert result["ratio"].keys() == {"whole", "vae", "mmdit", "vl"}
    assert all(seconds > 0 for side in result["seconds"].values() for seconds in side.values())
    assert "| MMDiT: one step |" in benchmark.table(result)
