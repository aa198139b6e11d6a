"""The command line through `cli.main`: good runs to the last pixel; bad input in one line, nothing left behind."""

import functools
import io
import subprocess
import sys

import numpy as np
import pytest
import toy
from PIL import Image

from refine_jax import cli, focus
from refine_jax.errors import RefineError
from refine_jax.images import read_picture

WIDTH, HEIGHT = 72, 56


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    toy.write_model(folder)
    return folder


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder beside one of inputs."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    picture().save(inputs / "photo.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[20:30, 24:40] = 255
    Image.fromarray(mask).save(inputs / "mask.png")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def run(*words: str) -> int:
    """The exit code, also where argparse leaves by itself (--help)."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as leaving:
        return leaving.code


# ------------------------------------------------------------------------------------------------------------ good runs


def alpha_of(boxes) -> np.ndarray:
    """The largest blending weight of the regions, from the geometry's own functions. `[H, W] float32`."""
    weights = []
    for x1, y1, x2, y2 in boxes:
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[y1:y2, x1:x2] = 255
        crop = focus.focus_box(np.array([x1, y1, x2, y2]), WIDTH, HEIGHT, margin=20.0)
        weights.append(np.asarray(focus.feather(mask, crop)))
    return np.max(weights, axis=0)


@pytest.mark.parametrize("mode,quiet", [("RGBA", False), ("L", True), ("RGB", True)])
def test_modes_regions_and_compare(folder, model, capsys, mode, quiet):
    source = folder.parent / "in" / "source.png"
    picture(mode).save(source)
    if quiet:
        boxes, words = [(24, 20, 40, 30)], ["--mask", "../in/mask.png", "--reference", "../in/photo.png", "--quiet"]
        words += ["--steps", "1"]
    else:
        boxes = [(10, 12, 26, 22), (40, 30, 60, 44)]
        words = [word for box in boxes for word in ("--box", ",".join(map(str, box)))] + ["--steps", "2"]
    words += ["--true-cfg", "1", "--compare", "both.png"]
    assert run("refine", "--image", source, "--prompt", "Refine the text 'A'", "--model", model, *words) == 0
    out, err = capsys.readouterr()
    steps = words[words.index("--steps") + 1]
    assert out == f"wrote refined.png (72x56; steps {steps}, true CFG 1)\nwrote both.png (before, after)\n"
    assert not err if quiet else "2/2" in err and "denoising" in err
    assert sorted(p.name for p in folder.iterdir()) == ["both.png", "refined.png"]
    with Image.open("refined.png") as result, Image.open(source) as before:
        assert result.mode == before.mode == mode and result.size == (WIDTH, HEIGHT)
        after, before = np.asarray(result), np.asarray(before)
    background = alpha_of(boxes) == 0
    assert 0.2 < background.mean() < 0.95
    np.testing.assert_array_equal(after[background], before[background])
    if mode == "RGBA":
        np.testing.assert_array_equal(after[..., 3], before[..., 3])
    assert (after != before).any(axis=-1 if after.ndim == 3 else ()).sum() > 100
    with Image.open("both.png") as both:
        assert both.width > WIDTH


