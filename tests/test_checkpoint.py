"""Model folders: what is written is what is read, and nothing half-written or foreign is taken for a model."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import toy

from refine_jax import checkpoint
from refine_jax.checkpoint import MANIFEST, WEIGHTS, load_weights, read_manifest, save_model
from refine_jax.errors import RefineError

RNG = np.random.default_rng(0)
TREES = {
    "vae": {"conv": {"kernel": RNG.standard_normal((3, 3, 2, 4), dtype=np.float32), "bias": np.ones(4, np.float32)}},
    "mmdit": {"blocks": {"to_q": {"kernel": RNG.standard_normal((2, 4, 4), dtype=np.float32)}}},
}


def abstract(trees=TREES):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def refused(call, *words: str) -> None:
    with pytest.raises(RefineError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", {"vae": {"z_dim": 4}}, TREES)
    return tmp_path / "model"


def test_round_trip(folder):
    assert read_manifest(folder) == {"format": checkpoint.FORMAT, "vae": {"z_dim": 4}}
    jax.tree.map(np.testing.assert_array_equal, load_weights(folder, abstract()), TREES)
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, WEIGHTS]
    # One network of several, and networks that are not asked for are left alone.
    only = load_weights(folder, {"vae": abstract()["vae"]})
    assert set(only) == {"vae"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    save_model(tmp_path, {}, TREES, dtype=dtype)
    stored = load_weights(tmp_path, abstract(), dtype=None)
    rounded = jax.tree.map(lambda x: x.astype(dtype), TREES)
    assert stored["vae"]["conv"]["bias"].dtype == np.dtype(dtype)
    jax.tree.map(np.testing.assert_array_equal, stored, rounded)
    back = load_weights(tmp_path, abstract())
    assert back["vae"]["conv"]["bias"].dtype == np.float32
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), back, rounded)
    assert load_weights(tmp_path, abstract(), dtype="bfloat16")["vae"]["conv"]["bias"].dtype == ml_dtypes.bfloat16


def test_only_floating_numbers_are_weights(tmp_path, monkeypatch):
    odd = {**TREES, "mmdit": jax.tree.map(lambda x: (9 * x).astype(np.int8), TREES["mmdit"])}
    for large in (checkpoint.LARGE, 0):
        monkeypatch.setattr(checkpoint, "LARGE", large)
        save_model(tmp_path / str(large), {}, odd)
        refused(lambda: load_weights(tmp_path / str(large), abstract()), "to_q/kernel is int8")  # noqa: B023


def test_a_small_model_takes_the_place_of_a_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    save_model(tmp_path, {}, jax.tree.map(lambda x: 0 * x, TREES))
    monkeypatch.undo()
    save_model(tmp_path, {}, TREES)
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path, abstract()), TREES)


def test_a_large_model_is_cut_by_blocks(tmp_path, monkeypatch):
    """So that `convert.export`, which takes one after the other, reads none twice."""
    import tensorstore

    monkeypatch.setattr(checkpoint, "LARGE", 0)
    kernel = jax.numpy.zeros((6, 1024, 520))
    save_model(tmp_path, {}, {"mmdit": {"blocks": {"kernel": kernel, "scale": jax.numpy.zeros((6, 8))}}})
    save_model(tmp_path / "number", {}, {"mmdit": {"number": jax.numpy.zeros(())}})  # has no axis
    base = {"driver": "file", "path": f"{tmp_path / checkpoint.ORBAX / 'mmdit'}/"}
    store = {"driver": "ocdbt", "base": base, "path": "blocks.kernel/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
    assert array.shape == kernel.shape and array.chunk_layout.read_chunk.shape[0] == 1


def test_stored_sizes(tmp_path, monkeypatch):
    """Of both forms of a model folder, from the headers."""
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in TREES.items()}
    save_model(tmp_path / "file", {}, TREES, dtype="bfloat16")
    assert checkpoint.stored_sizes(tmp_path / "file") == {"bfloat16": 2 * sum(sizes.values())}
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    mixed = {**TREES, "mmdit": jax.tree.map(lambda x: x.astype("bfloat16"), TREES["mmdit"])}
    save_model(tmp_path / "parts", {}, mixed)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "parts", "parts"):
        assert checkpoint.stored_sizes(folder) == {"bfloat16": 2 * sizes["mmdit"], "float32": 4 * sizes["vae"]}
        assert load_weights(folder, abstract())["mmdit"]["blocks"]["to_q"]["kernel"].shape == (2, 4, 4)
    refused(lambda: checkpoint.stored_sizes(tmp_path / "none"), "none", "incomplete")


def test_jax_arrays_are_written_like_numpy(tmp_path):
    save_model(tmp_path, {}, jax.tree.map(jax.numpy.asarray, TREES))
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path, abstract()), TREES)


def test_every_offender_is_listed(folder):
    wanted = abstract()
    wanted["vae"]["conv"]["bias"] = jax.ShapeDtypeStruct((5,), np.float32)
    wanted["vae"]["extra"] = {"scale": jax.ShapeDtypeStruct((2,), np.float32)}
    del wanted["mmdit"]["blocks"]["to_q"]["kernel"]
    wanted["mmdit"]["blocks"]["to_k"] = {"kernel": jax.ShapeDtypeStruct((2, 4, 4), np.float32)}
    refused(
        lambda: load_weights(folder, wanted),
        WEIGHTS,
        "missing vae/extra/scale",
        "missing mmdit/blocks/to_k/kernel",
        "unexpected mmdit/blocks/to_q/kernel",
        "vae/conv/bias has shape (4,), expected (5,)",
    )


def test_damaged_folders(folder, tmp_path):
    load = lambda: load_weights(folder, abstract())
    whole = (folder / WEIGHTS).read_bytes()
    for part in (b"", whole[:4], whole[:40], whole[: len(whole) - 7], b"\xff" * 100):
        (folder / WEIGHTS).write_bytes(part)
        refused(load, str(folder), "cannot be read")
    (folder / WEIGHTS).unlink()
    refused(load, str(folder), "no such file")
    (folder / WEIGHTS).mkdir()
    refused(load, str(folder), "cannot be read")
    refused(lambda: read_manifest(tmp_path), str(tmp_path), MANIFEST)
    refused(lambda: read_manifest(tmp_path / "nowhere"), "nowhere", "tiny")
    for text in ("{", "[1, 2]", '"model"', "null", '{"format": 99}', "{}", "[" * 100_000):
        (folder / MANIFEST).write_text(text)
        refused(lambda: read_manifest(folder), MANIFEST, "write the model folder again")
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    refused(lambda: read_manifest(folder), MANIFEST)


@pytest.mark.parametrize("stop_at", [WEIGHTS, MANIFEST])
def test_a_half_written_folder_is_no_model(folder, monkeypatch, stop_at):
    """Whenever writing stops, over an older model too, the folder cannot be loaded."""
    replace = os.replace

    def stop(source, target):
        if str(target).endswith(stop_at):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError):
        save_model(folder, {"vae": {"z_dim": 5}}, TREES)
    refused(lambda: read_manifest(folder), MANIFEST)
    monkeypatch.undo()
    save_model(folder, {"vae": {"z_dim": 5}}, TREES)
    assert read_manifest(folder)["vae"] == {"z_dim": 5}
    assert sorted(p.name for p in folder.iterdir() if not p.name.endswith(".partial")) == [MANIFEST, WEIGHTS]


def test_text_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.json"
    checkpoint.write_text(path, json.dumps([1]))
    checkpoint.write_text(path, json.dumps([2]))
    assert json.loads(path.read_text()) == [2] and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# ------------------------------------------------------------------------------------------------------- training runs


def test_state_and_position(tmp_path):
    state = {"w": jax.numpy.arange(6.0).reshape(2, 3), "step": jax.numpy.int32(7)}
    manager = checkpoint.manager(tmp_path, keep=2, save_every=1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    assert checkpoint.restore_state(manager, shapes) is None
    for step in (1, 2, 3):
        checkpoint.save_state(manager, step, state | {"step": jax.numpy.int32(step)}, {"iterator": {"step": step}})
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 3]
    restored, data = checkpoint.restore_state(manager, shapes)
    assert data == {"iterator": {"step": 3}, "processes": 1} and int(restored["step"]) == 3
    np.testing.assert_array_equal(restored["w"], state["w"])

    other = {"w": jax.ShapeDtypeStruct((4, 3), np.float32, sharding=state["w"].sharding)}
    for wrong in (shapes | other, other, shapes | {"more": shapes["w"]}):
        refused(lambda wrong=wrong: checkpoint.restore_state(manager, wrong), "checkpoint 3", "does not fit")
    manager.close()


def test_another_number_of_processes_is_said(tmp_path):
    state = {"w": jax.numpy.ones(3)}
    manager = checkpoint.manager(tmp_path)
    checkpoint.save_state(manager, 1, state, {"iterator": {}, "processes": 2}, force=True)
    manager.wait_until_finished()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored, data = checkpoint.restore_state(manager, shapes)
    np.testing.assert_array_equal(restored["w"], state["w"])
    (line,) = checkpoint.changes(data, {"seed": 3})
    assert "resumed with 1 processes, saved by 2" in line and "unchanged" in line
    (line,) = checkpoint.changes({"processes": 1, "seed": 4, "data": {"path": "a"}}, {"seed": 4, "data": {"path": "b"}})
    assert "another data.path: unless it is the same dataset, the order of samples changes" in line
    saved = {"processes": 1, "seed": 4, "data": {"workers": 2, "buckets": [[1, 2]]}, "mesh": {"fsdp": 2}}
    assert checkpoint.changes(saved, {**saved, "data": {"workers": 0, "max_corrupt": 1, "buckets": ((1, 2),)}}) == []
    (line,) = checkpoint.changes(saved, {**saved, "mesh": {"fsdp": 1, "context": 2}})
    assert "saved on {'fsdp': 2}" in line and "unchanged" in line
    (line,) = checkpoint.changes(saved, {**saved, "data": {"workers": 2, "buckets": [[2, 1]]}})
    assert "another data.buckets: the order" in line
    saved["settings"] = {"lora": {"alpha": 4.0, "rank": 2}, "sigma": {"shift": 1.0}, "init_from": "a", "keep": 2}
    now = lambda **changes: {**saved, "settings": {**saved["settings"], "prompt": "", **changes}}
    assert checkpoint.changes(saved, now(keep=3, pictures={"every": 2}, ema_ramp=True, scan=None)) == []
    assert checkpoint.changes(saved, now(ema_ramp=False)) == ["resumed with another ema_ramp: False, saved with True"]
    (line,) = checkpoint.changes(saved, now(vae_from="x"))
    assert "another vae_from" in line and "same model" in line
    assert checkpoint.changes(saved, now(sigma={"shift": 3.0}, init_from="b", steps=9)) == [
        "resumed with another init_from: 'b', saved with 'a'; it must be the same model",
        "resumed with another sigma.shift: 3.0, saved with 1.0",
        "resumed with another steps: 9, saved with None",
    ]
    for changes, words in (
        ({"lora": {"alpha": 400.0, "rank": 2}}, "lora.alpha: 400.0"),
        ({"prompt": "x"}, "prompt: 'x'"),
    ):
        refused(lambda: checkpoint.changes(saved, now(**changes)), f"resumed with another {words}", "new work folder")  # noqa: B023
    manager.close()


def test_a_large_model_is_written_in_parts(tmp_path, monkeypatch):
    """Beyond `LARGE` nothing is gathered: an orbax checkpoint a network, written again in the same place too."""
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    model = toy.model_config()
    for seed in (1, 2):
        variables = jax.tree.map(jax.numpy.asarray, toy.random_variables(model, seed))
        checkpoint.save_model(tmp_path, model.to_manifest(), variables)
    assert (tmp_path / checkpoint.ORBAX / "mmdit").is_dir() and not (tmp_path / checkpoint.WEIGHTS).exists()
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_weights(tmp_path, model.abstract()), variables)


def test_weights_are_as_readable_as_the_manifest(tmp_path):
    checkpoint.save_model(tmp_path, {}, {"vae": {"x": np.ones(3, np.float32)}})
    modes = {(tmp_path / name).stat().st_mode & 0o777 for name in (checkpoint.WEIGHTS, checkpoint.MANIFEST)}
    assert len(modes) == 1
