"""Batches of a dataset: every record once an epoch, the same on any number of hosts and workers, damage counted."""

import dataclasses
import json
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
import records_toy as toy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refine_jax import focus
from refine_jax.data import loader, pixels, records, writer
from refine_jax.data.plan import Plan, enlarge
from refine_jax.errors import RefineError

BUCKETS = ((32, 48), (32, 32), (48, 32))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("loader") / "set", 30, 3)


@pytest.fixture
def folder(dataset, tmp_path):
    """A copy to damage."""
    return shutil.copytree(dataset.folder, tmp_path / "set")


def batches(dataset, seed=5, batch_size=4, buckets=BUCKETS, **how):
    return loader.record_batches(dataset, seed, batch_size, buckets, **how)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def numbers(batch) -> list[int]:
    """The records of a batch, by their instructions."""
    texts = [loader.decode_instruction(row) for row in batch["instruction"]]
    return [int(text.removeprefix("Refine the thing ").split()[0]) for text in texts]


# ---------------------------------------------------------------------------------------------------------------- plan


@st.composite
def indices(draw):
    """An index of up to 60 records of any shape, some without references."""
    count = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    width, height = rng.integers(8, 400, (2, count))
    x1, y1 = (rng.integers(0, side - 4) for side in (width, height))
    x2, y2 = rng.integers(x1 + 1, width + 1), rng.integers(y1 + 1, height + 1)
    has = rng.random(count) < draw(st.sampled_from([0.0, 0.1, 0.7, 1.0]))
    references = rng.integers(8, 400, (2, count)) * has
    return np.stack([width, height, x1, y1, x2, y2, *references, np.full(count, 9)], axis=1).astype(np.int32)


SIZES = st.tuples(st.integers(8, 64), st.integers(8, 64))


