"""Engines: any number of workers, killed at any time, write what one process writes."""
# ruff: noqa: F811

import json
import os
import shutil
import signal
from collections import Counter, deque

import pytest

from data.errors import UserError
from data.masking import MaskingConfig
from data.shards import shard_path
from stages.teacher_cache.config import CacheConfig, EngineConfig
from stages.teacher_cache.engines import base, drive
from stages.teacher_cache.engines.slurm import array_place
from stages.teacher_cache.engines.work import Reply
from stages.teacher_cache.run import build_cache
from stages.teacher_cache.task import ShardTask, ShardTasks
from tests.command_line import gone, wait_until, work
from tests.stages.engines_support import (
    SETTINGS,
    check_the_rest_is_made,
    check_whole,
    command,
    markers,
    project,  # noqa: F401
    total,
    uninterrupted,  # noqa: F401
)

# ---- tasks ---------------------------------------------------------------------------------


def test_tasks_are_numbered_through_rounds_and_shards():
    tasks = ShardTasks(7, 3, 2)
    assert list(tasks) == [
        ShardTask(r, s, 3 * s, min(3 * s + 3, 7)) for r in range(2) for s in range(3)
    ]
    assert len(tasks) == 6
    assert tasks[2:4] == [tasks[2], tasks[3]]
    with pytest.raises(IndexError):
        tasks[6]


# ---- handing out shards --------------------------------------------------------------------


class FakeCrew:
    """Answers calls as told: ``answers(tasks)`` gives the number of shards made and a reply."""

    def __init__(self, workers, answers):
        self.workers, self.answers = workers, answers
        self.calls, self.made, self.waiting = [], [], deque()

    def size(self):
        return self.workers

    def room(self):
        return self.workers - len(self.waiting)

    def start(self, function, build, tasks):
        self.calls.append(list(tasks))
        self.waiting.append((len(self.calls), tasks))
        return len(self.calls)

    def wait(self, seconds):
        ticket, tasks = self.waiting.popleft()
        count, reply = self.answers(tasks)
        self.made += tasks[:count]
        return [(ticket, reply)]


class FakeProgress:
    def __init__(self, crew):
        self.crew = crew

    def finished(self, task, before=False):
        return task in self.crew.made


def hand_out(crew, count):
    tasks = ShardTasks(count, 1, 1)
    drive._Dispatcher(crew, None, FakeProgress(crew), tasks, deque(range(count))).run()


def test_calls_grow_to_some_seconds_and_shrink_towards_the_end():
    crew = FakeCrew(2, lambda tasks: (len(tasks), Reply(value=1.0)))
    hand_out(crew, 400)
    assert crew.made == list(ShardTasks(400, 1, 1))
    sizes = [len(call) for call in crew.calls]
    assert sizes[:2] == [1, 1]
    assert max(sizes) == drive.CALL_SECONDS
    assert sizes[-1] == 1
    assert len(sizes) < 45


@pytest.mark.parametrize("reply", [Reply(lost="worker ended"), Reply(failure="ValueError: no")])
def test_only_the_shard_in_flight_is_blamed_and_then_tried_by_itself(reply):
    tries = Counter()

    def answers(tasks):
        for count, task in enumerate(tasks):
            tries[task.shard] += 1
            if task.shard == 30 and tries[30] < 3:
                return count, reply
        return len(tasks), Reply(value=2.0)

    crew = FakeCrew(1, answers)
    hand_out(crew, 60)
    assert {task.shard for task in crew.made} == set(range(60))
    assert tries == Counter(dict.fromkeys(range(60), 1) | {30: 3})
    assert [call[0].shard for call in crew.calls if len(call) == 1][1:] == [30, 30]


def test_shards_that_fail_again_and_again_are_listed_in_order():
    def answers(tasks):
        bad = next((n for n, task in enumerate(tasks) if task.shard in (7, 3)), None)
        if bad is None:
            return len(tasks), Reply(value=5.0)
        return bad, Reply(failure="ValueError: no")

    crew = FakeCrew(3, answers)
    with pytest.raises(UserError) as caught:
        hand_out(crew, 20)
    assert "got 2 that failed 3 times: round 0 shard 3: ValueError: no; round 0 shard 7: " in str(
        caught.value
    )
    assert len(crew.made) == 18


def test_workers_that_cannot_live_end_the_run():
    crew = FakeCrew(2, lambda tasks: (0, Reply(lost="worker ended by SIGKILL")))
    with pytest.raises(UserError, match="worker ended by SIGKILL"):
        hand_out(crew, 1000)
    assert len(crew.calls) <= base.ATTEMPTS * 2 + 1


