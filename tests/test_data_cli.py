"""`refine-jax data` through `cli.main`: pairs written, pictures imported, datasets checked; every bad line listed."""

import json

import numpy as np
import pytest
import records_toy as toy
from PIL import Image

from refine_jax import cli, manifest
from refine_jax.data import records, synth


def run(*words) -> int:
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as leaving:
        return leaving.code


# --------------------------------------------------------------------------------------------------------------- synth


def test_synth_writes_whole_scenes_with_one_damaged_region(tmp_path, capsys):
    out = tmp_path / "set"
    assert run("data", "synth", "--output", out, "--count", 5, "--seed", 3, "--shards", 2, "--quiet") == 0
    assert "5 records" in capsys.readouterr().out
    dataset = records.Dataset(out)
    shown = 0
    for number in range(5):
        record, scene = dataset[number], synth.scene(3, number, "train")
        region = scene["instructions"].index(record.instruction)
        inside = scene["masks"][region] > 0
        image, target = np.asarray(record.whole_image()), toy.pixels(record.target)
        assert np.array_equal(target, scene["target"])
        assert np.array_equal(image[inside], scene["image"][inside])
        assert np.array_equal(image[~inside], target[~inside])  # the scene's other regions are intact
        assert record.kind == scene["kinds"][region] and record.licence and str(number) in record.source
        shown += record.reference is not None
        if record.reference is not None:
            assert np.array_equal(toy.pixels(record.reference), scene["references"][region])
    assert 0 < shown < 5
    digest = dataset.digest
    assert run("data", "synth", "--output", out, "--count", 5, "--seed", 3, "--shards", 2, "--quiet") == 0
    assert records.Dataset(out).digest == digest
    assert run("data", "synth", "--output", out, "--count", 5, "--seed", 4, "--shards", 2, "--quiet") == 2
    assert "holds another dataset" in capsys.readouterr().err
    assert run("data", "check", out, "--area", 4096, "--batch", 2, "--quiet") == 0
    text = capsys.readouterr().out
    assert "5 records in 2 shards" in text and "every picture can be decoded" in text and "64x96" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", 0], "count 0"),
        (["--count", 2, "--size", "100,200"], "size 100,200"),
        (["--count", 2, "--size", "abc"], "two whole numbers"),
        (["--count", 2, "--seed", -1], "seed -1"),
        (["--count", 2, "--shards", 3], "shards 3"),
        (["--count", 2, "--workers", -1], "--workers -1"),
        (["--count", 2, "--split", "test"], "--split"),
        ([], "--count"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, words, message):
    assert run("data", "synth", "--output", tmp_path / "set", "--quiet", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "set").exists()


# -------------------------------------------------------------------------------------------------------------- import