@settings(deadline=None, max_examples=60)
@given(
    index=indices(),
    batch=st.integers(1, 12),
    buckets=st.lists(SIZES, min_size=1, max_size=6, unique_by=lambda size: size[0] / size[1]),
    references=st.lists(SIZES, min_size=1, max_size=3, unique_by=lambda size: size[0] / size[1]),
    seed=st.integers(0, 2**40),
)
def test_every_record_once_an_epoch_but_for_the_last_batch_of_a_group(index, batch, buckets, references, seed):
    plan = Plan(index, seed, batch, buckets, references, 64.0)
    for epoch in range(2):
        seen: dict[int, set] = {}
        counts, batches_of = Counter(), Counter()
        for step in range(epoch * plan.steps, (epoch + 1) * plan.steps):
            group = plan.group(step)
            batches_of[group] += 1
            rows = [plan.record(step, row) for row in range(batch)]
            counts.update(rows)
            for number in rows:
                seen.setdefault(number, set()).add(group)
        assert set(counts) == set(range(len(index)))
        assert all(len(groups) == 1 for groups in seen.values())  # repeated in its own group only
        sizes = Counter(next(iter(groups)) for groups in seen.values())
        for group, size in sizes.items():
            assert batches_of[group] == -(-size // batch)  # no more batches than it takes
            repeats = [counts[number] for number, groups in seen.items() if group in groups]
            assert max(repeats) - min(repeats) <= 1  # the first of the epoch's order, one after the other
        for (crop, shown), _ in sizes.items():
            assert crop in buckets and shown in references


@settings(deadline=None, max_examples=40)
@given(index=indices(), batch=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_crop_goes_to_the_nearest_bucket_unless_too_few_do(index, batch, seed):
    plan = Plan(index, seed, batch, BUCKETS, BUCKETS, 30.0)
    crops = focus.focus_box(index[:, 2:6], index[:, 0], index[:, 1], 30.0)
    off = lambda number, bucket: abs(
        np.log((crops[number, 2] - crops[number, 0]) / (crops[number, 3] - crops[number, 1]) * bucket[0] / bucket[1])
    )
    nearest = [min(BUCKETS, key=lambda bucket: off(number, bucket)) for number in range(len(index))]
    wanted = Counter(nearest)
    for group, members in zip(plan.groups, plan.members(0)):
        for number in members:
            best = off(number, group[0]) <= off(number, nearest[number]) + 1e-12
            assert best or wanted[nearest[number]] < batch or min(wanted.values()) < batch
    kept = Counter(crop for (crop, _), members in zip(plan.groups, plan.members(0)) for _ in members)
    assert len(kept) == 1 or min(kept.values()) >= batch


def test_of_two_buckets_of_one_aspect_one_would_never_be_used():
    index = np.array([[64, 64, 1, 1, 9, 9, 0, 0, 3]], np.int32)
    for buckets, references in ((((32, 64), (64, 128)), BUCKETS), (BUCKETS, ((32, 32), (48, 48)))):
        with pytest.raises(RefineError, match="two have one aspect"):
            Plan(index, 0, 1, buckets, references, 64.0)


def test_epochs_differ_and_the_order_is_that_of_the_seed(dataset):
    order = lambda seed, epoch: np.concatenate(Plan(dataset.index, seed, 4, BUCKETS, BUCKETS, 64).members(epoch))
    assert sorted(order(0, 0)) == sorted(order(0, 1)) == list(range(30))
    assert not np.array_equal(order(0, 0), order(0, 1)) and not np.array_equal(order(0, 0), order(1, 0))
    # A recorded order: a new version of numpy, or of this code, must not change what a run sees after a restart.
    [members] = Plan(dataset.index, 7, 30, ((32, 32),), ((32, 32),), 64).members(3)
    assert members.tolist()[:6] == [26, 13, 18, 11, 22, 2]


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(4, 500), st.integers(4, 500), st.floats(0.1, 10.0))
def test_a_crop_grows_inside_the_picture_towards_the_aspect(data, width, height, ratio):
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    a1, b1, a2, b2 = enlarge((x1, y1, x2, y2), width, height, ratio)
    assert 0 <= a1 <= x1 and x2 <= a2 <= width and 0 <= b1 <= y1 and y2 <= b2 <= height
    assert (a1, a2) == (x1, x2) or (b1, b2) == (y1, y2)  # one direction only
    reached = abs((a2 - a1) - ratio * (b2 - b1)) <= max(1.0, ratio) / 2 + 1e-6
    full = (a2 - a1 == width) or (b2 - b1 == height)
    assert reached or full


# ------------------------------------------------------------------------------------------------------------- batches


def test_batches_have_the_promised_form_and_content(dataset):
    """Every row is the crop of its record as `refine` would look at it, at the size of its bucket."""
    run = batches(dataset, margin=200.0)
    seen = Counter()
    for step in range(run.plan.steps):
        batch = next(run)
        (height, width), shown = run.plan.group(step)
        assert (height, width) in BUCKETS and shown in BUCKETS
        assert batch["image"].shape == batch["target"].shape == (4, height, width, 3)
        assert batch["reference"].shape == (4, *shown, 3) and batch["mask"].shape == (4, height, width)
        assert all(batch[name].dtype == np.uint8 for name in ("image", "target", "mask", "reference", "instruction"))
        assert batch["has_reference"].dtype == np.bool_ and not batch["skipped"].any()
        for row, number in enumerate(numbers(batch)):
            seen[number] += 1
            image, target, mask, reference, text = toy.pair(number)
            box, _ = focus.mask_box(mask)
            crop = focus.focus_box(box, *mask.shape[::-1], margin=200.0)
            crop = enlarge(crop, *mask.shape[::-1], width / height)
            for name, whole in (("image", image), ("target", target)):
                assert np.array_equal(
                    batch[name][row], pixels.resize(Image.fromarray(whole).crop(crop), (height, width))
                )
            cut = Image.fromarray(mask).crop(crop).resize((width, height), Image.Resampling.NEAREST)
            assert np.array_equal(batch["mask"][row], cut) and set(np.unique(cut)) <= {0, 255}
            assert batch["has_reference"][row] == (reference is not None)
            if reference is None:
                assert not batch["reference"][row].any()
            else:
                assert np.array_equal(batch["reference"][row], pixels.resize(Image.fromarray(reference), shown))
            assert loader.decode_instruction(batch["instruction"][row]) == text
    assert set(seen) == set(range(30))


def test_resizing_is_that_of_refine_to_the_bit():
    noise = np.random.default_rng(1).integers(0, 256, (30, 200, 3), np.uint8)
    seen = jax.jit(lambda image: focus.resample(image, None, (64, 48), "lanczos", quantize=True))(noise)
    assert np.array_equal(pixels.resize(Image.fromarray(noise), (64, 48)), seen)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([(32, 96), (64, 64), (17, 40), (96, 32), (33, 35)]), st.integers(0, 2**32))