def test_bad_input_ends_the_run_at_once():
    crew = FakeCrew(2, lambda tasks: (0, Reply(user_error="teacher: must be, got not")))
    with pytest.raises(UserError, match="teacher: must be, got not"):
        hand_out(crew, 1000)
    assert len(crew.calls) == 2


# ---- threads -------------------------------------------------------------------------------


def test_codecs_do_not_depend_on_the_number_of_threads(
    uninterrupted, build_cache_in, small_corpus, small_teacher, tmp_path, tree, monkeypatch
):
    """Sums in other orders differ in their last bits, and all that is coded with them."""
    import torch

    from stages.teacher_cache import plan

    seen, calibrate = [], plan.calibrate

    def watched(*args):
        seen.append(torch.get_num_threads())
        return calibrate(*args)

    monkeypatch.setattr(plan, "calibrate", watched)
    torch.set_num_threads(2)
    try:
        out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **SETTINGS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 1]
    assert tree(out) == tree(uninterrupted)


# ---- local ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_any_number_of_workers_writes_the_same_cache(project, uninterrupted, tree, workers):
    process = command(project, "--engine", "local", "--workers", str(workers), seconds=0.05)
    out, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    assert f"{total(uninterrupted)} shards" in out
    check_whole(project.parent / "p" / "cache", uninterrupted, tree)
    begun = work(project)
    assert len(begun) == len(set(begun)) == total(uninterrupted)
    assert len({pid for pid, *_ in begun}) == workers
    assert "Traceback" not in log


def test_a_killed_worker_loses_the_shard_that_it_had_in_flight(project, uninterrupted, tree):
    out = project.parent / "p" / "cache"
    process = command(project, "--workers", "2", seconds=0.3)
    wait_until(lambda: len(markers(out)) >= 3, process)
    wait_until(lambda: len({pid for pid, *_ in work(project)}) == 2, process)
    victim = work(project)[-1][0]
    os.kill(victim, signal.SIGKILL)
    _, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    assert "worker ended by SIGKILL" in log
    check_whole(out, uninterrupted, tree)
    twice = [key for key, n in Counter((r, s) for _, r, s in work(project)).items() if n > 1]
    assert len(twice) == 1
    assert len(work(project)) == total(uninterrupted) + 1
    assert f"round {twice[0][0]} shard {twice[0][1]} failed, attempt 1 of 3" in log


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_ended_parent_leaves_no_orphans_and_goes_on(project, uninterrupted, tree, how):
    out = project.parent / "p" / "cache"
    process = command(project, "--workers", "2", seconds=0.3)
    wait_until(lambda: len({pid for pid, *_ in work(project)}) == 2, process)
    wait_until(lambda: len(markers(out)) >= 3, process)
    process.send_signal(how)
    _, log = process.communicate(timeout=60)
    workers = {pid for pid, *_ in work(project)}
    wait_until(lambda: all(gone(pid) for pid in workers), seconds=5)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from here" in log
        assert "Traceback" not in log
        assert not list(out.rglob(".*"))
    assert not (out / "manifest.json").exists()
    check_the_rest_is_made(project, uninterrupted, tree, lambda: command(project, "--workers", "2"))


@pytest.mark.slow
def test_a_shard_that_always_fails_is_listed_and_the_others_are_made(project, uninterrupted, tree):
    out = project.parent / "p" / "cache"
    process = command(project, "--workers", "2", WORK_POISON="1 2")
    _, log = process.communicate(timeout=240)
    assert process.returncode == 2
    last = log.strip().splitlines()[-1]
    assert "1 that failed 3 times: round 1 shard 2: ValueError: this shard is poison" in last
    assert sum((r, s) == (1, 2) for _, r, s in work(project)) == 3
    assert len(markers(out)) == total(uninterrupted) - 1
    process = command(project)  # in this process, once it is mended
    assert process.wait(240) == 0
    process.communicate()
    check_whole(out, uninterrupted, tree)


def test_bad_input_in_a_worker_ends_the_run_in_one_line(
    project, small_teacher, small_corpus, tmp_path
):
    import torch
    from transformers import BertForMaskedLM

    broken = shutil.copytree(small_teacher, tmp_path / "broken")
    model = BertForMaskedLM.from_pretrained(small_teacher)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[13, 3] = torch.nan
    model.save_pretrained(broken)
    out = tmp_path / "c"
    with pytest.raises(UserError, match="hidden states of layer 3 must be finite") as caught:
        build_cache(
            corpus_dir=small_corpus(),
            out=out,
            teacher=str(broken),
            masking=MaskingConfig(probability=0.3),
            config=CacheConfig(hidden_dtype="float32"),
            device="cpu",
            dtype="float32",
            engine=EngineConfig(name="local", workers=1),
        )
    assert "\n" not in str(caught.value)
    assert not list(out.rglob("*.tmp"))
    assert not list(out.glob("shards/*/*"))


