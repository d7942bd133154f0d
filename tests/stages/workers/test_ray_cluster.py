"""What a task of a Ray cluster takes; clusters that run are in test_engines_ray.py."""

from types import SimpleNamespace

import pytest

from distilcache.stages.workers.ray_cluster import cores_each


def cluster(*cores, gpus=0, dead=0):
    """A Ray module that knows these nodes."""
    nodes = [{"Alive": True, "Resources": {"CPU": float(n)} if n else {}} for n in cores]
    nodes += [{"Alive": False, "Resources": {"CPU": 1.0}}] * dead
    return SimpleNamespace(
        nodes=lambda: nodes, cluster_resources=lambda: {"CPU": float(sum(cores)), "GPU": gpus}
    )


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ((16,), 0, 1),
        ((16,), 1, 16),
        ((16,), 4, 4),
        ((16,), 5, 3),
        ((2,), 8, 1),
        ((0, 8, 4), 1, 4),  # a head without cores; the smaller node takes a task, too
        ((8, 8), 4, 4),
        ((), 3, 1),
    ],
)
def test_tasks_share_the_cores_of_a_cluster(nodes, workers, expected):
    assert cores_each(cluster(*nodes, dead=1), "cpu", workers) == expected


def test_on_gpus_a_task_takes_one_core():
    assert cores_each(cluster(16, gpus=4), "auto", 1) == 1
    assert cores_each(cluster(16, gpus=4), "cuda", 2) == 1
    assert cores_each(cluster(16, gpus=4), "cpu", 2) == 8