def test_a_part_resized_alone_is_that_part_of_the_whole(data, size, seed):
    """An image stored as the part that differs from the target comes out as if it were stored whole, to the bit."""
    rng = np.random.default_rng(seed)
    width, height = data.draw(st.integers(12, 200)), data.draw(st.integers(12, 200))
    span = lambda side: [int(v) for v in np.sort(rng.choice(side + 1, 2, replace=False))]
    (x1, x2), (y1, y2), (cx1, cx2), (cy1, cy2) = span(width), span(height), span(width), span(height)
    grey = data.draw(st.booleans())
    target = rng.integers(0, 256, (height, width) if grey else (height, width, 3), np.uint8)
    image = target.copy()
    image[y1:y2, x1:x2] ^= 255
    stored = writer.make_record(image, target, (x1, y1, x2, y2), "x")
    whole = dataclasses.replace(stored, image=writer.make_record(255 - image, image, (0, 0, 1, 1), "x").target)
    whole = dataclasses.replace(whole, image_box=None)
    crop = (cx1, cy1, cx2, cy2)
    for a, b in zip(pixels.image_and_target(stored, crop, size), pixels.image_and_target(whole, crop, size)):
        assert a.shape == (*size, 3) and np.array_equal(a, b)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_global_batch(dataset, hosts):
    whole = batches(dataset, batch_size=8)
    parts = [batches(dataset, batch_size=8, rows=rows) for rows in np.split(np.arange(8), hosts)]
    for _ in range(whole.plan.steps + 2):
        batch, shares = next(whole), [next(part) for part in parts]
        assert same(batch, {name: np.concatenate([share[name] for share in shares]) for name in batch})


def test_workers_make_the_same_batches_and_any_step_resumes(folder):
    """Also where a record is corrupt: what takes its place is part of the order."""
    dataset = _spoil(folder, 4)
    how = dict(margin_jitter=0.3, max_corrupt=1)
    plain = batches(dataset, **how)
    states, rows = [], []
    for _ in range(2 * plain.plan.steps):
        states.append(json.loads(json.dumps(plain.get_state())))
        rows.append(next(plain))
    for step in (0, 3, plain.plan.steps - 1, plain.plan.steps, len(rows) - 1):
        plain.set_state(states[step])
        assert all(same(next(plain), row) for row in rows[step : step + 2])
        assert same(next(batches(dataset, start=step, **how)), rows[step])
    assert any(row["skipped"].any() for row in rows)
    worked = batches(dataset, workers=2, **how)
    try:
        worked.set_state(states[3])
        assert all(same(next(worked), row) for row in rows[3 : plain.plan.steps + 2])
        assert worked.corrupt == plain.corrupt == {4}
    finally:
        worked.close()


def test_jitter_moves_the_margin_and_not_the_order(dataset):
    still, moved = batches(dataset), batches(dataset, margin_jitter=0.5)
    pairs = [(next(still), next(moved)) for _ in range(still.plan.steps)]
    assert all(np.array_equal(a["instruction"], b["instruction"]) for a, b in pairs)
    assert any(not np.array_equal(a["image"], b["image"]) for a, b in pairs)


