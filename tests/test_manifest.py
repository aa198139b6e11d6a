"""The manifest of `refine-jax batch`: what a line may say, what is said of the others, and what never gets through."""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from refine_jax import images, manifest
from refine_jax.errors import RefineError
from refine_jax.manifest import Manifest, Refused, Request, check, region_count

BOX = {"image": "a.png", "box": [1, 2, 30, 40], "prompt": "Refine the text 'OPEN'"}
PAINT = {"image": "a.png", "prompt": "two red cups"}


def picture(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 100, 50)).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures a.png, b.png, m.png and sub/c.png to name in manifests; outside.png beside the folder."""
    folder = tmp_path_factory.mktemp("outer") / "inner"
    for name in ("a.png", "b.png", "m.png", "sub/c.png", "../outside.png"):
        picture(folder / name)
    return folder


def written(folder: Path, *lines: dict | str | bytes, name: str = "m.jsonl", end: bytes = b"\n") -> Path:
    """A manifest of lines: objects as JSON, texts and bytes as they are."""
    raw = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
           for line in lines]  # fmt: skip
    path = folder / name
    path.write_bytes(b"".join(line + end for line in raw))
    return path


def read(folder: Path, *lines: dict | str | bytes, **options) -> list[Request | Refused]:
    with Manifest(written(folder, *lines), **options) as found:
        return list(found)


def one(folder: Path, line: dict | str | bytes, **options) -> Request | Refused:
    [found] = read(folder, line, **options)
    return found


def refused(found: Request | Refused, *words: str) -> Refused:
    """A refusal of one line that names the line, and the words."""
    assert isinstance(found, Refused), found
    assert found.reason.startswith(f"line {found.line}: ") and found.reason.isprintable() and len(found.reason) < 700
    assert ";" in found.reason or "give" in found.reason  # the remedy
    for word in words:
        assert word in found.reason, found.reason
    return found


# -------------------------------------------------------------------------------------------------------- what it reads


def test_three_tasks(folder):
    lines = [
        {**BOX, "id": "sign", "reference": "b.png", "seed": 3, "steps": 8, "margin": 4, "true_cfg_scale": 1.5,
         "focus": False, "feather": "paper", "negative_prompt": "blur"},
        {"image": "a.png", "mask": "m.png", "prompt": "x"},
        {**PAINT, "rounds": 2, "text_cfg": 4, "image_cfg": 2, "renorm": "global", "renorm_min": 0, "interval": [0, 1],
         "shift": 3},
        {"prompt": "two red cups", "size": [64, 32], "interval": [0.4, 1]},
        {"prompt": "a\nb\té 漢 \U0001f600"},
    ]  # fmt: skip
    found = read(folder, *lines)
    inner = folder.resolve()
    assert [(r.index, r.line, r.id, r.task) for r in found] == [
        (0, 1, "sign", "refine"),
        (1, 2, "2", "refine"),
        (2, 3, "3", "regenerate"),
        (3, 4, "4", "generate"),
        (4, 5, "5", "generate"),
    ]
    assert found[0].arguments == {
        "image": inner / "a.png",
        "mask_or_box": (1, 2, 30, 40),
        "prompt": "Refine the text 'OPEN'",
        "reference": inner / "b.png",
        "negative_prompt": "blur",
        "seed": 3,
        "steps": 8,
        "margin": 4.0,
        "true_cfg_scale": 1.5,
        "focus": False,
        "feather": "paper",
    }
    assert found[1].arguments == {"image": inner / "a.png", "mask_or_box": inner / "m.png", "prompt": "x"}
    assert found[2].arguments == {
        "image": inner / "a.png",
        "prompt": "two red cups",
        "rounds": 2,
        "text_cfg": 4.0,
        "image_cfg": 2.0,
        "renorm": "global",
        "renorm_min": 0.0,
        "interval": (0.0, 1.0),
        "shift": 3.0,
    }
    assert found[3].arguments == {"prompt": "two red cups", "size": (64, 32), "interval": (0.4, 1.0)}
    assert found[4].arguments == {"prompt": "a\nb\té 漢 \U0001f600"}
    assert all(region_count(r) == 1 for r in found)
    assert len({r.digest for r in found}) == 5 and all(re.fullmatch("[0-9a-f]{64}", r.digest) for r in found)


def test_regions_fall_back_to_the_line(folder):
    line = {
        "image": "a.png",
        "prompt": "all",
        "reference": "b.png",
        "regions": [
            {"mask": "m.png"},
            {"box": [0, 0, 4, 4], "prompt": "one"},
            {"box": [4, 4, 8, 8], "reference": "a.png"},
        ],
    }
    found = one(folder, line)
    inner = folder.resolve()
    assert found.arguments == {
        "image": inner / "a.png",
        "mask_or_box": [inner / "m.png", (0, 0, 4, 4), (4, 4, 8, 8)],
        "prompt": ["all", "one", "all"],
        "reference": [inner / "b.png", inner / "b.png", inner / "a.png"],
    }
    assert region_count(found) == 3
    own = one(folder, {"image": "a.png", "regions": [{"box": [0, 0, 4, 4], "prompt": "x"}] * 256})
    assert own.arguments["prompt"] == ["x"] * 256 and "reference" not in own.arguments and region_count(own) == 256
    some = {"image": "a.png", "prompt": "p", "regions": [{"mask": "m.png"}, {"mask": "m.png", "reference": "b.png"}]}
    assert one(folder, some).arguments["reference"] == [None, inner / "b.png"]
    refused(one(folder, {**line, "prompt": None}), "regions[0].prompt", "missing")
    # what the box of one region is, four boxes are not
    four = one(folder, {"image": "a.png", "prompt": "p", "regions": [{"box": [k, 0, k + 1, 1]} for k in range(4)]})
    assert len(images.region_masks(four.arguments["mask_or_box"], (64, 48))) == 4


def test_null_is_absent(folder):
    lines = [
        {**BOX, "id": None, "task": None, "mask": None, "reference": None, "seed": None, "rounds": None, "size": None},
        {**PAINT, "task": "regenerate", "box": None, "nothing": None},
        {"image": "a.png", "prompt": "p", "regions": [{"mask": None, "box": [0, 0, 4, 4], "prompt": None}]},
    ]
    refine, paint, regions = read(folder, *lines)
    assert refine.arguments == one(folder, BOX).arguments and refine.id == "1"
    assert paint.arguments == one(folder, PAINT).arguments
    assert regions.arguments["prompt"] == ["p"]


def test_white_space_bom_and_line_ends(folder):
    plain = one(folder, BOX)
    text = json.dumps(BOX).encode()
    lines = (b"\xef\xbb\xbf" + text, b"", b"  \t ", b"\t" + text + b" ", b"\xef\xbb\xbf", b"\xef\xbb\xbf" + text)
    for end in (b"\n", b"\r\n"):
        with Manifest(written(folder, *lines, end=end)) as found:
            assert [(r.line, r.id, r.digest) for r in found] == [(k, str(k), plain.digest) for k in (1, 4, 6)]
            assert len(found) == 3
    path = folder / "open_end.jsonl"
    path.write_bytes(text + b"\n" + text)
    with Manifest(path) as found:
        assert [r.line for r in found] == [1, 2] and found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.read(np.int64(1)) == found.read(1)
        for wrong in (2, -1):
            with pytest.raises(IndexError):
                found.read(wrong)


NUMBER = st.floats(0.01, 1, allow_nan=False)
COMMON = {
    "seed": st.integers(-(2**63), 2**63 - 1),
    "steps": st.integers(1, 1000),
    "id": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).map(lambda name: "x" + name),
}
PROMPT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
FILE = st.sampled_from(["a.png", "./b.png", "sub/c.png", "sub/../m.png"])
CORNERS = st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 90)] * 2)
AREA = CORNERS.map(lambda c: [c[0], c[1], c[0] + c[2], c[1] + c[3]])
GUIDED = {
    "text_cfg": st.floats(0, 1000),
    "renorm": st.sampled_from(["text_channel", "channel", "global"]),
    "renorm_min": NUMBER,
    "interval": st.tuples(NUMBER, NUMBER).map(sorted).map(tuple),
    "shift": st.floats(0.01, 1000),
}
REFINE = {
    "negative_prompt": PROMPT,
    "true_cfg_scale": st.floats(0, 1e3),
    "margin": st.floats(0, 1e30) | st.integers(0, 2**53),
    "focus": st.booleans(),
    "feather": st.sampled_from(["released", "paper"]),
}
LINE = st.one_of(
    st.fixed_dictionaries(
        {"image": FILE, "prompt": PROMPT, "mask": FILE}, optional={**COMMON, **REFINE, "reference": FILE}
    ),
    st.fixed_dictionaries({"image": FILE, "prompt": PROMPT, "box": AREA}, optional={**COMMON, **REFINE}),
    st.fixed_dictionaries(
        {"image": FILE, "prompt": PROMPT},
        optional={**COMMON, **GUIDED, "rounds": st.integers(0, 100), "image_cfg": st.floats(0, 1000)},
    ),
    st.fixed_dictionaries(
        {"prompt": PROMPT}, optional={**COMMON, **GUIDED, "size": st.tuples(*[st.integers(1, 9999)] * 2)}
    ),
)


@settings(max_examples=150, deadline=None)
@given(LINE, st.booleans(), st.randoms(use_true_random=False))
def test_what_is_valid_arrives_as_it_was(folder, line, ascii_only, random):
    found = one(folder, json.dumps(line, ensure_ascii=ascii_only))
    assert isinstance(found, Request), found
    assert found.id == line.get("id", "1")
    inner = folder.resolve()
    expected = {name: tuple(v) if isinstance(v, (list, tuple)) else v for name, v in line.items() if name != "id"}
    for name in ("image", "mask", "reference"):
        if name in line:
            expected[name] = (inner / line[name]).resolve()
    areas = [expected.pop(name) for name in ("mask", "box") if name in expected]
    if areas:
        expected["mask_or_box"] = areas[0]
    assert found.arguments == expected
    assert found.task == ("refine" if areas else "regenerate" if "image" in line else "generate")
    # the digest sees what is said, not how, and not the name
    shuffled = list(line.items())
    random.shuffle(shuffled)
    other = one(folder, json.dumps({**dict(shuffled), "id": "other", "task": found.task}, indent=None))
    assert other.digest == found.digest and other.arguments == found.arguments


def test_fields_and_ranges_are_those_of_the_doors(folder):
    from refine_jax import flow, regenerate
    from refine_jax.refine import Refiner

    doors = {
        "refine": Refiner.refine,
        "regenerate": regenerate.Regenerator.regenerate,
        "generate": regenerate.Regenerator.generate,
    }
    for task, door in doors.items():
        fields = {"mask_or_box" if name in manifest._AREAS else name for name in manifest._FIELDS[task]}
        assert fields == set(inspect.signature(door).parameters) - {"self", "noise", "progress"}
    for renorm in flow.RENORMS:
        assert isinstance(one(folder, {**PAINT, "renorm": renorm}), Request)
    for name, (low, high) in regenerate._NUMBERS.items():
        ends = read(folder, {**PAINT, name: low}, {**PAINT, name: high})
        beyond = read(folder, {**PAINT, name: low - 1e-9}, {**PAINT, name: high + 1e-9})
        assert all(isinstance(r, Request) for r in ends) and all(isinstance(r, Refused) for r in beyond)


def test_the_documentation(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "batch.md").read_text()
    example = text.split("```\n")[1]
    for name in set(re.findall(r'"([a-z_]+\.(?:png|jpg))"', example)):
        picture(tmp_path / name, (400, 400))
    with Manifest(written(tmp_path, example)) as found:
        assert [r.task for r in found] == ["refine"] * 3 + ["regenerate", "generate"] and not list(check(found))
    table = dict(re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", text, re.MULTILINE))
    for task, fields in manifest._FIELDS.items():
        assert {"id", "task", *fields} == {
            name for name, tasks in table.items() if task in tasks.split(", ") or tasks == "all"
        }


# ------------------------------------------------------------------------------------------------------ what it refuses

WRONG = [
    ({**BOX, "colour": 1}, ["field 'colour'", "unknown", "margin"]),
    ({**BOX, "rounds": 1}, ["field 'rounds'", "no field of 'refine'"]),
    ({**PAINT, "margin": 1}, ["'margin'", "'regenerate'"]),
    ({"prompt": "x", "image_cfg": 1}, ["'image_cfg'", "'generate'"]),
    ({**PAINT, "task": "generate"}, ["'image'", "'generate'"]),
    ({**PAINT, "task": "refine"}, ["none given", "exactly one of mask, box, regions"]),
    ({**BOX, "task": "paint"}, ["task 'paint'", '"refine"']),
    ({**BOX, "task": ["refine"]}, ["task", "list"]),
    ({**BOX, "mask": "m.png"}, ["mask and box", "exactly one"]),
    ({**BOX, "regions": []}, ["box and regions"]),
    ({**PAINT, "regions": []}, ["regions", "256"]),
    ({**PAINT, "regions": [{"box": [0, 0, 1, 1]}] * 257}, ["a list of 257", "256"]),
    ({**PAINT, "regions": [3]}, ["regions[0] 3", "object"]),
    ({**PAINT, "regions": [{"box": [0, 0, 1, 1]}, {}]}, ["regions[1]: none given"]),
    ({**PAINT, "regions": [{"box": [0, 0, 1, 1], "mask": "m.png"}]}, ["regions[0]: mask and box"]),
    ({**PAINT, "regions": [{"box": [0, 0, 1, 1], "seed": 1}]}, ["'seed' of regions[0]"]),
    ({**PAINT, "regions": [{"box": [0, 0, 1, 1], "prompt": 7}]}, ["regions[0].prompt 7"]),
    ({**PAINT, "regions": [{"mask": "none.png"}]}, ["regions[0].mask 'none.png'", "no such file"]),
    ({"box": [0, 0, 1, 1], "prompt": "x"}, ["image: missing"]),
    ({"image": "a.png"}, ["prompt: missing"]),
    ({}, ["prompt: missing"]),
    ({**BOX, "prompt": ["x"]}, ["prompt", "text"]),
    ({**BOX, "prompt": "x" * 20_001}, ["prompt 'xxx", "…", "20,001 characters", "20,000"]),
    ({**BOX, "prompt": "a\0b"}, ["prompt 'a\\x00b'", "NUL"]),
    ('{"prompt": "a\\ud800b"}', ["prompt 'a\\ud800b'", "surrogate"]),
    ({**BOX, "negative_prompt": 1.5}, ["negative_prompt 1.5"]),
    ({**BOX, "seed": True}, ["seed true", "whole number"]),
    ({**BOX, "seed": 1.0}, ["seed 1.0", "whole number"]),
    ({**BOX, "seed": 2**63}, ["seed 9223372036854775808", "to 9223372036854775807"]),
    ({**BOX, "seed": -(2**63) - 1}, ["seed"]),
    ({**BOX, "seed": "1"}, ["seed '1'"]),
    ({**BOX, "steps": 0}, ["steps 0", "from 1 to 1000"]),
    ({**BOX, "steps": 1001}, ["steps 1001"]),
    ({**BOX, "margin": -1}, ["margin -1", "at least 0"]),
    ({**BOX, "margin": float("nan")}, ["margin NaN", "finite"]),
    ({**BOX, "margin": float("inf")}, ["margin Infinity", "finite"]),
    (json.dumps(BOX)[:-1] + ', "margin": 1e999}', ["margin Infinity"]),
    (json.dumps(BOX)[:-1] + ', "margin": ' + "9" * 500_000 + "}", ["margin Infinity"]),
    (json.dumps(BOX)[:-1] + ', "seed": ' + "9" * 500_000 + "}", ["seed Infinity"]),
    ({**BOX, "true_cfg_scale": False}, ["true_cfg_scale false"]),
    ({**BOX, "focus": 1}, ["focus 1", "true or false"]),
    ({**BOX, "feather": "soft"}, ["feather 'soft'", '"released" or "paper"']),
    ({**BOX, "box": [0, 0, 4]}, ["box [0, 0, 4]", "four whole numbers"]),
    ({**BOX, "box": [0, 0, 4.0, 4]}, ["box [0, 0, 4.0, 4]"]),
    ({**BOX, "box": [0, 0, True, 4]}, ["box [0, 0, true, 4]"]),
    ({**BOX, "box": [[0, 0, 4, 4]]}, ["box a list of 1"]),
    ({**BOX, "box": [4, 0, 4, 4]}, ["box [4, 0, 4, 4]", "empty"]),
    ({**BOX, "box": [-1, 0, 4, 4]}, ["box [-1, 0, 4, 4]"]),
    ({**BOX, "box": [0, 0, 4, 10**30]}, ["box", "16383"]),
    ({**BOX, "box": "0,0,4,4"}, ["box '0,0,4,4'"]),
    ({**PAINT, "rounds": 101}, ["rounds 101"]),
    ({**PAINT, "rounds": -1}, ["rounds -1"]),
    ({**PAINT, "text_cfg": 1001}, ["text_cfg 1001", "from 0 to 1000"]),
    ({**PAINT, "image_cfg": -0.1}, ["image_cfg -0.1"]),
    ({**PAINT, "renorm": "none"}, ["renorm 'none'", '"global"']),
    ({**PAINT, "renorm_min": 1.1}, ["renorm_min 1.1"]),
    ({**PAINT, "interval": [0]}, ["interval [0]"]),
    ({**PAINT, "interval": [0, 2]}, ["interval[1] 2"]),
    ({**PAINT, "interval": [1, 0.5]}, ["interval (1, 0.5)", "the lower time first"]),
    ({**PAINT, "shift": 0}, ["shift 0", "0.01"]),
    ({"prompt": "x", "size": [64]}, ["size [64]"]),
    ({"prompt": "x", "size": [0, 64]}, ["size [0, 64]"]),
    ({"prompt": "x", "size": [16383, 16383]}, ["size [16383, 16383]", "100,000,000"]),
    ({**BOX, "id": ""}, ["id ''"]),
    ({**BOX, "id": 7}, ["id 7", "quotes"]),
    ({**BOX, "id": "../x"}, ["id '../x'"]),
    ({**BOX, "id": ".x"}, ["id '.x'"]),
    ({**BOX, "id": "x\n"}, ["id 'x\\n'"]),
    ({**BOX, "id": "é"}, ["id 'é'"]),
    ({**BOX, "id": "x" * 129}, ["id 'xxx", "128"]),
    ({**BOX, "id": "Con"}, ["id 'Con'", "Windows"]),
    ({**BOX, "id": "lpt1.b"}, ["id 'lpt1.b'", "Windows"]),
    ({**BOX, "image": ""}, ["image ''", "path"]),
    ({**BOX, "image": 3}, ["image 3", "path"]),
    ({**BOX, "image": ["a.png"]}, ["image a list of 1"]),
    ({**BOX, "image": "a\0.png"}, ["image 'a\\x00.png'", "control"]),
    ({**BOX, "image": "a\x85.png"}, ["control"]),
    ('{"prompt": "x", "image": "\\udcff"}', ["image '\\udcff'", "surrogate"]),
    ({**BOX, "image": "none.png"}, ["image 'none.png'", "no such file"]),
    ({**BOX, "image": "a.png/b"}, ["no such file"]),
    ({**BOX, "image": "x" * 300}, ["image 'xxx"]),
    ({**BOX, "image": "x/" * 4000}, ["8,000 characters", "4,096"]),
    ({**BOX, "image": "sub"}, ["image 'sub'", "is a folder"]),
    ({**BOX, "image": "../outside.png"}, ["image '../outside.png'", "outside", "--root"]),
    ({**BOX, "image": "../not_there.png"}, ["outside"]),
    ({**BOX, "image": "/etc/passwd"}, ["outside"]),
    ({**BOX, "image": "/dev/zero"}, ["outside"]),
    ({**BOX, "mask": "../outside.png", "box": None}, ["mask '../outside.png'", "outside"]),
    ({**BOX, "reference": "sub/../../outside.png"}, ["reference", "outside"]),
    ("7", ["holds 7", "object"]),
    ("[" + json.dumps(BOX) + "]", ["holds a list of 1", "object"]),
    ('"x"', ["holds 'x'"]),
    ("null", ["holds null"]),
    ("{", ["no JSON"]),
    ("{} {}", ["no JSON", "Extra data"]),
    ("\x0b", ["no JSON"]),
    (json.dumps(BOX) + "\0", ["no JSON"]),
    ('{"prompt": "a\0b"}', ["no JSON", "control character"]),
    (b"\0" * 1000, ["no JSON"]),
    (json.dumps(BOX).encode("utf-16"), ["no"]),
    (b'{"prompt": "\xff"}', ["byte 13", "UTF-8"]),
    (b'{"prompt": "\xed\xa0\x80"}', ["byte 13", "UTF-8"]),
    ("[" * 500_000, ["nested too deeply"]),
    ('{"regions": ' * 50_000, ["nested too deeply"]),
    ('{"prompt": "a", "prompt": "a"}', ["field 'prompt'", "twice"]),
    ('{"prompt": "a", "pro\\u006dpt": null}', ["field 'prompt'", "twice"]),
    ('{"image": "a.png", "prompt": "p", "regions": [{"box": [0, 0, 1, 1], "box": [0, 0, 2, 2]}]}', ["'box'", "twice"]),
    (json.dumps({"x" * 100_000: 1}), ["field 'xxx", "…"]),
    (json.dumps({"evil\n\x1b[31m\u202e": 1}), ["field 'evil\\n\\x1b[31m\\u202e'"]),
    ('{"prompt": "' + "x" * 2**20 + '"}', ["longer than 1,048,576 bytes"]),
]


def test_each_fault_has_its_reason_and_the_others_go_on(folder):
    lines = [line for fault, _ in WRONG for line in (fault, BOX)]
    found = read(folder, BOX, *lines)
    assert len(found) == 2 * len(WRONG) + 1
    for line, (_, words), good in zip(found[1::2], WRONG, found[2::2]):
        refused(line, *words)
        assert isinstance(good, Request) and good.digest == found[0].digest
    assert [r.index for r in found] == list(range(len(found))) and [r.line for r in found] == list(
        range(1, len(found) + 1)
    )


def test_an_id_is_kept_for_what_else_is_wrong(folder):
    assert one(folder, {**BOX, "id": "sign", "steps": 0}).id == "sign"
    assert one(folder, {**BOX, "steps": 0}).id == "1"
    assert one(folder, {**BOX, "id": "a/b"}).id is None
    assert one(folder, "{").id is None


def test_a_line_of_just_the_limit(folder):
    spare = manifest.MAX_LINE - len(json.dumps(BOX))
    exact, over = (json.dumps(BOX) + " " * n for n in (spare, spare + 1))
    found = read(folder, exact, over, exact, exact)
    assert [isinstance(r, Request) for r in found] == [True, False, True, True]
    refused(found[1], "longer")


def test_ids_are_unique_whatever_their_case(folder):
    lines = [
        {**BOX, "id": "Sign"},
        {**BOX, "id": "sign"},
        "",
        {**BOX, "id": "5"},
        BOX,  # line 5, so "5"
        {**BOX, "id": "SIGN", "steps": 0},
        {**BOX, "id": "late", "steps": 0},
        {**BOX, "id": "late"},
        "{",
        "{",
        BOX,  # line 11
        {**BOX, "id": "11"},
        {**BOX, "id": "a/b"},
        {**BOX, "id": "a/b"},
    ]
    found = {r.line: r for r in read(folder, *lines)}
    for line, first in ((2, 1), (5, 4), (6, 1), (8, 7), (12, 11)):
        assert refused(found[line], "id ", f"line {first} has it already").id is None
    refused(found[5], "the number of the line")
    for line in (1, 4, 11):
        assert isinstance(found[line], Request)
    refused(found[7], "steps")  # a faulty line keeps its id
    refused(found[13], "id 'a/b': give")
    refused(found[14], "id 'a/b': give")


# Any JSON value in any field, and fields that nobody knows.
NAMES = sorted({"id", "task", *manifest._CHECKS, *manifest._FILES, *manifest._AREAS})
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=4)
    | st.sampled_from(["a.png", "..", "../outside.png", "/", "sub", "sub/c.png", ".", "~", "a.png/", "//a.png", *NAMES])
)
VALUE = st.recursive(
    SCALAR | AREA,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner),
    max_leaves=8,
)
HOSTILE = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), VALUE, max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([{}, BOX, PAINT]), HOSTILE) | VALUE, min_size=1, max_size=6))
def test_no_value_gets_through_and_none_raises(folder, lines):
    lines = [{**line[0], **line[1]} if isinstance(line, tuple) else line for line in lines]
    texts = [json.dumps(line) for line in lines]
    found = read(folder, *texts)
    assert len(found) == len(lines)
    inner = folder.resolve()
    for result, line in zip(found, lines):
        if isinstance(result, Refused):
            refused(result)
            continue
        assert isinstance(line, dict)
        for value in result.arguments.values():
            for item in value if isinstance(value, list) else [value]:
                assert not isinstance(item, Path) or (item.is_relative_to(inner) and item.is_file())
    with Manifest(folder / "m.jsonl") as again:
        for fault in check(again):
            refused(fault)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=6), st.sampled_from([b"\n", b"\r\n", b"\r", b""]))
@example([b'{"prompt":"\xc3'], b"")
def test_bytes_of_any_kind(folder, lines, end):
    path = written(folder, *lines, end=end)
    try:
        found = list(Manifest(path))
    except RefineError as error:
        assert "\n" not in str(error) and ("no request" in str(error) or "UTF-16" in str(error))
    else:
        assert all(isinstance(refused(r), Refused) for r in found)


# ---------------------------------------------------------------------------------------------------------------- files


def test_links_lead_where_they_may(folder, tmp_path):
    inner, other = tmp_path / "inner", tmp_path / "other"
    (
        picture(inner / "a.png"),
        picture(inner / "deep/b.png"),
        picture(other / "o.png"),
        picture(tmp_path / "innermost/x.png"),
    )
    (inner / "in.png").symlink_to("deep/b.png")
    (inner / "out.png").symlink_to(other / "o.png")
    (inner / "far").symlink_to(other)
    (inner / "loop.png").symlink_to("loop.png")
    (inner / "lost.png").symlink_to("gone.png")
    (inner / "up").symlink_to("..")
    (tmp_path / "alias").symlink_to(inner)
    paint = lambda name: {"image": name, "prompt": "x"}

    names = ["in.png", "up/inner/a.png", str(inner / "a.png"), "deep/../a.png"]
    assert [r.arguments["image"].name for r in read(inner, *map(paint, names))] == ["b.png", "a.png", "a.png", "a.png"]
    outside = ["out.png", "far/o.png", "../other/o.png", str(other / "o.png"), "up/other/o.png", "../innermost/x.png"]
    for found in read(inner, *map(paint, outside)):
        refused(found, "outside", "--root")
    refused(one(inner, paint("lost.png")), "no such file")
    refused(one(inner, paint("loop.png")), "loop.png")
    # a root allows its files and no others
    assert all(isinstance(r, Request) for r in read(inner, *map(paint, outside[:5]), *map(paint, names), root=other))
    refused(one(inner, paint("../innermost/x.png"), root=other), "outside")
    assert isinstance(one(inner, paint("/" + str(other / "o.png")), root="/"), Request)
    # a manifest that is reached through a link starts from its folder
    with Manifest(tmp_path / "alias" / "m.jsonl") as found:
        assert isinstance(found.read(0), Refused | Request)
    written(inner, paint("a.png"))
    with Manifest(tmp_path / "alias" / "m.jsonl") as found:
        assert found.read(0).arguments["image"] == inner.resolve() / "a.png"


def test_what_is_no_regular_file_is_never_opened(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(manifest.MAX_FILE + 1)
    lines = [{"image": name, "prompt": "x"} for name in ("pipe.png", "empty.png", "huge.png", "/dev/null", "/dev/zero")]
    results = []
    worker = threading.Thread(target=lambda: results.append(read(tmp_path, *lines, root="/")), daemon=True)
    worker.start()
    worker.join(30)  # opening a pipe without a writer would wait for ever
    assert results
    for found, word in zip(results[0], ("no regular", "is empty", "1,073,741,825 bytes", "no regular", "no regular")):
        refused(found, word)


def test_ids_and_tasks_are_told_without_files(folder, monkeypatch):
    lines = [{**BOX, "id": "Sign"}, {**PAINT, "id": "sign"}, {"prompt": "x"}, "{", {**PAINT, "task": "other"}]
    found = Manifest(written(folder, *lines, {**BOX, "image": "gone.png"}))
    known = [found.read(index) for index in range(len(found))]
    monkeypatch.setattr(os, "lstat", lambda path: pytest.fail(f"{path} was looked up"))
    heads = [found.head(index) for index in range(len(found))]
    assert [name for name, _ in heads] == [r.id or f"line {r.line}" for r in known]
    assert [task for _, task in heads] == ["refine", None, "generate", None, None, "refine"]
    assert isinstance(known[-1], Refused) and [found.line(index) for index in range(6)] == [1, 2, 3, 4, 5, 6]


def test_check_reads_headers(tmp_path):
    picture(tmp_path / "a.png", (64, 48))
    picture(tmp_path / "b.png", (20, 20))
    picture(tmp_path / "m.png", (32, 24))
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    # a header that declares 2 GB of pixels
    bomb = bytearray((tmp_path / "a.png").read_bytes())
    bomb[16:24] = (30_000).to_bytes(4, "big") + (24_000).to_bytes(4, "big")
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)

    good = [
        {"image": "a.png", "box": [0, 0, 64, 48], "prompt": "x"},
        {"image": "a.png", "mask": "m.png", "reference": "turned.jpg", "prompt": "x"},
        {"image": "turned.jpg", "box": [0, 0, 20, 40], "prompt": "x"},
        {"image": "b.png", "prompt": "x"},
        {"prompt": "x"},
    ]
    faults = [
        ({"image": "text.png", "prompt": "x"}, ["image 'text.png'", "not a picture"]),
        ({"image": "cut.png", "prompt": "x"}, ["image 'cut.png'"]),
        ({"image": "bomb.png", "prompt": "x"}, ["image 'bomb.png'", "100,000,000"]),
        ({"image": "a.png", "mask": "text.png", "prompt": "x"}, ["mask 'text.png'"]),
        ({"image": "a.png", "box": [0, 0, 1, 1], "reference": "bomb.png", "prompt": "x"}, ["reference 'bomb.png'"]),
        ({"image": "a.png", "box": [0, 0, 65, 48], "prompt": "x"}, ["box [0, 0, 65, 48]", "64x48", "[0, 0, 64, 48]"]),
        ({"image": "turned.jpg", "box": [0, 0, 40, 20], "prompt": "x"}, ["20x40"]),
        ({"image": "a.png", "prompt": "x", "regions": [{"mask": "m.png"}, {"mask": "cut.png"}]}, ["regions[1].mask"]),
        ({"image": "a.png", "prompt": "x", "regions": [{"mask": "m.png"}, {"box": [0, 0, 1, 49]}]}, ["regions[1].box"]),
        ({"image": "turned.jpg", "mask": "m.png", "prompt": "x"}, ["mask: 32x24 pixels, the picture has 20x40"]),
        ({"image": "a.png", "prompt": "x", "regions": [{"mask": "b.png"}]}, ["regions[0].mask: 20x20"]),
        ({"image": "gone.png", "prompt": "x"}, ["image 'gone.png'", "no such file"]),
        ("{", ["no JSON"]),
    ]
    with Manifest(written(tmp_path, *good, *(fault for fault, _ in faults), *good)) as found:
        wrong = list(check(found))
    assert [r.index for r in wrong] == list(range(len(good), len(good) + len(faults)))
    for result, (_, words) in zip(wrong, faults):
        refused(result, *words)
    assert [r.id for r in wrong[:-1]] == [str(r.line) for r in wrong[:-1]]


def test_the_digest_tells_what_the_result_depends_on(tmp_path):
    line = {
        "image": "a.png",
        "prompt": "p",
        "seed": 1,
        "margin": 4,
        "regions": [{"mask": "m.png"}, {"box": [0, 0, 4, 4], "reference": "r.png"}],
    }
    for name in ("a.png", "m.png", "r.png", "other.png"):
        os.utime(picture(tmp_path / name), ns=(1, 10**18))
    base = one(tmp_path, line).digest
    assert base == one(tmp_path, {**dict(reversed(line.items())), "id": "x", "margin": 4.0}).digest
    assert base == one(tmp_path, json.dumps(line, separators=("  , \t", " :   ")) + " ").digest
    changes = [
        {"image": "other.png"},
        {"prompt": "q"},
        {"seed": 2},
        {"seed": None},
        {"margin": 4.5},
        {"steps": 3},
        {"regions": line["regions"][::-1]},
        {"regions": line["regions"][:1]},
        {"regions": [line["regions"][0], {"box": [0, 0, 4, 5], "reference": "r.png"}]},
        {"regions": [line["regions"][0], {"box": [0, 0, 4, 4]}]},
        {"regions": [line["regions"][0], {**line["regions"][1], "prompt": "q"}]},
    ]
    digests = [one(tmp_path, {**line, **change}).digest for change in changes]
    for name in ("a.png", "m.png", "r.png"):
        os.utime(tmp_path / name, ns=(1, 10**18 + 1))
        digests.append(one(tmp_path, line).digest)
        with open(tmp_path / name, "ab") as file:
            file.write(b"\0")
        os.utime(tmp_path / name, ns=(1, 10**18 + 1))
        digests.append(one(tmp_path, line).digest)
    assert len({base, *digests}) == 1 + len(changes) + 6
    text = {"prompt": "p"}
    assert one(tmp_path, text).digest != one(tmp_path, {**text, "image": "a.png"}).digest


# ------------------------------------------------------------------------------------------------------- the whole file


def test_the_file_itself(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_bytes(b"\xef\xbb\xbf\n \r\n\n")
    (tmp_path / "wide").write_text(json.dumps(BOX), encoding="utf-16")
    for name, word in (
        ("none", "no such file"),
        (".", "is a folder"),
        ("pipe", "save it as a file"),
        ("empty", "holds no request"),
        ("blank", "holds no request"),
        ("wide", "UTF-16"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(RefineError, match=word) as error:
            Manifest(tmp_path / name)
        assert "\n" not in str(error.value) and str(error.value).startswith("manifest ")
    for root in (folder / "none", folder / "a.png", "a\0b"):
        with pytest.raises(RefineError, match="root .*no such folder"):
            Manifest(written(folder, BOX), root=root)


def test_too_many_requests(folder, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_REQUESTS", 3)
    assert len(Manifest(written(folder, BOX, "", BOX, BOX, ""))) == 3
    with pytest.raises(RefineError, match="more than 3 requests; split it"):
        Manifest(written(folder, BOX, BOX, BOX, BOX))


def test_a_manifest_that_changes_below_its_reader(folder, tmp_path):
    picture(tmp_path / "a.png")
    path = written(tmp_path, *[{**BOX, "id": name} for name in "abc"])
    with Manifest(path) as found:
        first = list(found)
        with open(path, "ab") as file:
            file.write(json.dumps(BOX).encode())
        assert list(found) == first  # more lines are nobody's business
        raw = path.read_bytes().replace(b'"b"', b'"x"')
        with open(path, "r+b") as file:
            file.write(raw)
        assert found.read(0) == first[0] and found.read(2) == first[2]
        with pytest.raises(RefineError, match="line 2 changed"):
            found.read(1)
        written(tmp_path, BOX, name="new.jsonl")
        os.replace(tmp_path / "new.jsonl", path)
        assert found.read(0) == first[0]  # the file that was opened
    with Manifest(path) as found:
        os.truncate(path, 10)
        with pytest.raises(RefineError, match="changed"):
            found.read(0)


def test_many_threads_read_alike(folder, monkeypatch):
    lines = [{**BOX, "id": f"r{k}", "seed": k} if k % 3 else "{" * (k + 1) for k in range(300)]
    with Manifest(written(folder, *lines)) as found, ThreadPoolExecutor(8) as pool:
        expected = list(found)
        assert list(pool.map(found.read, list(range(300)) * 4)) == expected * 4
        whole = os.pread
        monkeypatch.setattr(os, "pread", lambda file, size, at: whole(file, min(size, 50), at))
        assert list(found) == expected  # network file systems may give less than asked


def test_bounded_memory_and_no_jax(tmp_path):
    picture(tmp_path / "a.png")
    with open(tmp_path / "m.jsonl", "w") as file:
        for k in range(100_000):
            file.write(json.dumps({**BOX, "id": f"request-{k % 99_999}", "seed": k}) + "\n")
        for start in ("", '{"prompt": "'):  # 100 MB of NULs, and of a prompt without an end
            file.write(start)
            file.flush()
            file.truncate(file.tell() + 100_000_000)
            file.seek(0, os.SEEK_END)
            file.write("\n")
        file.write(json.dumps(BOX))
    script = """if True:
        import resource, sys, time
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        from refine_jax.manifest import Manifest, Refused, Request, check
        before, start = peak(), time.process_time()
        found = Manifest(sys.argv[1])
        seconds = time.process_time() - start
        assert len(found) == 100_003
        assert found.read(99_998).arguments["seed"] == 99_998 and isinstance(found.read(100_002), Request)
        for index, word in ((99_999, "line 1 has it"), (100_000, "longer"), (100_001, "longer")):
            refused = found.read(index)
            assert isinstance(refused, Refused) and word in refused.reason, refused
        assert all(found.read(index) for index in range(0, 100_000, 97))
        assert peak() - before < 24, peak() - before
        assert seconds < 60, seconds
        assert not {"jax", "flax", "transformers"} & set(sys.modules)
        """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "m.jsonl")], check=True, env=environment)
