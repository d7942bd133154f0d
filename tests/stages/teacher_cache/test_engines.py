"""Which engine, what is a task, and how workers that may fail share the tasks."""
# ruff: noqa: F811

import contextlib
import errno
import json
import os
import time
import traceback
from collections import Counter, deque
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest

from distilcache.data.cache.shards import EncodedBlock, read_marker, shard_path, write_shard
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.masks.masking import MaskingConfig
from distilcache.data.storage.files import hash_of, temporary_of, unwritable
from distilcache.stages.teacher_cache import phases
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.config import CacheConfig, EngineConfig
from distilcache.stages.teacher_cache.engines import supervise as supervision
from distilcache.stages.teacher_cache.engines import worker
from distilcache.stages.teacher_cache.engines.shard_locks import ShardLocks
from distilcache.stages.teacher_cache.engines.supervise import supervise
from distilcache.stages.teacher_cache.task import ShardTask, ShardTasks
from distilcache.stages.workers.pool import Reply
from tests.stages.teacher_cache.engines_support import (
    SETTINGS,
    uninterrupted,  # noqa: F401
)


def test_tasks_are_numbered_through_rounds_and_shards():
    tasks = ShardTasks(7, 3, 2)
    assert list(tasks) == [
        ShardTask(r, s, 3 * s, min(3 * s + 3, 7)) for r in range(2) for s in range(3)
    ]
    assert len(tasks) == 6
    with pytest.raises(IndexError):
        tasks[6]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Sixty shards that take no time; the pipeline takes up to three before it needs them."""
    runs, made, tries, failures, errors = [], [], Counter(), {}, [ValueError("no")]

    def run_shards(job, tasks, progress):
        runs.append([])
        ahead = deque()
        for task in chain(tasks, [None] * 3):
            ahead.append(task)
            if len(ahead) > 3 and (first := ahead.popleft()):
                runs[-1].append(first.shard)
                tries[first.shard] += 1
                if tries[first.shard] <= failures.get(first.shard, 0):
                    raise errors[-1]
                made.append(first.shard)
                yield {}

    def done_marker(out, task, identity):
        return {"blocks": [{"tokens": 8}]} if task.shard in made else None

    monkeypatch.setattr(worker, "run_shards", run_shards)
    monkeypatch.setattr(worker, "done_marker", done_marker)
    monkeypatch.setattr(worker, "tasks_of", lambda corpus, config: ShardTasks(60, 1, 1))
    monkeypatch.setattr(worker, "STILL_SECONDS", 0.0)
    with closing(ShardLocks(tmp_path)) as locks:
        job = SimpleNamespace(out=tmp_path, corpus=None, config=None, identity="")
        maker = worker._ShardMaker(job, locks, None)
        yield SimpleNamespace(
            locks=locks,
            make=maker.make_all,
            made=made,
            tries=tries,
            failures=failures,
            runs=runs,
            errors=errors,
        )


def test_shards_are_made_from_a_place_once_around(shards):
    shards.make(0.5)
    assert shards.made == [*range(30, 60), *range(30)]


def test_only_the_first_shard_is_blamed_and_then_tried_by_itself(shards):
    shards.failures[30] = 2
    shards.make(0.0)
    assert sorted(shards.made) == list(range(60))
    assert shards.tries == Counter(dict.fromkeys(range(60), 1) | {30: 3})
    runs = [run for run in shards.runs if run]
    assert runs == [list(range(31)), list(range(31, 60)), [30], [30]]


def test_a_worker_that_ends_leaves_one_attempt_behind(shards):
    shards.failures[7] = 1
    seen = []
    note = shards.locks.set_failures
    shards.locks.set_failures = lambda *record: (seen.append(record), note(*record))
    shards.make(0.0)
    ended = [(number, 1, "its worker ended") for number in range(60)]
    again = [(7, 1, "ValueError: no"), (7, 2, "its worker ended")]
    assert sorted(seen) == sorted(ended + again)
    assert seen[7:9] == [(7, 1, "its worker ended"), (7, 1, "ValueError: no")]


def test_shards_that_fail_again_and_again_are_listed_in_order(shards):
    shards.failures |= {7: 9, 3: 9}
    shards.locks.set_failures(5, 8, "its worker ended")
    shards.locks.set_failures(6, 7, "its worker ended")
    shards.locks.set_failures(8, 3, "ValueError: no")
    with pytest.raises(UserError) as caught:
        shards.make(0.0)
    text = str(caught.value)
    assert "got 4 that failed 3 times or more: round 0 shard 3: ValueError: no; " in text
    assert "round 0 shard 5: its worker ended; round 0 shard 7: ValueError: no; round" in text
    assert [shards.tries[number] for number in (3, 5, 6, 7, 8)] == [3, 0, 1, 3, 0]
    assert len(shards.made) == 56


def test_where_shard_after_shard_fails_it_is_not_for_the_shards(shards):
    shards.failures |= dict.fromkeys(range(10, 60), 1)
    with pytest.raises(ValueError, match="no"):
        shards.make(0.0)
    assert sum(shards.tries.values()) == 13


@pytest.mark.parametrize("before", [(0, ""), (1, "ValueError: no")])
def test_a_worker_that_is_stopped_has_not_failed(shards, before):
    """As by SIGTERM, where Slurm wants its machine for another job."""
    shards.failures[7] = 1
    shards.errors.append(KeyboardInterrupt())
    shards.locks.set_failures(7, *before)
    with pytest.raises(KeyboardInterrupt):
        shards.make(0.0)
    assert shards.locks.failures(7) == before
    assert shards.tries[7] == 1


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM"])
@pytest.mark.parametrize("of", [lambda error: error, lambda error: unwritable(Path("x"), error)])
def test_a_full_disk_and_rights_are_not_tried_again(shards, name, of):
    """Nor are they failures of the shard."""
    shards.failures[7] = 9
    shards.errors.append(of(OSError(getattr(errno, name), "no")))
    shards.locks.set_failures(7, 0, "")
    with pytest.raises(type(shards.errors[-1]), match="no"):
        shards.make(0.0)
    assert (shards.tries[7], shards.locks.failures(7)) == (1, (0, ""))


@pytest.mark.parametrize("name", ["ESTALE", "EIO", "ETIMEDOUT", "ENOTCONN", "EBUSY"])
@pytest.mark.parametrize("of", [lambda error: error, lambda error: unwritable(Path("x"), error)])
def test_a_fault_of_a_share_may_pass(shards, name, of):
    shards.failures[7] = 1
    shards.errors.append(of(OSError(getattr(errno, name), "no")))
    shards.make(0.0)
    assert shards.tries[7] == 2
    assert sorted(shards.made) == list(range(60))


def test_bad_input_is_no_failure_of_a_shard(shards):
    shards.failures[7] = 9
    shards.errors.append(UserError("no"))
    with pytest.raises(UserError, match="^no$"):
        shards.make(0.0)
    assert (shards.tries[7], shards.locks.failures(7)) == (1, (0, ""))


@pytest.mark.parametrize(("failures", "made"), [(2, 60), (9, 59)])
def test_lost_workers_are_no_failures_of_a_shard(shards, failures, made):
    """A machine that is taken away twice leaves the shard all its attempts."""
    shards.locks.set_failures(7, 2, "its worker ended")
    shards.failures[7] = failures
    with contextlib.suppress(UserError):
        shards.make(0.0)
    assert (shards.tries[7], len(shards.made)) == (3, made)


def test_without_locks_that_reach_others_workers_share_the_work(tmp_path, monkeypatch, capfd):
    """Four workers, three of which are soon done and find the long shard of the fourth unlocked."""
    monkeypatch.setattr(ShardLocks, "_lock", lambda *_: True)
    monkeypatch.setattr(worker, "STILL_SECONDS", 2.0)
    monkeypatch.setattr(worker, "tasks_of", lambda corpus, config: ShardTasks(8, 1, 1))
    job = SimpleNamespace(out=tmp_path, corpus=None, config=None, identity="abc")

    def run_shards(job, tasks, progress):
        for task in tasks:
            tar = shard_path(tmp_path, 0, task.shard)
            yield write_shard(tar, 0, task.shard, blocks(task.shard, progress), "abc")

    def blocks(shard, progress):
        frame = str(os.getpid()).encode()
        for number in range(24 if shard == 5 else 4):
            time.sleep(0.25)
            yield EncodedBlock(number, frame, 1, 8, 1, 1, {}, 0)
            progress(8)

    def make(begin):
        with closing(ShardLocks(tmp_path)) as locks:
            worker._ShardMaker(job, locks, None).make_all(begin)

    monkeypatch.setattr(worker, "run_shards", run_shards)
    workers = set()
    for number in range(4):
        if not (pid := os.fork()):
            try:
                make(number / 4)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        workers.add(pid)
    first, codes = {}, []
    while len(codes) < 4:
        for marker in tmp_path.glob("shards/r00/*.json"):
            tar = marker.with_suffix(".tar")
            first.setdefault(tar, tar.stat().st_ino)
        pid, status = os.waitpid(-1, os.WNOHANG)
        codes += [os.waitstatus_to_exitcode(status)] if pid in workers else []
        time.sleep(0.02)
    said = capfd.readouterr().err
    assert (codes, "failed, attempt" in said) == ([0] * 4, False), said
    assert first == {
        shard_path(tmp_path, 0, n): first[shard_path(tmp_path, 0, n)] for n in range(8)
    }
    assert {tar: tar.stat().st_ino for tar in first} == first
    assert all(read_marker(tar) for tar in first)


def test_a_shard_that_another_worker_has_made_meanwhile_is_not_given_up(shards, monkeypatch):
    shards.locks.set_failures(5, 3, "ValueError: no")
    monkeypatch.setattr(shards.locks, "wait_for", lambda number: None)
    note = shards.locks.release

    def release(number):
        note(number)
        if number == 59:
            shards.made.append(5)

    monkeypatch.setattr(shards.locks, "release", release)
    shards.make(0.0)
    assert shards.tries[5] == 0


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_a_worker_writes_stays_while_it_makes_a_shard_that_is_there(
    build, monkeypatch, goes_on
):
    """Though its lock is not seen: it may be one of another machine, or have been killed."""
    monkeypatch.setattr(ShardLocks, "_lock", lambda *_: True)
    written = temporary_of(shard_path(build.out, 0, 0))

    def made(tokens):
        with closing(ShardLocks(build.out)) as locks:
            locks.set_made(0, tokens)

    def finish(job):
        phases.finish(job)
        written.touch()
        made(8)
        monkeypatch.setattr(worker.time, "sleep", lambda seconds: made(16 if goes_on else 8))

    monkeypatch.setattr(worker, "finish", finish)
    worker.make_cache(build)
    assert written.exists() == goes_on
    assert (build.out / ".shards.lock").exists() == goes_on


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_the_corpus_that_cannot_be_read_is_named(
    small_corpus, build, monkeypatch, capfd, part
):
    """The second is read while the shard is written, which is not to blame."""
    name = f"part-{part:06d}.arrow"

    def failing(path):
        if path.parts[-2:] == ("train", name):
            raise OSError(errno.EIO, "Input/output error")
        return hash_of(path)

    monkeypatch.setattr("distilcache.data.corpus.parts.hash_of", failing)
    config = CacheConfig(mask_only=True, blocks_per_shard=64)
    corpus = small_corpus(chunk_bytes=4096)
    line = f"corpus: part {corpus / 'train' / name} must be readable, got: Input/output error; "
    with pytest.raises(UserError) as caught:
        worker.make_cache(replace(build, corpus_dir=corpus, config=config))
    assert str(caught.value).startswith(line)
    assert "Traceback" not in capfd.readouterr().err


def test_locks_know_of_failures_in_any_language(tmp_path):
    with closing(ShardLocks(tmp_path)) as locks:
        assert locks.failures(1000) == (0, "")
        locks.set_failures(1000, 2, "Fehler: " + "\u00fc" * 300)
        assert locks.failures(1000) == (2, "Fehler: " + "\u00fc" * 119)
        assert locks.failures(999) == locks.failures(1001) == (0, "")
        locks.forget_failures()
        assert locks.failures(1000) == (0, "")


def test_a_disk_that_is_full_is_no_fault_of_a_shard(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(ShardLocks(tmp_path)) as locks:
        monkeypatch.setattr(os, "pwrite", full)
        for note in (lambda: locks.set_made(0, 8), lambda: locks.set_failures(0, 1, "no")):
            with pytest.raises(UserError, match=r"\.shards\.lock must be writable, got: No space"):
                note()


class FakePool:
    """Answers one call after the other with the replies that it is given, the last for ever."""

    def __init__(self, workers, *replies):
        self.workers, self.replies, self.calls, self.busy = workers, deque(replies), 0, 0
        self.killed = None

    def size(self):
        return self.workers

    def room(self):
        return self.workers - self.busy

    def start(self, function, build, begin):
        self.calls += 1
        self.busy += 1

    def wait(self, seconds):
        self.busy -= 1
        return [(0, self.replies.popleft() if len(self.replies) > 1 else self.replies[0])]

    def close(self, kill):
        self.killed = kill


@pytest.fixture
def build(small_corpus, tmp_path):
    return Build(
        corpus_dir=small_corpus(),
        out=tmp_path / "c",
        teacher=None,
        masking=MaskingConfig(),
        config=CacheConfig(mask_only=True),
    )


def test_workers_that_end_are_replaced_until_one_says_that_all_is_done(build):
    ended = Reply(failure="worker ended by SIGKILL")
    pool = FakePool(2, ended, ended, Reply())
    supervise(pool, build)
    assert (pool.calls, pool.killed) == (4, False)


def test_workers_that_cannot_live_end_the_run(build):
    pool = FakePool(2, Reply(failure="worker ended by SIGKILL"))
    with pytest.raises(UserError, match="workers must be able to run, .* ended by SIGKILL"):
        supervise(pool, build)
    assert (pool.calls, pool.killed) == (26, True)


def test_machines_that_are_lost_together_are_replaced(build):
    """The cluster has shrunk before their failures are counted."""

    class Shrinking(FakePool):
        def wait(self, seconds):
            if self.workers == 1:
                return super().wait(seconds)
            lost, self.workers, self.busy = self.workers, 1, 0
            return [(n, Reply(failure="its node has died")) for n in range(lost)]

    pool = Shrinking(24, Reply())
    supervise(pool, build)
    assert (pool.calls, pool.killed) == (25, False)


def test_an_error_beside_a_finished_cache_is_none(build, monkeypatch):
    pool = FakePool(2)
    replies = [(0, Reply(user_error="storage: must be")), (1, Reply())]
    monkeypatch.setattr(pool, "wait", lambda seconds: replies)
    supervise(pool, build)
    assert pool.killed is False


def test_bad_input_ends_the_run_at_once(build):
    pool = FakePool(2, Reply(user_error="teacher: must be, got not"))
    with pytest.raises(UserError, match="teacher: must be, got not"):
        supervise(pool, build)
    assert (pool.calls, pool.killed) == (2, True)


def test_codecs_do_not_depend_on_the_number_of_threads(
    uninterrupted, build_cache_in, small_corpus, small_teacher, tmp_path, tree, monkeypatch
):
    """Sums in other orders differ in their last bits, and all that is coded with them."""
    import torch

    from distilcache.stages.teacher_cache import calibration_runs

    seen, calibrate = [], calibration_runs.calibrate

    def watched(*args, **options):
        seen.append(torch.get_num_threads())
        return calibrate(*args, **options)

    monkeypatch.setattr(calibration_runs, "calibrate", watched)
    torch.set_num_threads(2)
    try:
        out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **SETTINGS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1] * len(SETTINGS["hidden_layers"])
    assert tree(out) == tree(uninterrupted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dask"}, "engine: name must be one of in-process, local, ray, slurm, got 'dask'"),
        ({"workers": -1}, "engine: workers must be at least 0, got -1"),
        ({"name": "slurm", "workers": 2}, "engine: workers must be 0 or 1 where name is 'slurm'"),
        ({"ray_address": "auto"}, "engine: ray_address must be empty where name is 'in-process'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        EngineConfig(**settings)


def test_the_recipe_names_the_engine_and_flags_override_it(tmp_path):
    from distilcache.pipeline.options import with_engine
    from distilcache.pipeline.recipe import load_recipe

    path = tmp_path / "r.toml"
    path.write_text('[engine]\nname = "ray"\nworkers = 3\nray_address = "auto"\n')
    recipe = load_recipe(path)
    assert with_engine(recipe, None, None, None).engine == EngineConfig(
        name="ray", workers=3, ray_address="auto"
    )
    assert with_engine(recipe, None, 5, None).engine.workers == 5
    assert with_engine(recipe, "local", None, None).engine == EngineConfig(name="local")
    plain = load_recipe(None)
    assert with_engine(plain, None, 2, None).engine == EngineConfig(name="local", workers=2)
    assert with_engine(plain, None, 1, None).engine == EngineConfig(workers=1)
    assert "engine" not in json.loads(json.dumps(recipe.to_dict()))
    assert shard_path(tmp_path, 0, 1).suffix == ".tar"


def test_a_lock_is_of_one_shard_alone(tmp_path):
    """Another process finds the shard taken, and none of its neighbours."""
    locks = ShardLocks(tmp_path)
    assert locks.take(4)
    pid = os.fork()  # a child has none of its parent's locks
    if pid == 0:
        others = ShardLocks(tmp_path)
        found = [others.take(number) for number in range(8)]
        os._exit(sum(taken << number for number, taken in enumerate(found)))
    _, status = os.waitpid(pid, 0)
    assert f"{os.waitstatus_to_exitcode(status):08b}" == "11101111"
    locks.close()


def test_rate_and_time_left_begin_when_the_cache_is_prepared(tiny_corpus, tmp_path, monkeypatch):
    """Before, workers load the teacher and calibrate; that says nothing about the rest."""
    begun = []
    bar = SimpleNamespace(update=begun.append, n=0)
    monkeypatch.setattr(supervision, "token_bar", lambda build, corpus, found: bar)
    build = SimpleNamespace(corpus_dir=tiny_corpus, out=tmp_path, config=CacheConfig())
    progress = supervision._Progress(build)
    assert progress.look() == 0
    assert begun == []
    ShardLocks(tmp_path).close()
    assert progress.look() == 0
    assert begun == [0]


def test_blocks_count_before_their_shard_is_finished(build, monkeypatch):
    """Else a log would say 0 % until the first of them is, and that takes minutes."""
    build = replace(build, config=CacheConfig(mask_only=True, blocks_per_shard=2, rounds=2))
    bar = SimpleNamespace(n=0, close=lambda: None)
    bar.update = lambda tokens: setattr(bar, "n", bar.n + tokens)
    monkeypatch.setattr(supervision, "token_bar", lambda build, corpus, found: bar)
    note, seen = ShardLocks.set_made, [0]

    def watched(locks, number, tokens):
        note(locks, number, tokens)
        progress.look()
        seen.append(bar.n)

    monkeypatch.setattr(ShardLocks, "set_made", watched)
    with closing(supervision._Progress(build)) as progress:
        worker.make_cache(build)
        split = Corpus.open(build.corpus_dir).split("train")
        blocks = [len(split.block(number)[0]) for number in range(len(split.block_sequences))]
        assert len(blocks) > 4
        assert sorted(set(seen)) == [sum((blocks * 2)[:n]) for n in range(2 * len(blocks) + 1)]
        assert seen == sorted(seen)


def test_a_shard_that_begins_anew_does_not_set_the_bar_back(build, monkeypatch):
    build = replace(build, config=CacheConfig(mask_only=True, blocks_per_shard=2))
    updates = []
    bar = SimpleNamespace(n=0, update=updates.append)
    monkeypatch.setattr(supervision, "token_bar", lambda build, corpus, found: bar)
    progress = supervision._Progress(build)
    build.out.mkdir()
    with closing(ShardLocks(build.out)) as locks:
        for number, tokens, shown in ((0, 70, 70), (2, 30, 100), (0, 0, 100), (0, 90, 120)):
            if tokens:
                locks.set_made(number, tokens)
            else:
                locks.set_failures(number, 1, "ValueError: no")
            progress.look()
            bar.n += updates.pop()
            assert bar.n == shown
        assert locks.failures(0) == (1, "ValueError: no")


def test_shards_that_end_together_do_not_set_the_rate(monkeypatch, capsys):
    """Two workers finish a shard each 100 s after the start, 2 s apart."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    corpus = SimpleNamespace(manifest=SimpleNamespace(splits={"train": {"tokens": 400_000}}))
    build = SimpleNamespace(config=CacheConfig(), teacher="teacher")
    with worker.token_bar(build, corpus) as bar:
        for clock.now in (98.0, 100.0):
            bar.update(100_000)
        bar._say()
        assert "50%, 200k of 400k, 2.00k tok/s, 01:40 left" in capsys.readouterr().err
