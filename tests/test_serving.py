"""Rows, buckets and the scheduler, with doors that compute nothing."""

import dataclasses
import json
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from refine_jax import batch, executables, parallel, scheduling, serving
from refine_jax.errors import RefineError
from refine_jax.manifest import Refused, Request
from refine_jax.refine import ASPECTS, fitted, grown
from refine_jax.scheduling import FAILED, REFUSED, Scheduler


@given(count=st.integers(1, 64), ways=st.integers(1, 12))
def test_programs_have_no_more_rows_than_they_must(count, ways):
    """Powers of two a part of the mesh; of the most rows that fit no more."""
    door = SimpleNamespace(batch_size=None, _ways=ways)
    rows = serving.Door.rows_of(door, count)
    assert rows % ways == 0 and count <= rows < max(2 * count + ways, 2 * ways)
    assert serving.Door.rows_of(door, rows) == rows


class PlainDoor:
    """Its rows are numbers, their results too; `bad` buckets fail, and the numbers `black` have no result."""

    def __init__(self, batch_size: int, slow: float = 0.0, bad: tuple = (), black: tuple = ()):
        self.batch_size, self.slow, self.bad, self.black = batch_size, slow, bad, black
        self.programs = executables.Store()
        self.launched: list[tuple] = []

    def read(self, rows: list, pixels: int = 1, broken: str = "", torn: bool = False) -> serving.Job:
        time.sleep(self.slow * random.random())
        if broken:
            raise RefineError(broken)
        made = tuple(SimpleNamespace(bucket=serving.Bucket(bucket, (1,)), value=value) for bucket, value in rows)
        return serving.Job(made, (lambda results: 1 // 0) if torn else sum, pixels)

    def launch(self, bucket, rows):
        time.sleep(self.slow * random.random())
        self.launched.append((bucket.base, tuple(row.value for row in rows)))
        if bucket.base in self.bad:
            raise RuntimeError("device lost") if bucket.base == "lost" else MemoryError("too large")
        return np.array([row.value for row in rows])

    def fetch(self, launched, count):
        return [RefineError("result: not finite") if value in self.black else value for value in launched]

    def rows_of(self, count):
        return self.batch_size


def run(
    requests: list, batch_size: int = 4, workers: int = 2, streams: int = 1, **door
) -> tuple[dict, dict, PlainDoor, Scheduler]:
    made = PlainDoor(batch_size, **door)
    done, refused, lock = {}, {}, threading.Lock()

    def finish(request, picture):
        with lock:
            assert request.id not in done
            done[request.id] = picture

    scheduler = Scheduler(
        {"refine": lambda: made},
        finish,
        lambda request, status, reason: refused.__setitem__(request.id, (status, reason)),
        batch_size=batch_size,
        workers=workers,
        streams=streams,
    )
    scheduler.run(iter(requests))
    return done, refused, made, scheduler


def request(index: int, **arguments) -> Request:
    return Request(index, index + 1, str(index), "refine", arguments, "")


REQUESTS = st.lists(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 99)), max_size=6).map(
        lambda rows: dict(rows=rows, pixels=len(rows) * 10_000_000)
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(asked=REQUESTS, batch_size=st.integers(1, 6), workers=st.integers(1, 4), streams=st.integers(1, 3))
def test_every_request_is_answered_once_whatever_the_timing(asked, batch_size, workers, streams):
    requests = [request(k, **arguments) for k, arguments in enumerate(asked)]
    done, refused, door, scheduler = run(requests, batch_size, workers, streams, slow=0.002)
    assert done == {str(k): sum(value for _, value in arguments["rows"]) for k, arguments in enumerate(asked)}
    assert not refused and all(1 <= len(rows) <= batch_size for _, rows in door.launched)
    assert scheduler.summary.rows == sum(len(arguments["rows"]) for arguments in asked)
    # Processes that share the chips of one model form the same batches, however fast each of them reads.
    assert sorted(run(requests, batch_size, 1)[2].launched) == sorted(door.launched)
    if streams == 1:
        assert run(requests, batch_size, 1)[2].launched == door.launched


def test_pictures_that_wait_have_a_bound():
    """Rows of a rare bucket do not wait for ever for others while the memory fills."""
    requests = [request(k, rows=[(k, 1)], pixels=scheduling._PIXELS // 3) for k in range(9)]
    _, _, door, _ = run(requests, batch_size=4)
    assert [base for base, _ in door.launched] == list(range(9)), "the oldest goes first"


@pytest.mark.parametrize(("share", "most"), [(2, 2 + 2 * 2 + 1), (1000, 2 * 16)])
def test_decoded_pictures_that_wait_have_a_bound(share, most):
    """As many as two batches are decoded ahead, but fewer large ones: those that fill the memory, and those at work."""
    asked = 200
    requests = [request(k, rows=[(k % 3, 1)], pixels=scheduling._PIXELS // share) for k in range(asked)]
    door = PlainDoor(16)
    read, ahead = [], []
    decode, door.read = door.read, lambda **arguments: (read.append(1), decode(**arguments))[1]
    scheduler = Scheduler({"refine": lambda: door}, lambda *_: None, lambda *_: None, batch_size=16, workers=2)
    add = scheduler._add

    def watched(task):
        time.sleep(0.001)  # the decoders get ahead
        ahead.append(len(read) - len(ahead))
        add(task)

    scheduler._add = watched
    scheduler.run(iter(requests))
    assert scheduler.summary.rows == asked == len(ahead)
    assert max(ahead) <= most + 1 and (share == 2 or max(ahead) > 10)


def test_what_is_wrong_with_one_request_is_its_own():
    requests = [request(k, rows=[("a", k)]) for k in range(6)]
    requests[2] = request(2, rows=[], broken="no such file")
    requests[4] = Refused(4, 5, "4", "line 5: no JSON")
    requests[5] = request(5, nonsense=1)
    done, refused, _, _ = run(requests)
    assert set(done) == {"0", "1", "3"}
    assert refused["2"] == (REFUSED, "no such file") and refused["4"] == (
        REFUSED,
        "line 5: no JSON",
    )
    assert refused["5"][0] == FAILED and "nonsense" in refused["5"][1]


def test_a_batch_that_fails_takes_its_requests_along_and_no_others():
    requests = [request(k, rows=[("a", k), ("bad" if k == 3 else "b", k)]) for k in range(8)]
    done, refused, _, _ = run(requests, bad=("bad",))
    assert set(done) == {str(k) for k in range(8)} - {"3"}
    assert list(refused) == ["3"] and refused["3"][0] == FAILED and "too large" in refused["3"][1]


def test_a_row_without_a_result_hinders_no_neighbour():
    """Nor does it end the run, however many batches have one; a whole batch of them is one that failed."""
    requests = [request(k, rows=[("x", 2 * k), ("x", 2 * k + 1)]) for k in range(20)]
    done, refused, _, _ = run(requests, black=(0, 7, 18, 19, 39))
    assert set(refused) == {"0", "3", "9", "19"} and set(done) == {str(k) for k in range(20)} - set(refused)
    assert set(refused.values()) == {(FAILED, "result: not finite")}
    with pytest.raises(RefineError, match="batches in a row failed .result: not finite"):
        run([request(k, rows=[("x", k)]) for k in range(40)], black=tuple(range(40)))


def test_a_device_that_is_lost_ends_the_run():
    with pytest.raises(RefineError, match="3 batches in a row failed .*device lost.*run again"):
        run([request(k, rows=[("lost", k)]) for k in range(40)], batch_size=1, bad=("lost",))
    buckets = [f"large {k}" for k in range(5)]
    with pytest.raises(RefineError, match="3 batches in a row failed .*too large.*smaller batch"):
        run([request(k, rows=[(buckets[k % 5], k)]) for k in range(40)], batch_size=1, bad=buckets)


def test_a_bucket_that_is_too_large_hinders_no_other_however_often_it_comes():
    requests = [request(k, rows=[("a" if k > 20 else "large", k)]) for k in range(30)]
    done, refused, _, _ = run(requests, batch_size=2, bad=("large",))
    assert set(done) == {str(k) for k in range(21, 30)} and len(refused) == 21
    assert {status for status, _ in refused.values()} == {FAILED}


def test_a_picture_that_cannot_be_put_together_is_its_requests_own():
    done, refused, _, _ = run([request(k, rows=[("a", k)], torn=k == 2) for k in range(6)])
    assert set(done) == {"0", "1", "3", "4", "5"} and refused["2"][0] == FAILED
    assert "ZeroDivisionError" in refused["2"][1]


@pytest.mark.parametrize("where", ["launch", "fetch"])
def test_a_failure_that_cannot_be_recorded_ends_the_run(where):
    def refuse(request, status, reason):
        raise RefineError("journal: cannot be written (No space left on device)")

    door = PlainDoor(2)
    setattr(door, where, lambda *_: 1 // 0)
    scheduler = Scheduler({"refine": lambda: door}, lambda *_: None, refuse, batch_size=2, workers=2, streams=2)
    with pytest.raises(RefineError, match="No space left"):
        scheduler.run(request(k, rows=[("a", k)]) for k in range(100))


def test_processes_of_one_model_stop_behind_the_same_batch():
    """Each as a scheduler of its own; whoever asks waits for the other, as in a collective."""
    meeting, told, launched, schedulers = threading.Barrier(2, timeout=20), [False, False], [[], []], []
    plans = ["", ""]

    def agreement(number: int):
        def agree(stop: bool, plan: str | None) -> bool:
            told[number], plans[number] = stop, plan
            meeting.wait()
            found = any(told)
            assert found or plans[0] == plans[1] != ""
            meeting.wait()
            return found

        return agree

    for number in range(2):
        door = PlainDoor(2, slow=0.005)
        door.launched = launched[number]
        make = dict(batch_size=2, workers=1, agree=agreement(number))
        schedulers.append(Scheduler({"refine": lambda d=door: d}, lambda *_: None, lambda *_: None, **make))
    requests = lambda: (request(k, rows=[("a", k)]) for k in range(400))
    threads = [threading.Thread(target=scheduler.run, args=(requests(),)) for scheduler in schedulers]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while len(launched[1]) < 5:
        assert time.monotonic() < end
        time.sleep(0.001)
    schedulers[1].stop()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert launched[0] == launched[1] and 5 <= len(launched[0]) < 200
    assert all(scheduler.stopped for scheduler in schedulers)


def test_a_full_disk_ends_the_run():
    def finish(request, picture):
        raise RefineError("result: cannot be written (No space left on device)")

    door = PlainDoor(2)
    scheduler = Scheduler({"refine": lambda: door}, finish, lambda *_: None, batch_size=2, workers=1)
    with pytest.raises(RefineError, match="No space left"):
        scheduler.run(request(k, rows=[("a", k)]) for k in range(100))
    assert len(door.launched) < 50


@given(
    box=st.tuples(*[st.integers(0, 500)] * 2, *[st.integers(1, 400)] * 2),
    spare=st.tuples(*[st.integers(0, 300)] * 2),
    aspect=st.sampled_from(ASPECTS),
)
def test_a_grown_box_holds_the_box_and_stays_in_the_picture(box, spare, aspect):
    x, y, width, height = box
    size = (x + width + spare[0], y + height + spare[1])
    x1, y1, x2, y2 = grown(np.array([x, y, x + width, y + height]), aspect, size).tolist()
    assert 0 <= x1 <= x < x + width <= x2 <= size[0] and 0 <= y1 <= y < y + height <= y2 <= size[1]
    if x2 - x1 < size[0] and y2 - y1 < size[1]:  # nothing was in the way
        assert abs((x2 - x1) - aspect * (y2 - y1)) <= max(1, aspect)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 2000), st.integers(1, 2000), st.integers(20, 2000), st.integers(20, 2000)),
    st.tuples(st.integers(0, 500), st.integers(0, 500)),
)
def test_what_cannot_grow_is_hardly_stretched(box, spare):
    x, y, width, height = box
    size = (x + width + spare[0], y + height + spare[1])
    (x1, y1, x2, y2), aspect = fitted(np.array([x, y, x + width, y + height]), ASPECTS, size)
    assert 0 <= x1 <= x < x + width <= x2 <= size[0] and 0 <= y1 <= y < y + height <= y2 <= size[1]
    assert abs(np.log(aspect * (y2 - y1) / (x2 - x1))) < np.log(1.051)
    steps = 8 * np.log2(aspect)
    assert aspect in ASPECTS or abs(steps - round(steps)) < 1e-9


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_the_length_of_a_union(pairs):
    intervals = [(float(start), float(start + length)) for start, length in pairs]
    covered = {second for start, length in pairs for second in range(start, start + length)}
    assert scheduling._measure(intervals) == len(covered)


def test_waiting_for_the_compiler_is_not_idleness():
    clock = scheduling._Clock()
    clock.working += [(10.0, 12.0), (11.0, 14.0), (20.0, 22.0), (24.0, 25.0)]
    clock.preparing += [(3.0, 10.0), (13.0, 19.0)]  # the first before anything ran, the second partly behind a batch
    assert clock.read() == (15.0 - 5.0, 4.0 + 2.0 + 1.0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_a_joined_bucket_holds_all(found):
    buckets = [serving.Bucket("base", (a, b)) for _, a, b in found]
    joined = serving.join(buckets)
    assert all(mine <= whole for bucket in buckets for mine, whole in zip(bucket.sizes, joined.sizes))
    assert joined in [serving.Bucket("base", (a, b)) for a in range(10) for b in range(10)]


def test_a_later_start_has_the_last_word(tmp_path):
    """Also where journals that stayed empty are gone."""
    first = [batch.Journal(tmp_path, process) for process in range(4)]
    first[3].add(dict(id="r", status="failed"))
    for journal in first:
        journal.close()
    second = batch.Journal(tmp_path)
    assert second.entries["r"]["status"] == "failed"
    second.add(dict(id="r", status="done"))
    second.close()
    assert batch.Journal(tmp_path).entries["r"]["status"] == "done"


def test_half_a_line_of_a_journal_does_not_count(tmp_path):
    first = batch.Journal(tmp_path)
    first.add(dict(id="a", status="done"))
    first.add(dict(id="b", status="failed"))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + json.dumps(dict(id="c", status="done")))
    second = batch.Journal(tmp_path)
    assert set(second.entries) == {"a", "b"}
    second.add(dict(id="b", status="done"))
    second.close()
    third = batch.Journal(tmp_path)
    assert third.entries["b"]["status"] == "done" and len(list(tmp_path.iterdir())) == 3
    third.close()
    assert len(list(tmp_path.iterdir())) == 2, "an empty one is not left behind"


def test_programs_are_kept_by_what_they_are():
    calls = []

    @parallel.program("factor")
    def scaled(x, *, factor):
        calls.append(factor)
        return x * factor

    store = executables.Store(most=2)
    for x, factor in ((np.ones(3), 2), (np.zeros(3), 2), (np.ones(4), 2), (np.ones(4), 3), (np.ones(4), 3)):
        np.testing.assert_array_equal(store.call(scaled, x, factor=factor), x * factor)
    assert store.counts.compiled == len(calls) == 3
    store.call(scaled, np.ones(3), factor=2)  # was the least recently used
    assert store.counts.compiled == 4


def test_weights_that_come_later_are_read_once_and_not_for_a_dry_run():
    read = []
    weights = executables.Later(np.ones(2, np.float32), lambda: read.append(1) or np.full(2, 5.0, np.float32))

    @parallel.program()
    def doubled(x):
        return 2 * x

    dry = executables.Store(dry=True)
    assert np.asarray(dry.call(doubled, weights)).tolist() == [0, 0] and dry.counts.compiled == 1 and not read
    store = executables.Store()
    assert [np.asarray(store.call(doubled, weights)).tolist() for _ in range(2)] == [[10, 10]] * 2 and read == [1]


@pytest.mark.parametrize("side, ways, most", [(64, 1, 64), (256, 1, 16), (1024, 1, 1), (1408, 1, 1), (1024, 4, 4)])
def test_rows_that_nobody_chose(side, ways, most):
    """One picture of the released models' size on each device that has rows of its own, more of smaller ones."""
    mesh = AbstractMesh((1, 1, ways, 2, 1), parallel.MESH_AXES) if ways > 1 else None
    model = dataclasses.replace(toy.model_config(), vae_area=side * side)
    door = serving.Door(model, {}, None, mesh=mesh)
    assert door.most_rows == most
    assert [door.rows_of(count) for count in (1, 3)] == [max(1, ways), 4]
    assert serving.Door(model, {}, None, batch_size=3).most_rows == 3