# ---- slurm ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"ID": "0", "COUNT": "4", "MIN": "0", "MAX": "3"}, (0, 4)),
        ({"ID": "4", "COUNT": "4", "MIN": "1", "MAX": "4", "STEP": "1"}, (3, 4)),
        ({"ID": "9", "COUNT": "3", "MIN": "1", "MAX": "9", "STEP": "4"}, (2, 3)),
        ({"ID": "9", "MIN": "1", "MAX": "9", "STEP": "4"}, (2, 3)),
        ({"ID": "17", "COUNT": "3", "MIN": "1", "MAX": "17", "STEP": "1"}, (1, 3)),
        ({"ID": "0"}, (0, 1)),
    ],
)
def test_the_place_in_an_array(variables, place):
    assert array_place({f"SLURM_ARRAY_TASK_{k}": v for k, v in variables.items()}) == place


@pytest.mark.parametrize("variables", [{}, {"SLURM_ARRAY_TASK_ID": "x"}])
def test_no_place_in_an_array(variables):
    with pytest.raises(UserError, match="engine: SLURM_ARRAY_TASK_ID must be"):
        array_place(variables)


def array(project, count, seconds=0.0, **more):
    """All tasks of an array at once, as plain processes."""
    return [
        command(
            project,
            "--engine",
            "slurm",
            seconds=seconds,
            SLURM_ARRAY_TASK_ID=str(n),
            SLURM_ARRAY_TASK_COUNT=str(count),
            **more,
        )
        for n in range(count)
    ]


def test_two_array_tasks_share_the_work(project, uninterrupted, tree):
    """And each shard is begun once; both see the finished cache."""
    tasks = array(project, 2, seconds=0.1)
    for task in tasks:
        out, log = task.communicate(timeout=240)
        assert task.returncode == 0, log
        assert f"{total(uninterrupted)} shards" in out
    check_whole(project.parent / "p" / "cache", uninterrupted, tree)
    begun = work(project)
    assert len(begun) == total(uninterrupted)
    assert len({pid for pid, *_ in begun}) == 2


def test_a_killed_array_task_is_made_up_for_by_the_other(
    project, uninterrupted, tree, build_cache_in, small_teacher
):
    out = project.parent / "p" / "cache"
    first, second = array(project, 2, seconds=0.2)
    both = {first.pid, second.pid}
    wait_until(lambda: {pid for pid, *_ in work(project)} == both, first)
    wait_until(lambda: len(markers(out)) >= 3, first)
    with pytest.raises(UserError, match="output must not be in use, got .*another run"):
        build_cache_in(out, project.parent / "p" / "corpus", small_teacher, **SETTINGS)
    second.kill()
    second.communicate()
    _, log = first.communicate(timeout=240)
    assert first.returncode == 0, log
    check_whole(out, uninterrupted, tree)
    assert len(work(project)) <= total(uninterrupted) + 1


@pytest.mark.slow
def test_an_array_that_was_killed_is_submitted_again(project, uninterrupted, tree):
    out = project.parent / "p" / "cache"
    tasks = array(project, 2, seconds=0.3)
    wait_until(lambda: len(markers(out)) >= 3, tasks[0])
    for task in tasks:
        task.kill()
        task.communicate()
    before, begun = markers(out), len(work(project))
    (again,) = array(project, 1, WORK_POISON="0 12")
    _, log = again.communicate(timeout=240)
    assert again.returncode == 2
    assert "1 that failed 3 times: round 0 shard 12: ValueError: this shard is poison" in log
    assert before.items() <= markers(out).items()
    assert len(work(project)) - begun == total(uninterrupted) - len(before) + 2
    (last,) = array(project, 1)
    _, log = last.communicate(timeout=240)
    assert last.returncode == 0, log
    check_whole(out, uninterrupted, tree)


# ---- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dask"}, "engine: name must be one of in-process, local, ray, slurm, got 'dask'"),
        ({"workers": -1}, "engine: workers must be 0 or more, got -1"),
        ({"name": "slurm", "workers": 2}, "engine: workers must be 0 or 1 where name is 'slurm'"),
        ({"ray_address": "auto"}, "engine: ray_address must be empty where name is 'in-process'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        EngineConfig(**settings)


def test_the_recipe_names_the_engine_and_flags_override_it(tmp_path):
    from pipeline.options import with_engine
    from pipeline.recipe import load_recipe

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
