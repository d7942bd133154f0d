"""Stage one from corpus to finished cache, by the engine that is asked for.

Engines differ in who starts workers; the workers, and what they write, are the same.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from distilcache.data.cache.cache import Cache, read_manifest
from distilcache.data.cache.manifest import CacheManifest
from distilcache.data.cache.teacher_files import damaged_teacher
from distilcache.data.errors import require
from distilcache.data.storage.files import make_folder, sha256_file
from distilcache.data.storage.locks import locked
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.config import EngineConfig
from distilcache.stages.teacher_cache.console import say
from distilcache.stages.teacher_cache.engines.shard_locks import ShardLocks, clear_leftovers
from distilcache.stages.teacher_cache.engines.supervise import supervise
from distilcache.stages.teacher_cache.engines.worker import make_cache
from distilcache.stages.teacher_cache.phases import finished

ID, COUNT = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"
MIN, MAX, STEP = "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP"
MUCH_CLIPPED = 1e-3
"""Fraction of clipped codes above which a line says so: it costs fidelity."""


def build_cache(build: Build, engine: EngineConfig | None = None) -> Cache:
    """Run the teacher once per round over the corpus and store its signals.

    Without an ``engine`` the shards are computed in this process.

    Raises:
        UserError: Teacher, corpus and existing cache do not fit together.
    """
    reused = finished(build)
    if reused is None and (build.out / "manifest.json").exists():
        build = _put_right(build, read_manifest(build.out))
    _run(build, engine or EngineConfig())
    if reused is not None:
        say(f"{build.out} is finished ({reused.rounds} rounds) and reused")
    cache = Cache.open(build.out)
    _say_clipped(cache, build.config.calibration_sequences)
    return cache


def _say_clipped(cache: Cache, calibrated: int) -> None:
    """A line where many codes are outside the range; ``calibrated``: sequences of calibration."""
    clipped = cache.manifest.clipped_fraction
    if clipped <= MUCH_CLIPPED:
        return
    cause, remedy = "", "a larger cache.calibration_sequences"
    if calibrated >= cache.manifest.totals["sequences"] // cache.manifest.rounds:
        cause = ", though it saw every sequence: states vary too much from one masking to another"
        remedy = "more text, or with cache.hidden_dtype=float16"
    say(
        f"{clipped:.1%} of the codes are outside the range that calibration found{cause}; for a "
        f"closer cache make it again with {remedy}"
    )


def _put_right(build: Build, old: CacheManifest) -> Build:
    """What is asked for, and the rounds that are there already in a cache that lacks something.

    Raises:
        UserError: A file of the teacher is damaged; the next manifest would vouch for it.
    """
    for name, wanted in old.teacher_files.items():
        path = build.out / "teacher" / name
        found = sha256_file(path) if path.is_file() else wanted  # what is missing is made again
        require(found == wanted, damaged_teacher(path, wanted, found))
    rounds = max(build.config.rounds, old.rounds)
    return replace(build, config=replace(build.config, rounds=rounds))


def _run(build: Build, engine: EngineConfig) -> None:
    if engine.name == "slurm":
        place, of = array_place(os.environ)
        with _locked_folder(build.out, shared=True):
            with closing(ShardLocks(build.out)) as locks:
                locks.forget_failures()
            make_cache(build, begin=place / of, show=True)
        return
    with _locked_folder(build.out):
        if engine.name == "local":
            from distilcache.stages.workers.pool import LocalPool, places

            supervise(LocalPool(places(build.device, engine.workers)), build)
        elif engine.name == "ray":
            from distilcache.stages.workers.ray_cluster import cores_each, joined
            from distilcache.stages.workers.ray_pool import RayPool

            with joined(engine.ray_address) as ray:
                cores = cores_each(ray, build.device, engine.workers)
                supervise(RayPool(ray, build.device, engine.workers, cores=cores), build)
        else:
            make_cache(build, show=True)


@contextlib.contextmanager
def _locked_folder(out: Path, shared: bool = False) -> Iterator[None]:
    """The folder of the cache, without what killed runs have left; removed where it stays empty.

    ``shared``: other processes that share it may build in it.
    """
    new = not out.exists()
    make_folder(out)
    try:
        # The last of those that share it has it alone for an instant.
        with locked(out, "cache", shared=shared, patience=2.0 if shared else 0.0):
            if not shared:
                clear_leftovers(out)
            try:
                yield
            finally:
                if not shared:
                    clear_leftovers(out)
    finally:
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()  # fails where it holds anything


def array_place(variables: Mapping[str, str]) -> tuple[int, int]:
    """Which task of how many this is, from what Slurm sets.

    Raises:
        UserError: It is none, or a variable is no number.
    """
    require(
        ID in variables,
        f"engine: {ID} must be set where name is 'slurm', got none; submit the command with "
        "sbatch --array (see deploy/slurm)",
    )
    numbers = {}
    for name in (ID, COUNT, MIN, MAX, STEP):
        text = variables.get(name, "")
        if text:
            require(text.isdecimal(), f"engine: {name} must be a whole number, got {text!r}")
            numbers[name] = int(text)
    number, first = numbers[ID], numbers.get(MIN, 0)
    step = max(1, numbers.get(STEP, 1))
    last = numbers.get(MAX, number)
    count = max(1, numbers.get(COUNT, (last - first) // step + 1))
    # A list of any numbers has no step: two tasks may begin at one place, which costs nothing.
    return max(0, number - first) // step % count, count
