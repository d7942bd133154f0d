"""What an engine is, and what all engines have in common.

A shard is published whole or not at all, and running its task twice writes the same bytes. So an
engine need only see to it that every task is run at least once.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from tqdm import tqdm

from distilcache.data.cache.manifest import CacheManifest
from distilcache.data.errors import UserError
from distilcache.data.storage.files import locked
from distilcache.stages.teacher_cache.config import EngineConfig
from distilcache.stages.teacher_cache.run import Build
from distilcache.stages.teacher_cache.task import ShardTask, done_marker

ATTEMPTS = 3
"""Times that a shard is tried before it is given up."""


class Engine(Protocol):
    """Carries a build through its three phases."""

    def run(self, build: Build) -> CacheManifest:
        """Finish the cache; returns its manifest."""
        ...


def engine_of(config: EngineConfig) -> Engine:
    """The engine that the recipe asks for."""
    if config.name == "local":
        from distilcache.stages.teacher_cache.engines.local import LocalEngine

        return LocalEngine(config.workers)
    if config.name == "ray":
        from distilcache.stages.teacher_cache.engines.ray_tasks import RayEngine

        return RayEngine(config.workers, config.ray_address)
    if config.name == "slurm":
        from distilcache.stages.teacher_cache.engines.slurm import SlurmEngine

        return SlurmEngine()
    from distilcache.stages.teacher_cache.engines.in_process import InProcessEngine

    return InProcessEngine()


@contextlib.contextmanager
def folder_of(build: Build) -> Iterator[None]:
    """Make the folder of the cache; remove it again where nothing comes to lie in it."""
    new = not build.out.exists()
    build.out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                build.out.rmdir()  # fails where it holds anything


@contextlib.contextmanager
def alone(build: Build) -> Iterator[None]:
    """Build with nobody else."""
    with folder_of(build), locked(build.out, "cache"):
        yield


class Progress:
    """The bar over all workers: tokens of finished shards, from their markers."""

    def __init__(self, build: Build, identity: str, tokens: int) -> None:
        self._out = build.out
        self._identity = identity
        self.reused = 0
        """Shards that were there before this run."""
        label = "teacher cache" if build.teacher else "masks"
        self.bar = tqdm(total=tokens, unit="tok", unit_scale=True, desc=label)

    def finished(self, task: ShardTask, before: bool = False) -> bool:
        """Whether a shard is finished; then its tokens are counted.

        Args:
            task: The shard.
            before: It is looked for before this run's work; the bar's rate leaves it out.
        """
        marker = done_marker(self._out, task, self._identity)
        if marker is None:
            return False
        tokens = sum(block["tokens"] for block in marker["blocks"])
        if before:
            self.reused += 1
            self.bar.initial += tokens
        self.bar.update(tokens)
        return True


def give_up(failures: dict[ShardTask, str]) -> UserError:
    """One line over the shards that could not be made."""
    listed = "; ".join(f"{name_of(task)}: {reason}" for task, reason in sorted_items(failures)[:5])
    more = f" and {len(failures) - 5} more" if len(failures) > 5 else ""
    return UserError(
        f"teacher: every shard must be computed, got {len(failures)} that failed {ATTEMPTS} times: "
        f"{listed}{more}; repeat the command once that is mended: the others are kept"
    )


def sorted_items(failures: dict[ShardTask, str]) -> list[tuple[ShardTask, str]]:
    """In order of (round, shard)."""
    return sorted(failures.items(), key=lambda item: (item[0].round_index, item[0].shard))


def name_of(task: ShardTask) -> str:
    """For messages."""
    return f"round {task.round_index} shard {task.shard}"


def one_line(error: BaseException) -> str:
    """What an exception says, short enough for a list."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200].removesuffix(": ")


def tokens_of(manifest: Any, rounds: int) -> int:
    """Tokens of all rounds of a corpus."""
    return int(manifest.splits["train"]["tokens"]) * rounds
