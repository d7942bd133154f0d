"""Local workers: any number of them, killed at any time, writes what one process writes."""
# ruff: noqa: F811

import os
import shutil
import signal
from collections import Counter

import pytest

from tests.command_line import gone, one_line, start, wait_until, work
from tests.stages.teacher_cache.engines_support import (
    check_the_rest_is_made,
    check_whole,
    command,
    markers,
    project,  # noqa: F401
    total,
    uninterrupted,  # noqa: F401
)


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_any_number_of_workers_writes_the_same_cache(project, uninterrupted, tree, workers):
    count = str(workers)
    options = ("--engine", "local", "--workers", count)
    process = command(project, *options, begin=start, WORK_TOGETHER=count)
    out, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    assert f"{total(uninterrupted)} shards" in out
    check_whole(project.parent / "p" / "cache", uninterrupted, tree)
    begun = work(project)
    assert len(begun) == len(set(begun)) == total(uninterrupted)
    assert len({pid for pid, *_ in begun}) == workers
    assert "Traceback" not in log


def at_work(project, *shard):
    """Processes that have begun a shard."""
    return [pid for pid, *begun in work(project) if begun == list(shard)]


def test_a_killed_worker_loses_the_shard_that_it_had_in_flight(project, uninterrupted, tree):
    out = project.parent / "p" / "cache"
    process = command(project, "--workers", "2", WORK_HELD="1 2")
    wait_until(lambda: at_work(project, 1, 2), process)
    (victim,) = at_work(project, 1, 2)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: gone(victim))
    (project.parent / "log.go").touch()
    _, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    assert "worker ended by SIGKILL" in log
    check_whole(out, uninterrupted, tree)
    begun = Counter((r, s) for _, r, s in work(project))
    assert {key: n for key, n in begun.items() if n > 1} == {(1, 2): 2}
    assert begun.total() == total(uninterrupted) + 1
    assert "round 1 shard 2 failed, attempt 1 of 8" in log


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_ended_parent_leaves_no_orphans_and_goes_on(project, uninterrupted, tree, how):
    out = project.parent / "p" / "cache"
    process = command(project, "--workers", "2", seconds=0.3)
    wait_until(lambda: len({pid for pid, *_ in work(project)}) == 2, process)
    wait_until(lambda: len(markers(out)) >= 3, process)
    process.send_signal(how)
    _, log = process.communicate(timeout=240)
    workers = {pid for pid, *_ in work(project)}
    wait_until(lambda: all(gone(pid) for pid in workers), seconds=60)
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
    assert (
        "1 that failed 3 times or more: round 1 shard 2: ValueError: this shard is poison" in last
    )
    assert sum((r, s) == (1, 2) for _, r, s in work(project)) == 3
    assert len(markers(out)) == total(uninterrupted) - 1
    process = command(project)  # in this process, once it is mended
    assert process.wait(240) == 0
    process.communicate()
    check_whole(out, uninterrupted, tree)


def test_bad_input_in_a_worker_ends_the_run_in_one_line(project, small_teacher, tmp_path):
    import torch
    from transformers import BertForMaskedLM

    broken = shutil.copytree(small_teacher, tmp_path / "broken")
    model = BertForMaskedLM.from_pretrained(small_teacher)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[13, 3] = torch.nan
    model.save_pretrained(broken)
    recipe = project.read_text().replace(str(small_teacher), str(broken))
    project.write_text(recipe.replace("[cache]", '[cache]\nhidden_dtype = "float32"'))
    process = command(project, "--engine", "local", "--workers", "1")
    _, log = process.communicate(timeout=240)
    assert "hidden states of layer 0 must be finite" in one_line(process.returncode, log)
    assert log.count("must be finite") == 1
    out = project.parent / "p" / "cache"
    assert not list(out.rglob("*.tmp"))
    assert not list(out.glob("shards/*/*"))
    assert {pid for pid, *_ in work(project)} == {work(project)[0][0]} != {process.pid}
