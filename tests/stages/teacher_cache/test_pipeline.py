"""Iterators in threads: order, bounds, errors and an early end."""

import threading
import time

import pytest
import torch
from tqdm import TMonitor

from distilcache.data.errors import UserError
from distilcache.stages.teacher_cache import calibration_runs, pipeline
from distilcache.stages.teacher_cache.pipeline import ahead, delayed
from tests.command_line import wait_until


def count(made, limit=1000):
    """Numbers, noted as they are made; notes its end too."""
    try:
        for number in range(limit):
            made.append(number)
            yield number
    finally:
        made.append("closed")


@pytest.mark.parametrize("limit", [0, 1, 50])
def test_the_same_items_in_order(limit):
    made = []
    assert list(ahead(count(made, limit), 3, "t")) == list(range(limit))
    assert list(delayed(count([], limit), 3)) == list(range(limit))
    assert made[-1] == "closed"


def settled(made, length):
    """Length of a list that a thread adds to: so long at least, and some time after that."""
    wait_until(lambda: len(made) >= length)
    time.sleep(0.05)
    return len(made)


def test_no_more_than_the_depth_lie_ready():
    made = []
    items = ahead(count(made), 3, "t")
    assert next(items) == 0
    # One taken, three that lie ready, one in the maker's hand.
    assert settled(made, 5) == 5
    assert next(items) == 1
    assert settled(made, 6) == 6
    items.close()


@pytest.mark.parametrize("wrap", [lambda x: ahead(x, 3, "t"), lambda x: delayed(x, 3)])
def test_closing_ends_the_maker(wrap):
    made = []
    threads = set(threading.enumerate())
    items = wrap(count(made))
    next(items)
    items.close()
    assert made[-1] == "closed"
    assert set(threading.enumerate()) <= threads


def test_errors_come_through_a_chain_after_what_was_made_before():
    def fails():
        yield 1
        yield 2
        raise OSError("no more")

    threads = set(threading.enumerate())
    items = ahead(ahead(fails(), 1, "inner"), 1, "outer")
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="no more"):
        next(items)
    assert set(threading.enumerate()) <= threads


def in_a_thread(monkeypatch):
    """As beside a GPU: the teacher in a thread of its own, several encoders."""
    monkeypatch.setattr(pipeline, "delayed", lambda items, depth: ahead(items, 3, "teacher"))
    monkeypatch.setitem(pipeline.ENCODERS, "cpu", 3)


def test_a_teacher_in_its_own_thread_writes_the_same_cache(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, monkeypatch
):
    whole = small_cache(rounds=2, hidden_layers=(1, -1))
    in_a_thread(monkeypatch)
    settings = {"rounds": 2, "hidden_layers": (1, -1)}
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **settings)
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("step", ["prepare_block", "block_signals", "encode", "write_shard"])
@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_in_any_step_surfaces_and_leaves_no_thread(
    build_cache_in, small_corpus, small_teacher, tmp_path, monkeypatch, step, threaded
):
    if threaded:
        in_a_thread(monkeypatch)
    original, calls = getattr(pipeline, step), []

    def fails(*args):
        calls.append(args)
        if len(calls) >= 2:  # in several threads
            raise UserError(f"teacher: {step} must work, got a failure")
        return original(*args)

    threads = set(threading.enumerate())
    monkeypatch.setattr(pipeline, step, fails)
    out = tmp_path / "c"
    with pytest.raises(UserError, match=f"{step} must work"):
        build_cache_in(out, small_corpus(), small_teacher, blocks_per_shard=1)
    left = set(threading.enumerate()) - threads
    assert all(isinstance(thread, TMonitor) for thread in left)  # one stays where tqdm was used
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob(".*"))
    monkeypatch.setattr(pipeline, step, original)
    build_cache_in(out, small_corpus(), small_teacher, blocks_per_shard=1)
    assert (out / "manifest.json").exists()


FULL = torch.OutOfMemoryError("CUDA out of memory")
NO_CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(x)`")


def short_of_memory(monkeypatch, room, error=FULL):
    """A device on which a batch of more tokens than ``room`` finds no memory."""

    def limited(original):
        def run(teacher, inputs, *rest):
            if max(batch.ids_BL.numel() for batch in inputs.batches) > room:
                raise error
            return original(teacher, inputs, *rest)

        return run

    monkeypatch.setattr(pipeline, "block_signals", limited(pipeline.block_signals))
    monkeypatch.setattr(calibration_runs, "block_states", limited(calibration_runs.block_states))


@pytest.mark.parametrize("error", [FULL, NO_CUBLAS], ids=["torch", "cublas"])
def test_out_of_memory_goes_on_with_smaller_batches(
    small_cache,
    build_cache_in,
    small_corpus,
    small_teacher,
    tmp_path,
    tree,
    monkeypatch,
    capsys,
    error,
):
    """In the calibration of each of two layers and of the relations, and in the blocks."""
    stored = {"rounds": 2, "hidden_layers": (1, -1), "relation_layer": -1}
    whole = small_cache(**stored)
    short_of_memory(monkeypatch, 40, error)
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **stored, batch_tokens=128)
    assert tree(out) == tree(whole)
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert [line.split("=")[1].split()[0] for line in said] == 4 * ["64", "32"]


def test_other_errors_of_a_device_pass_and_calibration_may_find_no_room(
    build_cache_in, small_corpus, small_teacher, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise NO_CUBLAS

    with monkeypatch.context() as patch:
        short_of_memory(patch, 8, RuntimeError("CUDA error: an illegal address"))
        with pytest.raises(RuntimeError, match="illegal address"):
            build_cache_in(tmp_path / "a", small_corpus(), small_teacher)
    monkeypatch.setattr(calibration_runs, "calibrate", full)
    with pytest.raises(UserError, match="room for it and its .* CPU .--set device=cpu.$"):
        build_cache_in(tmp_path / "b", small_corpus(), small_teacher)


def test_a_device_without_room_for_one_sequence(
    build_cache_in, small_corpus, small_teacher, tmp_path, monkeypatch
):
    short_of_memory(monkeypatch, 8)
    with pytest.raises(UserError, match="device must have room for one sequence of 16 tokens"):
        build_cache_in(tmp_path / "c", small_corpus(), small_teacher)
    assert not list((tmp_path / "c").glob("shards/*/*"))