@pytest.fixture
def source(tmp_path):
    """Pictures and a JSONL file of three good lines: with a mask, with a box, with a reference."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = []
    for number in (1, 2, 3):
        image, target, mask, reference, text = toy.pair(number)
        Image.fromarray(image).save(folder / f"i{number}.png")
        Image.fromarray(target).save(folder / f"t{number}.png")
        line = {"image": f"i{number}.png", "target": f"t{number}.png", "instruction": text}
        if number == 2:
            line |= {"box": list(Image.fromarray(mask).getbbox()), "licence": "CC-BY-4.0", "kind": "text"}
        else:
            Image.fromarray(mask).save(folder / f"m{number}.png")
            line["mask"] = f"m{number}.png"
        if reference is not None:
            Image.fromarray(reference).save(folder / f"r{number}.png")
            line["reference"] = f"r{number}.png"
        lines.append(line)
    write(folder, lines)
    return folder


def write(folder, lines) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "pairs.jsonl").write_text("\n".join(texts) + "\n\n")


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().split("\n") if line]


def test_import_of_a_jsonl_file(source, tmp_path, capsys):
    out = tmp_path / "set"
    words = (
        "data",
        "import",
        source / "pairs.jsonl",
        "--output",
        out,
        "--licence",
        "CC0",
        "--source",
        "mine",
        "--quiet",
    )
    assert run(*words) == 0
    dataset = records.Dataset(out)
    assert len(dataset) == 3 and [dataset[k].licence for k in range(3)] == ["CC0", "CC-BY-4.0", "CC0"]
    for number in range(3):
        image, target, mask, reference, text = toy.pair(number + 1)
        record = dataset[number]
        assert record.target == (source / f"t{number + 1}.png").read_bytes() and record.source == "mine"
        assert np.array_equal(record.whole_image(), image)
        assert record.box == Image.fromarray(mask).getbbox() and record.instruction == text
        assert (record.reference is not None) == (reference is not None)
        marked = toy.pixels(record.mask)
        assert marked.all() if number == 1 else np.array_equal(marked, (mask > 0)[_slices(record.box)])
    assert run(*words) == 0  # again: finished
    assert run("data", "check", out, "--area", 4096, "--quiet") == 0
    assert "licences: CC0 2, CC-BY-4.0 1" in capsys.readouterr().out


def _slices(box):
    return slice(box[1], box[3]), slice(box[0], box[2])


def test_import_of_a_folder(source, tmp_path):
    folder = tmp_path / "sorted"
    for number, line in enumerate(lines_of(source)):
        for part in ("image", "target", "mask", "reference"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            if part in line:
                (source / line[part]).rename(folder / part / f"pair{number}.png")
        (folder / "prompt").mkdir(exist_ok=True)
        (folder / "prompt" / f"pair{number}.txt").write_text(line["instruction"] + "\n")
    out = tmp_path / "set"
    Image.fromarray(toy.pair(2)[2]).save(folder / "mask" / "pair1.webp", lossless=True)
    assert run("data", "import", folder, "--output", out, "--quiet") == 0
    dataset = records.Dataset(out)
    assert [dataset[k].instruction for k in range(3)] == [toy.pair(k + 1)[-1] for k in range(3)]
    (folder / "target" / "pair2.png").unlink()
    (folder / "image" / "stray.doc").write_text("?")
    assert run("data", "import", folder, "--output", tmp_path / "other", "--quiet") == 2


@pytest.mark.parametrize("origin", ["dataset", "pairs.jsonl"])
def test_export_and_import_give_the_pairs_back(source, tmp_path, capsys, origin):
    before = toy.write(tmp_path / "before", 7) if origin == "dataset" else None
    out = tmp_path / "out"
    words = ("data", "export", before.folder if before else source / origin, "--output", out, "--quiet")
    (out / "image").mkdir(parents=True)
    (out / "image" / "000000.png.partial").write_bytes(b"of a killed call")
    assert run(*words) == 0
    assert run("data", "import", out / "pairs.jsonl", "--output", tmp_path / "after", "--quiet") == 0
    after = records.Dataset(tmp_path / "after")
    assert len(after) == (7 if before else 3)
    for number in range(len(after)):
        image, target, mask, reference, text = toy.pair(number if before else number + 1)
        record = after[number]
        assert np.array_equal(record.whole_image(), image) and np.array_equal(toy.pixels(record.target), target)
        if before or number != 1:  # that one was given as a box
            assert np.array_equal(toy.pixels(record.mask), (mask > 0)[_slices(record.box)])
        assert record.instruction == text and (record.reference is None) == (reference is None)
        assert not before or (record.kind, record.licence) == ("toy", "CC0")
    asked = manifest.Manifest(out / "requests.jsonl")
    assert not list(manifest.check(asked)) and len(asked) == len(after)
    assert [request.arguments["prompt"] for request in asked] == [after[k].instruction for k in range(len(after))]
    assert run(*words) == 2 and "holds an export" in capsys.readouterr().err


def test_export_of_some(tmp_path, capsys):
    toy.write(tmp_path / "set", 9)
    words = ("data", "export", tmp_path / "set", "--quiet", "--output")
    assert run(*words, tmp_path / "out", "--count", 3) == 0
    assert sorted(path.stem for path in (tmp_path / "out" / "image").iterdir()) == ["000000", "000004", "000008"]
    assert run(*words, tmp_path / "other", "--count", 10) == 2
    assert "count 10: give 1 to 9" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_names_and_texts_that_no_file_system_or_encoding_takes(source, tmp_path, capsys):
    one, *_ = lines_of(source)
    bad = [{**one, "instruction": "\ud83d"}, {**one, "image": "x" * 300 + ".png"}, {**one, "mask": "a\0b.png"}]
    write(source, bad)
    assert run("data", "import", source / "pairs.jsonl", "--output", tmp_path / "set", "--quiet") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 problems, nothing is written" in error
    assert "pairs.jsonl:1: instruction holds half a surrogate pair" in error and error.count("no such file") == 2
    # Odd names that are none of that.
    for name in ("ein bild.png", "图 'ü\".png"):
        (source / name).write_bytes((source / "i1.png").read_bytes())
    write(source, [{**one, "image": name} for name in ("ein bild.png", "图 'ü\".png")])
    assert run("data", "import", source / "pairs.jsonl", "--output", tmp_path / "set", "--quiet") == 0
    assert len(records.Dataset(tmp_path / "set")) == 2


def test_every_bad_line_is_listed_and_nothing_is_written(source, tmp_path, capsys):
    one, two, three = lines_of(source)
    bad = [
        one,
        {**one, "prompt": "x"},
        {k: v for k, v in one.items() if k != "mask"},
        {**two, "mask": "m1.png"},
        {**one, "image": "gone.png"},
        {**one, "instruction": " "},
        {**one, "instruction": 5},
        {**two, "box": [1, 2, 3]},
        {"image": "i1.png"},
        "{not json",
        "[1]",
    ]
    write(source, bad)
    out = tmp_path / "set"
    assert run("data", "import", source / "pairs.jsonl", "--output", out, "--quiet") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "10 problems, nothing is written" in error and not out.exists()
    for text in (
        "pairs.jsonl:2: unknown field 'prompt'",
        "pairs.jsonl:3: give either mask or box",
        "pairs.jsonl:4: give either mask or box",
        "pairs.jsonl:5: " + str(source / "gone.png") + ": no such file",
        "pairs.jsonl:6: instruction is empty",
        "pairs.jsonl:7: instruction is a int",
        "pairs.jsonl:8: box [1, 2, 3]",
        "pairs.jsonl:9: target, instruction missing",
        "pairs.jsonl:10: not JSON",
        "pairs.jsonl:11: a list, an object is wanted",
    ):
        assert text in error

    # What only decoding shows.
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(source / "small.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(source / "empty.png")
    (source / "broken.png").write_bytes((source / "i1.png").read_bytes()[:900])
    write(
        source,
        [
            one,
            {**one, "target": "small.png"},
            {**one, "mask": "empty.png"},
            {**two, "box": [0, 0, 999, 9]},
            {**one, "image": "broken.png"},
            three,
        ],
    )
    assert run("data", "import", source / "pairs.jsonl", "--output", out, "--shards", 2, "--quiet") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "4 of 6 records cannot be made" in error and not out.exists()
    for text in (
        "pairs.jsonl:2: target: 9x9 pixels",
        "pairs.jsonl:3: mask",
        "pairs.jsonl:4: box",
        "pairs.jsonl:5: image",
    ):
        assert text in error


def test_check_lists_what_is_damaged(tmp_path, capsys):
    dataset = toy.write(tmp_path / "set", 6, 2)
    toy.damage(dataset.files[1], dataset[4].image)
    assert run("data", "check", tmp_path / "set", "--area", 4096, "--quiet") == 2
    error = capsys.readouterr().err
    assert "2 problems" in error and "record 1" in error and "checksum" in error and error.count("\n") == 1
    assert run("data", "check", tmp_path / "nowhere", "--quiet") == 2
    assert "no dataset.json there" in capsys.readouterr().err