UNUSUAL = {
    "16 bits": ("I;16", "png"),
    "palette": ("P", "png"),
    "CMYK": ("CMYK", "tiff"),
    "JPEG": ("RGB", "jpg"),
    "WebP": ("RGB", "webp"),
    "turned": ("RGB", "png"),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_pictures(folder, model, case):
    """What is not refined is the upright 8-bit sRGB picture; a 16-bit mask of another size counts from 1 on."""
    mode, suffix = UNUSUAL[case]
    inputs, name = folder.parent / "in", f"unusual.{suffix}"
    made, extra = picture("L" if mode == "I;16" else "RGB"), {}
    if mode == "I;16":
        made = Image.fromarray(np.asarray(made).astype(np.uint16) * 257)
    elif mode != "RGB":
        made = made.convert(mode)
    if case == "turned":
        extra["exif"] = Image.Exif()
        extra["exif"][0x0112] = 6
        made = made.transpose(Image.Transpose.ROTATE_90)
    made.save(inputs / name, **extra)
    label = np.zeros((HEIGHT * 2, WIDTH * 2), np.uint16)
    label[40:60, 48:80] = 1
    Image.fromarray(label).save(inputs / "label.png")
    words = ["--mask", inputs / "label.png", *PROMPT, "--model", model, "--steps", "1", "--true-cfg", "1", "--quiet"]
    assert run("refine", "--image", inputs / name, *words) == 0
    before = read_picture(inputs / name)
    with Image.open("refined.png") as result:
        assert result.size == before.size == (WIDTH, HEIGHT)
        assert result.mode == ("L" if mode == "I;16" else "RGB")
        after = np.asarray(result.convert("RGB"))
    background = alpha_of([(24, 20, 40, 30)]) == 0
    np.testing.assert_array_equal(after[background], before.rgb[background])
    assert (after != before.rgb).any(axis=-1).sum() > 100


def test_the_seed_decides(folder, model):
    inputs = folder.parent / "in"
    command = [
        "refine",
        "--image",
        inputs / "photo.png",
        "--mask",
        inputs / "mask.png",
        "--prompt",
        "Refine",
        "--quiet",
    ]
    command += ["--model", model, "--steps", "1", "--true-cfg", "1", "--reference", inputs / "photo.png"]
    for name, seed in (("a.png", 0), ("b.png", 0), ("c.webp", 1)):
        assert run(*command, "--seed", seed, "--output", name) == 0
    a, b, c = (np.asarray(Image.open(name)) for name in ("a.png", "b.png", "c.webp"))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


# ------------------------------------------------------------------------------------------------------------ bad input

IMAGE, MASK, PROMPT = ["--image", "../in/photo.png"], ["--mask", "../in/mask.png"], ["--prompt", "Refine the text 'A'"]
ALL = [*IMAGE, *MASK, *PROMPT]

BAD = {
    "no command": ([], ("COMMAND",)),
    "unknown command": (["polish"], ("polish",)),
    "unknown option": (["refine", *ALL, "--strength", "2"], ("--strength",)),
    "stray word": (["refine", *ALL, "extra.png"], ("extra.png",)),
    "config of refine": (["refine", *ALL, "--config.steps=3"], ("--config.steps=3",)),
    "abbreviated": (["refine", *ALL, "--comp", "x.png"], ("--comp",)),
    "mask and box": (["refine", *ALL, "--box", "1,2,3,4"], ("--box", "--mask")),
    "no prompt": (["refine", *IMAGE, *MASK], ("--prompt missing",)),
    "no region": (["refine", *IMAGE, *PROMPT], ("--mask or --box missing",)),
    "no image": (["refine", *MASK, *PROMPT], ("--image missing",)),
    "no steps": (["refine", *ALL, "--steps", "0"], ("--steps", "'0'", "at least 1")),
    "steps in words": (["refine", *ALL, "--steps", "many"], ("--steps", "'many'")),
    "too many steps": (["refine", *ALL, "--steps", "100000"], ("steps 100000",)),
    "box of three": (["refine", *IMAGE, *PROMPT, "--box", "1,2,3"], ("--box", "'1,2,3'", "x1,y1,x2,y2")),
    "box in words": (["refine", *IMAGE, *PROMPT, "--box", "a,b,c,d"], ("--box", "'a,b,c,d'")),
    "box outside": (["refine", *IMAGE, *PROMPT, "--box", "0,0,73,20"], ("box", "0,0,73,20", "72x56")),
    "box negative": (["refine", *IMAGE, *PROMPT, "--box=-1,0,7,20"], ("box", "-1,0,7,20", "outside")),
    "box empty": (["refine", *IMAGE, *PROMPT, "--box", "5,5,5,9"], ("box", "5,5,5,9", "empty")),
    "image missing": (["refine", "--image", "none.png", *MASK, *PROMPT], ("none.png", "no such file")),
    "image a folder": (["refine", "--image", "../in", *MASK, *PROMPT], ("../in", "folder")),
    "image a text": (["refine", "--image", "../in/text.png", *MASK, *PROMPT], ("text.png", "not a picture")),
    "image cut off": (["refine", "--image", "../in/half.png", *MASK, *PROMPT], ("half.png", "truncated")),
    "image a bomb": (["refine", "--image", "../in/bomb.png", *MASK, *PROMPT], ("bomb.png", "scale it down")),
    "mask missing": (["refine", *IMAGE, "--mask", "none.png", *PROMPT], ("mask", "none.png", "no such file")),
    "mask cut off": (["refine", *IMAGE, "--mask", "../in/half.png", *PROMPT], ("mask", "half.png", "truncated")),
    "reference cut off": (["refine", *ALL, "--reference", "../in/half.png"], ("reference", "half.png", "truncated")),
    "reference too long": (["refine", *ALL, "--reference", "../in/long.png"], ("long.png", "16 to 1", "cut out")),
    "mask empty": (["refine", *IMAGE, "--mask", "../in/black.png", *PROMPT], ("black.png", "empty", "white")),
    "reference missing": (["refine", *ALL, "--reference", "none.jpg"], ("reference", "none.jpg")),
    "prompt too long": (["refine", *IMAGE, *MASK, "--prompt", "long " * 2000], ("prompt", "shorten")),
    "unknown model": (["refine", *ALL, "--model", "huge"], ("'huge'", "tiny")),
    "model without manifest": (["refine", *ALL, "--model", "../in"], ("../in", "refine_jax.json")),
    "output suffix": (["refine", *ALL, "--output", "x.txt"], ("--output", "x.txt", "suffix")),
    "output nowhere": (["refine", *ALL, "--output", "no/x.png"], ("--output", "no/x.png", "create it")),
    "output protected": (["refine", *ALL, "--output", "/proc/x.png"], ("--output", "/proc/x.png")),
    "compare nowhere": (["refine", *ALL, "--compare", "no/x.png"], ("--compare", "no/x.png")),
    "compare is output": (["refine", *ALL, "--output", "x.png", "--compare", "./x.png"], ("--compare", "x.png")),
    "alpha to jpeg": (
        ["refine", "--image", "../in/alpha.png", *MASK, *PROMPT, "--output", "x.jpg"],
        ("x.jpg", "alpha"),
    ),
    "margin": (["refine", *ALL, "--margin", "-3"], ("margin", "-3")),
    "cfg": (["refine", *ALL, "--true-cfg", "nan"], ("true_cfg_scale", "nan")),
    "feather": (["refine", *ALL, "--feather", "soft"], ("--feather", "soft")),
    "regenerate without prompt": (["regenerate", *IMAGE], ("--prompt missing",)),
    "regenerate without image": (["regenerate", *PROMPT], ("--image missing",)),
    "regenerate nothing": (["regenerate", "--image", "none.png", *PROMPT], ("none.png", "no such file")),
    "regenerate a text": (["regenerate", "--image", "../in/text.png", *PROMPT], ("text.png", "not a picture")),
    "rounds": (["regenerate", *IMAGE, *PROMPT, "--rounds", "-1"], ("rounds -1",)),
    "image guidance of an MMDiT": (["regenerate", *IMAGE, *PROMPT, "--image-cfg", "2"], ("image_cfg", "leave it out")),
    "bytes for a prompt": (["regenerate", *IMAGE, "--prompt", "caf\udce9"], ("prompt", "UTF-8")),
    "generate without prompt": (["generate"], ("--prompt",)),
    "size in words": (["generate", *PROMPT, "--size", "large"], ("--size", "'large'")),
    "size off the grid": (["generate", *PROMPT, "--size", "50x64"], ("50x64", "multiples of")),
    "generate by a refiner": (["generate", *PROMPT, "--model", "MODEL"], ("regenerating", "refine")),
    "train without workdir": (["train", "--config", "x.py"], ("--workdir",)),
    "train without config": (["train", "--config", "x.py", "--workdir", "run"], ("x.py", "no such file")),
    "override without value": (
        ["train", "--config", toy.CONFIGS / "tiny.py", "--workdir", "run", "--config.steps", "3"],
        ("--config.steps", "=VALUE"),
    ),
    "override of nothing": (
        ["train", "--config", toy.CONFIGS / "tiny.py", "--workdir", "run", "--config.stepz=3"],
        ("stepz", "no such key"),
    ),
    "train without vae": (
        ["train", "--config", toy.CONFIGS / "tiny.py", "--workdir", "run", "--config.vae_from=nowhere"],
        ("nowhere", "no such model"),
    ),
    "evaluate nothing": (["evaluate", "--model", "huge", "--output", "scores"], ("'huge'",)),
}


@functools.cache
def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("case", BAD)
def test_bad_input(folder, model, capfd, case):
    inputs = folder.parent / "in"
    (inputs / "text.png").write_text("no picture")
    (inputs / "half.png").write_bytes((inputs / "photo.png").read_bytes()[:3000])
    Image.new("L", (WIDTH, HEIGHT)).save(inputs / "black.png")
    (inputs / "bomb.png").write_bytes(bomb())
    Image.new("RGB", (90, 3)).save(inputs / "long.png")
    picture("RGBA").save(inputs / "alpha.png")
    words, expected = BAD[case]
    if words[:1] == ["refine"] and "--model" not in words:
        words = [*words, "--model", model, "--quiet"]
    words = [model if word == "MODEL" else word for word in words]
    assert run(*words) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("refine-jax: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and len(err) < 500, err
    for word in expected:
        assert word in err, err
    assert list(folder.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing(folder, model, monkeypatch, capfd):
    """The comparison is made before the result is written."""
    import refine_jax.compare

    def broken(*args):
        raise RefineError("compare: broken")

    monkeypatch.setattr(refine_jax.compare, "before_after", broken)
    words = ["--model", model, "--quiet", "--steps", "1", "--true-cfg", "1", "--reference", "../in/photo.png"]
    assert run("refine", *ALL, *words, "--compare", "c.png") == 2
    assert capfd.readouterr().err == "refine-jax: compare: broken\n" and list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating …")])
def test_too_little_memory_is_said_in_one_line(folder, model, monkeypatch, capfd, error):
    from refine_jax.refine import Refiner

    def grow(*args, **kwargs):
        raise error

    monkeypatch.setattr(Refiner, "refine", grow)
    assert run("refine", *ALL, "--model", model) == 1
    said = capfd.readouterr().err
    assert said.startswith("refine-jax: not enough memory (") and said.count("\n") == 1 and "quantize int8" in said


def test_interruption(folder, model, monkeypatch, capfd):
    from refine_jax.refine import Refiner

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Refiner, "refine", stop)
    assert run("refine", *ALL, "--model", model) == 130
    assert capfd.readouterr().err == "refine-jax: interrupted\n" and list(folder.iterdir()) == []


def test_help_and_version_are_quick_and_name_every_command(capsys):
    assert run("--version") == 0 and "refine-jax" in capsys.readouterr().out
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("refine", "regenerate", "generate", "train", "evaluate"))
    for command, option in (
        ("refine", "--true-cfg"),
        ("regenerate", "--rounds"),
        ("generate", "--size"),
        ("train", "--workdir"),
        ("evaluate", "--count"),
    ):
        assert run(command, "--help") == 0
        assert option in capsys.readouterr().out
    # The help of a command line must not wait for jax.
    code = "import sys, refine_jax.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
