"""Datasets on the disk: what goes in comes out, what is damaged is named, what is killed continues."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import records_toy as toy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from refine_jax.data import records, writer
from refine_jax.errors import RefineError
from refine_jax.images import read_picture


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "set"
    toy.write(folder, 12, 3)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "set")


# ------------------------------------------------------------------------------------------------------------ contents


def test_what_goes_in_comes_out(whole):
    dataset = pickle.loads(pickle.dumps(records.Dataset(whole)))
    assert len(dataset) == 12 and dataset.index.shape == (12, 9)
    for number in range(12):
        image, target, mask, reference, instruction = toy.pair(number)
        record = dataset[number]
        height, width = mask.shape
        assert record.size == (width, height) and record.instruction == instruction
        assert np.array_equal(np.asarray(record.whole_image()), image) and np.array_equal(
            toy.pixels(record.target), target
        )
        x1, y1, x2, y2 = record.box
        again = np.zeros_like(mask)
        again[y1:y2, x1:x2] = 255 * toy.pixels(record.mask)
        assert np.array_equal(again, mask)
        assert Image.fromarray(mask).getbbox() == record.box
        assert (record.reference is None) == (reference is None)
        assert reference is None or np.array_equal(toy.pixels(record.reference), reference)
        assert (record.kind, record.source, record.licence) == ("toy", f"noise {number}", "CC0")
        row = dict(zip(records.COLUMNS, dataset.index[number].tolist()))
        assert (row["width"], row["height"], row["instruction_bytes"]) == (width, height, len(instruction))
        assert dataset.place(number) == (dataset.files[number // 4], number % 4)
    assert records.verify(dataset)[0] == []


@settings(deadline=None, max_examples=15)
@given(
    text=st.text(min_size=1).filter(lambda t: t.strip() and "\ud800" > max(t)),
    kind=st.text(st.characters(codec="utf-8"), max_size=9),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    data=st.data(),
)
def test_any_record_survives_encoding(text, kind, shape, data):
    height, width = shape
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (x1, y1, data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height)))
    picture = np.zeros((height, width, 3), np.uint8)
    record = writer.make_record(picture, picture, box, text, picture, kind=kind)
    assert records.decode(records.encode(record), np.array(record.row(), np.int32)) == record
    assert record.box == box and toy.pixels(record.mask).all()


def test_plain_files_keep_their_bytes_and_others_the_pixels_that_refine_sees(tmp_path):
    image, target, mask, _, text = toy.pair(1)
    files = {}
    for suffix in ("png", "jpg", "webp"):
        files[suffix] = tmp_path / f"plain.{suffix}"
        Image.fromarray(image).save(files[suffix], quality=80)
    grey = tmp_path / "grey.jpg"
    Image.fromarray(image[..., 0]).save(grey)
    for path in (*files.values(), grey):
        assert writer.make_record(path, path, mask, text, path).target == path.read_bytes()

    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(image)).save(turned, exif=exif, quality=95)
    profiled = tmp_path / "profiled.png"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(image).save(profiled, icc_profile=srgb)
    clear = tmp_path / "clear.png"
    Image.fromarray(np.dstack([image, mask])).save(clear)
    sixteen = tmp_path / "sixteen.png"
    Image.fromarray(image[..., 0].astype(np.uint16) * 256).save(sixteen)
    for path in (turned, clear, sixteen, profiled):
        record = writer.make_record(path, path, mask, text)
        seen = toy.pixels(record.target)
        assert path == profiled or record.target != path.read_bytes()
        assert record.size == image.shape[1::-1]
        assert np.array_equal(seen if seen.ndim == 3 else np.repeat(seen[..., None], 3, 2), read_picture(path).rgb)


def test_an_image_that_differs_in_a_part_is_stored_as_that_part(tmp_path):
    image, target, mask, _, text = toy.pair(2)
    Image.fromarray(target).save(tmp_path / "photo.jpg", quality=90)
    seen = toy.pixels((tmp_path / "photo.jpg").read_bytes())
    damaged = seen.copy()
    damaged[3:9, 5:12] ^= 255
    Image.fromarray(damaged).save(tmp_path / "damaged.png")
    record = writer.make_record(tmp_path / "damaged.png", tmp_path / "photo.jpg", (4, 3, 9, 9), text)
    assert record.image_box == (5, 3, 12, 9) and toy.pixels(record.image).shape == (6, 7, 3)
    assert record.target == (tmp_path / "photo.jpg").read_bytes()
    assert np.array_equal(record.whole_image(), damaged)
    # Compressed again, it differs everywhere.
    Image.fromarray(damaged).save(tmp_path / "damaged.jpg", quality=60)
    record = writer.make_record(tmp_path / "damaged.jpg", tmp_path / "photo.jpg", (4, 3, 9, 9), text)
    assert record.image_box is None and record.image == (tmp_path / "damaged.jpg").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(target=np.zeros((9, 9, 3), np.uint8)), "target: 9x9 pixels, the image has"),
        (dict(mask=np.zeros((9, 9), np.uint8)), "mask.*empty"),
        (dict(mask=(0, 0, 500, 5)), "box.*outside the picture"),
        (dict(instruction=" \n"), "instruction: is empty"),
        (dict(image="nowhere.png"), "nowhere.png.*no such file"),
        (dict(reference=b"bytes"), "reference: cannot read a bytes"),
    ],
)
def test_a_record_that_cannot_be_made_says_why(change, message):
    image, target, mask, reference, instruction = toy.pair(1)
    good = dict(image=image, target=target, mask=mask, instruction=instruction, reference=reference)
    with pytest.raises(RefineError, match=message):
        writer.make_record(**{**good, **change})


# -------------------------------------------------------------------------------------------------------------- damage


def _shard(folder, number=1):
    return sorted((folder / "shards").iterdir())[number]


def _edit(folder, **changes):
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**manifest, **changes}))


def _recount(folder):
    shards = json.loads((folder / "dataset.json").read_text())["shards"]
    shards[0]["records"] += 1
    shards[1]["records"] -= 1
    _edit(folder, shards=shards)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: _shard(f).unlink(), "00001-of-00003.array_record: missing.*copy it again"),
        (lambda f: os.truncate(_shard(f), 70000), "00001-of-00003.array_record: 70000 bytes, dataset.json says"),
        (lambda f: _shard(f).write_bytes(bytes(_shard(f).stat().st_size)), "00001-of-00003.*cannot be read"),
        (_recount, "00000-of-00003.array_record: 4 records, dataset.json says 5"),
        (lambda f: (f / "dataset.json").unlink(), "no dataset.json there"),
        (lambda f: (f / "dataset.json").write_text("{"), "dataset.json: damaged"),
        (lambda f: _edit(f, shards=[{}]), "dataset.json: damaged.*KeyError"),
        (lambda f: _edit(f, records=13), "dataset.json: damaged"),
        (lambda f: _edit(f, version=2), "version 2, 'refine_jax records' 1 is wanted"),
        (lambda f: (f / "index.npy").unlink(), "index.npy: missing"),
        (lambda f: toy.damage(f / "index.npy", (f / "index.npy").read_bytes()[-40:]), "index.npy: its checksum"),
    ],
)
def test_damage_is_named_when_the_dataset_is_opened(folder, spoil, message):
    spoil(folder)
    with pytest.raises(RefineError, match=message):
        records.Dataset(folder)


def test_a_damaged_record_is_named_and_its_neighbours_stay_readable(folder):
    dataset = records.Dataset(folder)
    toy.damage(_shard(folder), dataset[6].target)
    dataset = records.Dataset(folder)
    with pytest.raises(records.CorruptRecord, match="00001-of-00003.array_record: record 2: .*hash mismatch"):
        dataset[6]
    assert dataset[5].instruction == toy.pair(5)[-1] and dataset[7].instruction == toy.pair(7)[-1]
    problems, *_ = records.verify(dataset)
    assert len(problems) == 2 and "checksum" in problems[0] and "record 2" in problems[1]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_foreign_bytes_are_never_taken_for_a_record(data):
    record = toy.make(1)
    row = np.array(record.row(), np.int32)
    fields = {"version": 1, **{n: getattr(record, n) for n in records._STORED}}
    name = data.draw(st.sampled_from(sorted(fields)))
    value = data.draw(st.one_of(st.integers(-9, 9), st.none(), st.binary(max_size=9), st.lists(st.integers(0, 9))))
    whole = msgpack.packb(fields)
    changed = {**fields, name: value}
    spoilt = data.draw(st.sampled_from([whole[: data.draw(st.integers(0, len(whole) - 1))], msgpack.packb(changed)]))
    try:
        read = records.decode(spoilt, row)
    except RefineError:
        return
    assert read.row() == record.row()  # what was replaced is no text and not in the index


# -------------------------------------------------------------------------------------------------------------- writing


def _bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_bytes_depend_on_the_recipe_alone(whole, tmp_path):
    toy.write(tmp_path / "again", 12, 3)
    assert _bytes(tmp_path / "again") == _bytes(whole)
    assert toy.write(tmp_path / "again", 12, 3).digest == records.Dataset(whole).digest  # finished: opened as it is
    for count, shards in ((13, 3), (12, 4)):
        with pytest.raises(RefineError, match="holds another dataset"):
            toy.write(tmp_path / "again", count, shards)


def test_workers_write_the_same(whole, tmp_path):
    writer.write_dataset(tmp_path / "set", toy.make, 12, {"kind": "toy"}, shards=3, workers=1)
    assert _bytes(tmp_path / "set") == _bytes(whole)
    assert records.verify(records.Dataset(whole))[1] == {"toy": 12}


def processes() -> dict[int, tuple[int, str]]:
    """Those of this machine: number -> (that of the parent, state)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            found[int(path.parent.name)] = int(parent), state
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_writer_continues_to_identical_bytes(whole, tmp_path, workers):
    """SIGKILL while a shard is being written: what is finished is kept, the rest is made, the bytes are the same. A
    worker ends with who started it, and is no more in the way."""
    folder, shards = tmp_path / "set", tmp_path / "set" / "shards"
    code = textwrap.dedent("""
        import sys
        import records_toy as toy
        from refine_jax.data import writer
        how = dict(shards=3, workers=int(sys.argv[2]))
        writer.write_dataset(sys.argv[1], toy.slow, 12, {"kind": "toy"}, **how)
    """)
    command = [sys.executable, "-c", code, str(folder), str(workers)]
    child = subprocess.Popen(command, cwd=os.path.dirname(__file__))
    finished = shards / "00000-of-00003.json"
    deadline = time.monotonic() + 60
    while not finished.exists() or not list(shards.glob("00001*.partial")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    helpers = [pid for pid, (parent, _) in processes().items() if parent == child.pid]
    spawned = [pid for pid in helpers if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(spawned) == workers
    child.send_signal(signal.SIGKILL)
    child.wait()
    while any(processes().get(pid, (0, "Z"))[1] != "Z" for pid in helpers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RefineError, match="unfinished dataset; run the command"):
        records.Dataset(folder)
    with pytest.raises(RefineError, match="unfinished dataset of another recipe"):
        writer.write_dataset(folder, toy.make, 12, {"kind": "other"}, shards=3)
    first = shards / "00000-of-00003.array_record"
    before = first.stat().st_mtime_ns
    toy.write(folder, 12, 3)
    assert first.stat().st_mtime_ns == before
    assert _bytes(folder) == _bytes(whole)


def test_all_that_cannot_be_made_is_listed_and_nothing_is_left(tmp_path):
    def make(number):
        if number in (3, 8):
            raise RefineError(f"line {number}: bad")
        return toy.make(number)

    with pytest.raises(RefineError, match="2 of 12 records cannot be made: line 3: bad, line 8: bad"):
        writer.write_dataset(tmp_path / "set", make, 12, {}, shards=3)
    assert not (tmp_path / "set").exists()


def test_a_folder_in_use_and_a_disk_that_refuses(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RefineError, match="is not empty"):
        toy.write(tmp_path, 3, 1)
    with pytest.raises(RefineError, match="cannot be written"):
        toy.write(tmp_path / "note.txt" / "set", 3, 1)
    with pytest.raises(RefineError, match="shards 4: give 1 to 3"):
        toy.write(tmp_path / "set", 3, 4)
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_a_full_disk_is_said_and_the_writing_continues(whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, hard))  # bytes a file, less than a shard
    try:
        with pytest.raises(RefineError, match="set': cannot be written .*mend that and run it again"):
            toy.write(tmp_path / "set", 12, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    toy.write(tmp_path / "set", 12, 3)
    assert _bytes(tmp_path / "set") == _bytes(whole)


def test_pictures_of_another_size_than_the_index_says():
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "PNG")
    with pytest.raises(RefineError, match="image: 5x4 pixels, the index says 6x4"):
        records.open_picture(buffer.getvalue(), (6, 4), "image")
    with pytest.raises(RefineError, match="image: cannot be decoded"):
        records.open_picture(buffer.getvalue()[:40], (5, 4), "image")
