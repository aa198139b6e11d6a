"""The bundled model and its example: what a newcomer's first command does."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from refine_jax import checkpoint, examples
from refine_jax.cli import main
from refine_jax.data import synth
from refine_jax.refine import Refiner

SCENE = dict(seed=77, index=29, split="eval", size=(288, 384), regions=(1, 1))  # assets/example/ATTRIBUTION.md


@pytest.fixture(scope="module")
def first_command(tmp_path_factory):
    """The pictures that `refine-jax refine` writes."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["refine", "--quiet"]) == 0
    return folder


def test_the_first_command_repairs_the_word_and_nothing_else(first_command):
    example, scene = examples.sign(), synth.scene(**SCENE)
    before, mask = (np.asarray(Image.open(path)) for path in (example.image, example.region))
    np.testing.assert_array_equal(before, scene["image"])
    np.testing.assert_array_equal(mask, scene["masks"][0])
    after = np.asarray(Image.open(first_command / "refined.png"))
    error = lambda picture: np.mean((picture[mask > 0].astype(float) - scene["target"][mask > 0]) ** 2)
    assert error(after) <= 0.5 * error(before), "the word was FIZY and becomes FORT"

    # The released feathering: MaxFilter(7), then a blur that reaches some 13 pixels.
    near = np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.MaxFilter(35)))
    assert 0.8 < (near == 0).mean()
    np.testing.assert_array_equal(after[near == 0], before[near == 0])
    assert Image.open(first_command / "refined_compare.png").width > 600


def test_the_reference_is_looked_at():
    example = examples.sign()
    refiner = Refiner.load()
    ask = dict(image=example.image, mask_or_box=example.region, prompt=example.prompt)
    with_it, without = (np.asarray(refiner.refine(**ask, reference=r), int) for r in (example.reference, None))
    target = synth.scene(**SCENE)["target"].astype(int)
    mask = np.asarray(Image.open(example.region)) > 0
    error = lambda picture: np.mean((picture[mask] - target[mask]) ** 2)
    assert error(with_it) < 0.8 * error(without)


def test_the_model_says_what_it_was_made_from():
    folder = examples.ASSETS.parent / "tiny"
    manifest = checkpoint.read_manifest(folder)
    assert (folder / "ATTRIBUTION.md").is_file()
    for stage, made_by in (("vae", "tiny_vae"), ("flow", "tiny"), ("letters", "tiny_letters")):
        assert f"configs/{made_by}.py" in manifest["about"]
        steps = [json.loads(line)["step"] for line in (folder / "training" / f"{stage}_metrics.jsonl").open()]
        config = json.loads((folder / "training" / f"{stage}_config.json").read_text())
        assert steps[-1] == config["steps"] and steps == sorted(steps)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 20e6
