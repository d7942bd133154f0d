"""Which engine, what is a task, and how tasks are handed out to workers that may fail."""
# ruff: noqa: F811

import json
from collections import Counter, deque

import pytest

from distilcache.data.cache.shards import shard_path
from distilcache.data.errors import UserError
from distilcache.stages.teacher_cache.config import EngineConfig
from distilcache.stages.teacher_cache.engines import base, drive
from distilcache.stages.teacher_cache.engines.work import Reply
from distilcache.stages.teacher_cache.task import ShardTask, ShardTasks
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
    assert tasks[2:4] == [tasks[2], tasks[3]]
    with pytest.raises(IndexError):
        tasks[6]


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


def test_codecs_do_not_depend_on_the_number_of_threads(
    uninterrupted, build_cache_in, small_corpus, small_teacher, tmp_path, tree, monkeypatch
):
    """Sums in other orders differ in their last bits, and all that is coded with them."""
    import torch

    from distilcache.stages.teacher_cache import encoding as plan

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