def test_a_region_thinner_than_the_samples_stays_visible(tmp_path):
    height, width = 200, 300

    def make(number):
        mask = np.zeros((height, width), np.uint8)
        mask[41, 3:290] = 255
        picture = np.full((height, width, 3), 90, np.uint8)
        return writer.make_record(picture, picture, mask, "Refine the line")

    run = batches(writer.write_dataset(tmp_path / "set", make, 1, {}), batch_size=1, buckets=((16, 48),), margin=0.0)
    mask = next(run)["mask"][0]
    assert mask.any() and set(np.unique(mask)) == {0, 255}


def test_long_instructions_are_whole_or_cut_between_characters(tmp_path):
    text = "Verfeinere die Schrift „Straßenbahnhaltestelle“ " * 9
    picture = np.zeros((20, 20, 3), np.uint8)
    make = lambda number: writer.make_record(picture, picture, (2, 2, 9, 9), text)
    dataset = writer.write_dataset(tmp_path / "set", make, 1, {})
    whole = next(batches(dataset, batch_size=1))["instruction"][0]
    assert len(whole) == len(text.encode()) and loader.decode_instruction(whole) == text
    for width in range(12, 30):
        cut = loader.decode_instruction(next(batches(dataset, batch_size=1, instruction_bytes=width))["instruction"][0])
        assert text.startswith(cut) and width - 3 < len(cut.encode()) <= width


# -------------------------------------------------------------------------------------------------------------- damage


def _spoil(folder, *spoilt):
    """Damage the target of records of a copied dataset."""
    dataset = records.Dataset(folder)
    for number in spoilt:
        path, data = dataset.place(number)[0], dataset[number].target
        toy.damage(path, data)
    return records.Dataset(folder)


def test_a_corrupt_record_is_replaced_and_counted(dataset, folder):
    good, bad = batches(dataset), batches(_spoil(folder, 4, 17), max_corrupt=2)
    skipped = 0
    for step in range(good.plan.steps):
        a, b = next(good), next(bad)
        for row, number in enumerate(numbers(a)):
            if number in (4, 17):
                skipped += 1
                assert b["skipped"][row] >= 1 and numbers(b)[row] not in (4, 17)
                members = dict(zip(good.plan.groups, good.plan.members(0)))[good.plan.group(step)]
                assert numbers(b)[row] in members  # of the same group
            else:
                assert b["skipped"][row] == 0
                assert all(np.array_equal(a[name][row], b[name][row]) for name in a)
    assert skipped >= 2 and bad.corrupt == {4, 17}


def test_too_many_corrupt_records_stop_the_run_and_are_named(folder):
    spoilt = _spoil(folder, 4, 17)
    for limit in (0, 0.04, 1):  # of 30 records: none, one, one
        run = batches(spoilt, max_corrupt=limit)
        with pytest.raises(
            RefineError, match=r"corrupt records, data.max_corrupt allows.*: record \d: .*hash mismatch"
        ):
            for _ in range(run.plan.steps):
                next(run)
    run = batches(_spoil(folder, 12, *(n for n in range(30) if n not in (4, 12, 17))), max_corrupt=30)
    with pytest.raises(RefineError, match="records in a row cannot be used"):
        for _ in range(run.plan.steps):
            next(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_size=0), "batch_size 0"),
        (dict(batch_size=3, rows=(1, 3)), r"batch_size 3: has no rows \[1, 3\]"),
        (dict(buckets=()), r"data.buckets \(\)"),
        (dict(reference_buckets=((0, 3),)), "data.reference_buckets"),
        (dict(seed=-1), "seed -1"),
        (dict(margin=-1.0), "margin is -1"),
        (dict(margin_jitter=1.0), "data.margin_jitter 1.0"),
        (dict(max_corrupt=-1), "data.max_corrupt -1"),
    ],
)
def test_bad_settings_are_named_before_the_first_batch(dataset, settings, message):
    with pytest.raises(RefineError, match=message):
        batches(dataset, **settings)
