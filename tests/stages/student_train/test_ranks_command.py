"""One command that trains one student on several processes of this machine."""
# ruff: noqa: F811

import json
import shutil

import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.shards import shard_path
from distilcache.data.loader.dataset import CachedBatches
from tests.command_line import write_student_recipe
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
