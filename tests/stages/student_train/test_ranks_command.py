"""One command that trains one student on several processes of this machine."""
# ruff: noqa: F811

import json
import shutil

import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.shards import shard_path
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.student_train.checkpoint_folders import complete_checkpoints, step_of
from tests.command_line import (
    gone,
    one_line,
    start,
    wait_until,
    watch_training,
    watched,
    work,
    write_student_recipe,
)
from tests.damage import flip
from tests.stages.student_train.trainer_support import (
    cache,  # noqa: F401
    ours,
    python,
)

TRAIN = {"batch_size": 8, "streams": 2, "window_blocks": 1, "epochs": 1.0}


def nproc(tmp_path, cache, *options):
    recipe = write_student_recipe(tmp_path, cache, student={"sizes": ["1x32"]}, train=TRAIN)
    command = ["student-train", "--recipe", recipe, "--nproc", 2]
    return python("-m", "distilcache.pipeline.cli", *command, *options)


@pytest.mark.slow
def test_one_command_trains_on_two_processes(cache, tmp_path):
    done = nproc(tmp_path, cache, "--json")
    assert done.returncode == 0, done.stderr
    assert [r["name"] for r in json.loads(done.stdout)] == ["1x32"]
    assert (tmp_path / "runs/tiny/students/1x32/model.safetensors").is_file()
    refused = nproc(tmp_path, cache, "--set", "train.streams=1")
    assert refused.returncode == 2
    assert len(ours(refused)) == 1


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_and_the_second_start_is_refused(cache, tmp_path):
    watch_training(tmp_path)
    train = {**TRAIN, "epochs": 2.0, "save_steps": 1}
    recipe = write_student_recipe(tmp_path, cache, student={"sizes": ["1x32"]}, train=train)
    student = tmp_path / "runs/tiny/students/1x32"
    command = ("student-train", "--nproc", "2")
    first = start(recipe, *command, env=watched(recipe, 5.0))
    wait_until(lambda: work(recipe), first)
    second = start(recipe, *command, env=watched(recipe))
    _, err = second.communicate(timeout=120)
    assert one_line(second.returncode, err).startswith(
        f"distilcache: train: output must not be in use, got {student}"
    )
    assert len({pid for pid, *_ in work(recipe)}) == 2
    wait_until(lambda: complete_checkpoints(student / "checkpoints"), first)
    first.kill()
    wait_until(lambda: all(gone(pid) for pid, *_ in work(recipe)), seconds=20)
    first.communicate()
    assert not (student / "model.safetensors").exists()
    begun = [step for _, rank, step in work(recipe) if rank == 0]
    assert begun[-1] < 35
    newest = step_of(complete_checkpoints(student / "checkpoints")[-1])
    done = start(recipe, *command, env=watched(recipe))
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert f"goes on from step {newest} of" in err
    assert [s for _, rank, s in work(recipe) if rank == 0][len(begun)] == newest
    assert (student / "model.safetensors").is_file()


def test_an_error_on_one_rank_ends_all_with_one_line(cache, tmp_path):
    """A damaged block that the second rank alone reads."""
    copy = shutil.copytree(cache, tmp_path / "cache")
    opened = Cache.open(copy)
    data = CachedBatches(opened, batch_size=8, seed=0, window_blocks=1, streams=2)
    order = data._order(0)
    blocks = [
        {p.block for w in range(data.layout.windows) for p in order.slices(w, s)} for s in (0, 1)
    ]
    entry = opened.entry(min(blocks[1] - blocks[0]))
    flip(shard_path(copy, entry.round, entry.shard), 8 * (entry.offset + 40))
    done = nproc(tmp_path, copy)
    assert done.returncode == 2, done.stderr
    assert len(ours(done)) == 1, done.stderr
    assert "crc32" in ours(done)[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
