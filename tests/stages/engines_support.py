"""Projects whose workers are watched: what the tests of all engines share.

The work that is done is told from a log that every worker appends to when it begins a shard.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.cache import Cache

ROOT = Path(__file__).parents[2]
SETTINGS = {"rounds": 2, "blocks_per_shard": 1, "hidden_layers": (1, -1)}
RECIPE = """
name = "p"
root = "{root}"
device = "cpu"
dtype = "float32"
[corpus]
sources = ["{text}"]
max_length = 16
block_sequences = 8
heldout_fraction = 0.1
workers = 1
[masking]
probability = 0.3
[teacher]
model = "{teacher}"
[cache]
rounds = 2
blocks_per_shard = 1
hidden_layers = [1, -1]
calibration_sequences = 24
"""
WATCHED = '''
"""Every process that writes shards: notes each that it begins, then takes its time over it."""
import importlib.machinery, os, sys, time

NAME = "stages.teacher_cache.pipeline"

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            write = module.write_shard

            def write_shard(tar, round_index, shard, blocks, identity):
                with open(os.environ["WORK_LOG"], "a") as log:
                    log.write(f"{os.getpid()} {round_index} {shard}\\n")
                time.sleep(float(os.environ.get("WORK_SECONDS", "0")))
                poison = os.environ.get("WORK_POISON")
                if poison == f"{round_index} {shard}":
                    raise ValueError("this shard is poison")
                return write(tar, round_index, shard, blocks, identity)

            module.write_shard = write_shard

        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Finder)
'''


@pytest.fixture(scope="module")
def uninterrupted(small_cache):
    """Made in this process."""
    return small_cache(**SETTINGS)


@pytest.fixture
def project(small_corpus, small_teacher, tmp_path):
    """A recipe whose corpus is made already, and a log of the work."""
    shutil.copytree(small_corpus(), tmp_path / "p" / "corpus")
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "sitecustomize.py").write_text(WATCHED)
    (tmp_path / "log").touch()
    text = small_corpus().parent / "text.txt"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(root=tmp_path, text=text, teacher=small_teacher))
    return recipe


def environment(project, seconds=0.0, **more):
    folder = project.parent
    return {
        **os.environ,
        "PYTHONPATH": f"{folder / 'watched'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "WORK_LOG": str(folder / "log"),
        "WORK_SECONDS": str(seconds),
        **more,
    }


def command(project, *arguments, seconds=0.0, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "teacher-cache", "--recipe", str(project),
         *arguments],
        cwd=project.parent,
        env=environment(project, seconds, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def work(project):
    """(pid, round, shard) of every shard that was begun."""
    return [tuple(map(int, line.split())) for line in (project.parent / "log").open()]


def wait_until(happened, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid):
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def markers(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("shards/*/*.json")}


def check_whole(out, uninterrupted, tree):
    assert tree(out) == tree(uninterrupted)
    assert list(Cache.open(out).verify()) == []
    assert not list(out.rglob(".*"))


def total(cache):
    return Cache.open(cache).manifest.totals["shards"]
