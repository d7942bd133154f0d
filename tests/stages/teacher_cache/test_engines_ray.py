"""Stage one on a real Ray cluster of two nodes on this machine, whose parts are killed."""
# ruff: noqa: F811

import os
import signal
import subprocess
from collections import Counter

import pytest

from distilcache.stages.workers.ray_cluster import joined
from distilcache.stages.workers.ray_pool import RayPool
from tests.command_line import gone, start, wait_until, watched, work
from tests.ray_support import add_node, ray_cluster
from tests.stages.teacher_cache.engines_support import (
    check_the_rest_is_made,
    check_whole,
    markers,
    project,  # noqa: F401
    total,
    uninterrupted,  # noqa: F401
)

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="needs the extra distilcache[ray]")

SECONDS = 1.0
"""Per shard, so that what is killed is at work."""


@pytest.fixture
def cluster(project, monkeypatch):
    """Its head; nodes are added by the tests."""
    with ray_cluster(monkeypatch, watched(project, SECONDS)) as made:
        yield made


def driver(project, address, *arguments):
    """Text and results in one stream."""
    place = ["--ray-address", address] if address else []
    return start(project, "teacher-cache", "--engine", "ray", *place, *arguments,
                 env=watched(project, SECONDS), stderr=subprocess.STDOUT)  # fmt: skip


def test_worker_killed_node_removed_node_added(project, uninterrupted, tree, cluster):
    out = project.parent / "p" / "cache"
    node = add_node(cluster, 3)
    process = driver(project, cluster.address)
    wait_until(lambda: len({pid for pid, *_ in work(project)}) == 2, process)
    wait_until(lambda: len(markers(out)) >= 3, process)
    os.kill(work(project)[-1][0], signal.SIGKILL)
    made = len(markers(out))
    wait_until(lambda: len(markers(out)) >= made + 3, process)
    workers = {pid for pid, *_ in work(project)}
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster, 4)
    # Of the new node, or of the head in place of the lost ones.
    wait_until(lambda: {pid for pid, *_ in work(project)} - workers, process)
    log, _ = process.communicate(timeout=280)
    assert process.returncode == 0, log
    check_whole(out, uninterrupted, tree)
    begun = Counter((r, s) for _, r, s in work(project))
    assert max(begun.values()) <= 3
    assert total(uninterrupted) < sum(begun.values()) <= total(uninterrupted) + 2


def test_a_killed_driver_is_started_again(project, uninterrupted, tree, cluster):
    out = project.parent / "p" / "cache"
    add_node(cluster, 3)
    process = driver(project, cluster.address)
    wait_until(lambda: len({pid for pid, *_ in work(project)}) == 2, process)
    wait_until(lambda: len(markers(out)) >= 3, process)
    process.kill()
    process.communicate()
    workers = {pid for pid, *_ in work(project)}
    wait_until(lambda: all(gone(pid) for pid in workers), seconds=60)
    check_the_rest_is_made(project, uninterrupted, tree, lambda: driver(project, cluster.address))


def test_without_an_address_a_cluster_is_started_and_ended(
    project, uninterrupted, tree, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    process = driver(project, "", "--workers", "1", "--set", "cache.rounds=1")
    log, _ = process.communicate(timeout=280)
    assert process.returncode == 0, log
    workers = {pid for pid, *_ in work(project)}
    assert len(workers) == 1
    wait_until(lambda: all(gone(pid) for pid in workers), seconds=30)


def test_no_cluster_at_the_address(project):
    process = driver(project, "127.0.0.2:1")
    log, _ = process.communicate(timeout=280)
    assert process.returncode == 2, log
    assert "engine: ray_address must be that of a running Ray cluster, got '127.0.0.2:1'" in log


def test_work_that_always_ends_its_worker_is_answered(monkeypatch):
    """A shard that needs more memory than there is would keep the run for ever."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with joined("") as ray:
        pool = RayPool(ray, "cpu", 1)
        ticket = pool.start(os._exit, 1)
        answers = []
        wait_until(lambda: answers.extend(pool.wait(0.5)) or answers, seconds=120)
        ((answered, reply),) = answers
        assert answered == ticket
        assert "WorkerCrashedError" in reply.failure
