"""The bundled model that regenerates, and its example: what `refine-jax regenerate` does when it is given nothing."""

import json

import numpy as np
import pytest
from PIL import Image

from refine_jax import checkpoint, examples
from refine_jax.cli import main
from refine_jax.data import world
from refine_jax.regenerate import Regenerator

FOLDER = examples.ASSETS.parent / "tiny_rvr"


@pytest.fixture(scope="module")
def regenerator():
    return Regenerator.load()


def test_the_command_makes_the_picture_fit_its_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["regenerate", "--quiet"]) == 0
    before, prompt, spec = examples.misaligned()
    after = np.asarray(Image.open("regenerated.png"))
    assert after.shape == before.shape == (64, 64, 3)
    wrong = [world.check(picture, spec).wrong for picture in (before, after)]
    assert len(wrong[1]) < len(wrong[0])
    said = capsys.readouterr().out
    assert prompt in said and f"before: wrong {', '.join(wrong[0])}" in said
    assert Image.open("regenerated_compare.png").width > 600


def test_the_prompt_decides_what_is_painted(regenerator):
    """Of held-out prompts, their own picture fulfils more than another's."""
    samples = [world.sample(seed=50, index=number, split="eval") for number in range(16)]
    requests = [dict(prompt=s["prompt"], image=s["misaligned_image"], seed=k) for k, s in enumerate(samples)]
    made = [np.asarray(picture) for picture in regenerator.regenerate_batch(requests)]
    score = lambda pictures: np.mean([world.check(p, s["spec"]).score for p, s in zip(pictures, samples)])
    assert score(made) > 0.1 + score(made[1:] + made[:1])


def test_the_model_says_what_it_was_made_from():
    manifest = checkpoint.read_manifest(FOLDER)
    assert "configs/tiny_world_vae.py" in manifest["about"] and (FOLDER / "ATTRIBUTION.md").is_file()
    for stage in ("vae", "world", "see", "rvr"):
        steps = [json.loads(line)["step"] for line in (FOLDER / "training" / f"{stage}_metrics.jsonl").open()]
        config = json.loads((FOLDER / "training" / f"{stage}_config.json").read_text())
        assert steps[-1] == config["steps"] and steps == sorted(steps)
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) < 20e6
