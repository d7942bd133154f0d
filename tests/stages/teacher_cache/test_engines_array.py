"""The tasks of a Slurm array, as plain processes: they share the work, that of lost ones too."""
# ruff: noqa: F811

import threading
from contextlib import ExitStack

import pytest

from distilcache.data.errors import UserError
from distilcache.data.storage.locks import locked
from distilcache.stages.teacher_cache.run import _locked_folder, array_place
from tests.command_line import wait_until, work
from tests.stages.teacher_cache.engines_support import (
    SETTINGS,
    check_whole,
    command,
    markers,
    project,  # noqa: F401
    total,
    uninterrupted,  # noqa: F401
)


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


def test_a_task_may_begin_in_the_instant_in_which_another_ends(tmp_path):
    """Which looks then whether it is the last one."""
    last = ExitStack()
    last.enter_context(locked(tmp_path, "cache"))
    threading.Timer(0.2, last.close).start()
    with _locked_folder(tmp_path, shared=True):
        pass


def array(project, count, seconds=0.0, **more):
    """All tasks of an array at once, as plain processes; none does its work alone."""
    return [
        command(
            project,
            "--engine",
            "slurm",
            seconds=seconds,
            SLURM_ARRAY_TASK_ID=str(n),
            SLURM_ARRAY_TASK_COUNT=str(count),
            WORK_TOGETHER=str(count),
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
    assert (
        "1 that failed 3 times or more: round 0 shard 12: ValueError: this shard is poison" in log
    )
    assert before.items() <= markers(out).items()
    assert len(work(project)) - begun == total(uninterrupted) - len(before) + 2
    (last,) = array(project, 1)
    _, log = last.communicate(timeout=240)
    assert last.returncode == 0, log
    check_whole(out, uninterrupted, tree)
