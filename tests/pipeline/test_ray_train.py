"""Stage two on a real Ray cluster of two nodes: the same students as without it."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.shards import shard_path
from distilcache.data.storage.locks import locked
from distilcache.pipeline.recipe import load_recipe
from distilcache.stages.student_train.checkpoint_folders import complete_checkpoints, step_of
from tests.command_line import (
    gone,
    start,
    wait_until,
    watch_training,
    watched,
    work,
    write_student_recipe,
)
from tests.damage import flip
from tests.ray_support import add_node, ray_cluster

pytestmark = pytest.mark.slow
for needed in ("ray", "pandas"):
    pytest.importorskip(needed, reason="needs the extra distilcache[ray]")

TRAIN = {
    "batch_size": 8,
    "streams": 4,
    "window_blocks": 1,
    "steps": 12,
    "save_steps": 3,
    "logging_steps": 4,
}


@pytest.fixture
def recipe(tmp_path, small_cache):
    """A recipe, and a log of every micro-batch that is begun: (pid, rank, step)."""
    watch_training(tmp_path)
    student = {"sizes": ["1x32", "1x16"]}
    return write_student_recipe(tmp_path, small_cache(), student=student, train=TRAIN)


@pytest.fixture
def cluster(recipe, monkeypatch):
    with ray_cluster(monkeypatch, watched(recipe, 0.2)) as made:
        add_node(made, 3)
        yield made


def train(recipe, command, *options):
    return start(recipe, command, "--json", *options, env=watched(recipe))


def end(process, code=0):
    """Results on stdout, text on stderr."""
    out, err = process.communicate(timeout=280)
    assert process.returncode == code, err
    return (json.loads(out) if out.strip() else None), err


def weights(recipe, root="runs"):
    """Tensors of every student, by its name."""
    students = recipe.parent / root / "tiny" / "students"
    return {p.parent.name: load_file(p) for p in students.glob("*/model.safetensors")}


def check_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].keys() == other[name].keys()
        assert all(torch.equal(one[name][n], other[name][n]) for n in one[name]), name


def plain(figures):
    """Results without what the clock decides."""
    clock = ("seconds", "tokens_per_s")
    return [{k: v for k, v in figure.items() if k not in clock} for figure in figures]


def local(recipe, command, *options):
    """The same without Ray, in another folder."""
    root = f"root={recipe.parent / 'local'}"
    return end(train(recipe, command, "--set", root, *options))[0]


def ours(err):
    """Lines of the driver itself."""
    return [line for line in err.splitlines() if line.startswith("distilcache: ")]


def test_a_sweep_whose_worker_is_killed_and_one_that_fails(recipe, cluster):
    students = recipe.parent / "runs" / "tiny" / "students"
    (students / "1x16-seed3").mkdir(parents=True)
    (students / "1x16-seed3" / "thesis.txt").write_text("x")
    options = ["--seed", "0", "--seed", "3"]
    process = train(recipe, "student-sweep", "--engine", "ray", "--ray-address", cluster.address,
                    *options)  # fmt: skip
    wait_until(lambda: any(step >= 5 for *_, step in work(recipe)), process, seconds=200)
    victim = next(pid for pid, _, step in work(recipe) if step >= 5)
    os.kill(victim, signal.SIGKILL)
    results, err = end(process, code=2)
    begun = [step for pid, _, step in work(recipe)]
    assert [r["name"] for r in results if "error" in r] == ["1x16-seed3"]
    assert "got 1 that failed (1x16-seed3; see above)" in ours(err)[-1]
    # Three students of 12 steps; of the killed one only what came after its checkpoint is repeated.
    assert 36 < len(begun) <= 36 + 3
    assert begun.count(0) == 3
    (students / "1x16-seed3" / "thesis.txt").unlink()
    again, _ = end(train(recipe, "student-sweep", "--engine", "ray", "--ray-address",
                         cluster.address, *options))  # fmt: skip
    assert len(work(recipe)) == len(begun) + 12
    assert plain(again) == plain(local(recipe, "student-sweep", *options))
    check_same(weights(recipe), weights(recipe, "local"))


@pytest.mark.parametrize("lost", ["worker", "node"])
def test_ranks_that_are_lost_end_as_those_of_torchrun(recipe, cluster, lost):
    options = ["--engine", "ray", "--ray-address", cluster.address, "--workers", "2"]
    process = train(recipe, "student-train", *options)
    wait_until(lambda: any(step >= 5 for *_, step in work(recipe)), process, seconds=200)
    if lost == "worker":
        os.kill(next(pid for pid, rank, _ in work(recipe) if rank == 1), signal.SIGKILL)
    else:
        cluster.remove_node(*cluster.worker_nodes, allow_graceful=False)
        add_node(cluster, 4)
    results, err = end(process)
    assert [line.rpartition("; ")[2] for line in ours(err)] == ["starting again (1 of 3)"]
    steps = [step for _, rank, step in work(recipe) if rank == 0]
    assert 24 < len(steps) <= 24 + 3
    assert steps.count(0) == 2
    assert plain(results) == plain(local(recipe, "student-train", "--nproc", "2"))
    check_same(weights(recipe), weights(recipe, "local"))
    assert not list((recipe.parent / "runs" / "tiny").glob(".*"))


def test_one_worker_is_one_process(recipe, cluster):
    options = ["--size", "1x16"]
    on_ray = ["--engine", "ray", "--ray-address", cluster.address, *options]
    results, _ = end(train(recipe, "student-train", *on_ray))
    assert plain(results) == plain(local(recipe, "student-train", *options))
    check_same(weights(recipe), weights(recipe, "local"))


def test_bad_input_and_ctrl_c(recipe, cluster):
    options = ["--engine", "ray", "--ray-address", cluster.address, "--workers", "2"]
    results, err = end(train(recipe, "student-train", *options, "--set", "train.streams=1"), 2)
    assert results is None
    assert len(ours(err)) == 1
    assert "streams" in ours(err)[0]
    assert "Traceback" not in err

    damaged = shutil.copytree(load_recipe(recipe).cache_from, recipe.parent / "damaged")
    entry = Cache.open(damaged).entry(0)
    tar = shard_path(damaged, entry.round, entry.shard)
    flip(tar, 8 * (entry.offset + 40))
    whole = ["--set", f"cache_from={damaged}", "--set", "train.steps=0"]
    _, err = end(train(recipe, "student-train", *options, *whole), 2)
    assert len(ours(err)) == 1  # one of the ranks has met it, and none was started again
    assert "crc32" in ours(err)[0]
    shutil.rmtree(recipe.parent / "runs")
    (recipe.parent / "log").write_text("")

    process = train(recipe, "student-train", *options)
    wait_until(lambda: any(step >= 4 for *_, step in work(recipe)), process, seconds=200)
    process.send_signal(signal.SIGINT)
    results, err = end(process, 130)
    assert ours(err) == ["distilcache: interrupted; the same command goes on from here"]
    wait_until(lambda: all(gone(pid) for pid, *_ in work(recipe)), seconds=60)


def test_a_student_that_another_process_trains(recipe, cluster):
    """Ranks are refused, a sweep leaves it to that process."""
    student = recipe.parent / "runs/tiny/students/1x32"
    student.mkdir(parents=True)
    options = ["--engine", "ray", "--ray-address", cluster.address]
    with locked(student, "train"):
        for workers in ("1", "2"):
            refused = train(recipe, "student-train", *options, "--workers", workers)
            _, err = end(refused, 2)
            assert [line for line in ours(err) if "must not be in use" in line] == ours(err)
            assert len(ours(err)) == 1
        assert work(recipe) == []
        process = train(recipe, "student-sweep", *options)
        wait_until((student.parent / "1x16/model.safetensors").exists, process, seconds=200)
        begun = len(work(recipe))
    results, err = end(process)
    assert [r["name"] for r in results] == ["1x32", "1x16"]
    assert "1x32: another process trains it; waits for it" in err
    assert len(work(recipe)) == begun + 12
    assert not list((recipe.parent / "runs" / "tiny").glob(".*"))


def test_an_interrupted_sweep_goes_on_from_the_step_it_was_at(recipe, cluster):
    options = ["--engine", "ray", "--ray-address", cluster.address, "--size", "1x32"]
    process = train(recipe, "student-sweep", *options)
    wait_until(lambda: any(step >= 4 for *_, step in work(recipe)), process, seconds=200)
    process.send_signal(signal.SIGTERM)
    _, err = end(process, 143)
    assert ours(err) == ["distilcache: interrupted; the same command goes on from here"]
    (folder,) = (recipe.parent / "runs/tiny/students").iterdir()
    step = step_of(complete_checkpoints(folder / "checkpoints")[-1])
    assert step == len(work(recipe)) >= 5
    assert f"step {step} of 12, checkpoint saved" in err
    wait_until(lambda: all(gone(pid) for pid, *_ in work(recipe)), seconds=60)
    end(train(recipe, "student-sweep", *options))
    assert [step for *_, step in work(recipe)] == [*range(12)]
