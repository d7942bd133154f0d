"""The processes (ranks) that train one student together.

torchrun (or Ray Train) starts them and gives each its rank by environment variables. DDP sums
gradients on the devices. The counts of a step are summed between CPUs (gloo), so that this does not
wait for a device.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from distilcache.data.errors import BAD_INPUT, LOST_PEER, one_line, require
from distilcache.stages.models.device import resolve_device


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a run, seen from one of them; all ranks must call each of its methods."""

    rank: int = 0
    world: int = 1
    cpu_group: Any = None
    """Process group for tensors on the CPU."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks; whole numbers stay exact."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total, group=self.cpu_group)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum([flag])[0] > 0

    def any_of_each(self, flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Each flag, 0 or 1, set where it is set on any rank; may be in place."""
        if self.world > 1:
            dist.all_reduce(torch.from_numpy(flags), dist.ReduceOp.MAX, group=self.cpu_group)
        return flags

    def from_first(self, value: int) -> int:
        """The first rank's value."""
        return int(self.sum([value if self.is_first else 0])[0])

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        self.sum([0])  # gloo returns at once where there is nothing to sum

    def gather(self, content: bytes) -> list[bytes]:
        """The content of every rank, by rank; an empty list but on the first rank."""
        if self.world == 1:
            return [content]
        lengths = self.sum([len(content) if r == self.rank else 0 for r in range(self.world)])
        mine = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.gather(mine, parts if self.is_first else None, dst=0, group=self.cpu_group)
        if not self.is_first:
            return []
        return [part[: int(n)].numpy().tobytes() for part, n in zip(parts, lengths, strict=True)]

    def sum_on_device(self, values: Tensor) -> None:
        """Replace a tensor by its sum over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)


ALONE = Ranks()


def join_ranks(device: str) -> tuple[Ranks, torch.device]:
    """Join the processes that were started for this run.

    Args:
        device: The recipe's; each rank of a machine takes one of its CUDA devices.

    Returns:
        The ranks and this one's device; ``ALONE`` where one process trains.

    Raises:
        UserError: There are fewer devices than ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, resolve_device(device)
    check_gpus(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    target = resolve_device(device)
    if target.type == "cuda":
        require(
            target.index is None,
            f"recipe: device must name no number where several processes train, got {device!r}; "
            "use --set device=cuda, each takes its own",
        )
        target = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        _meet("nccl" if target.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), _cpu_group()), target


def check_gpus(device: str, processes: int) -> None:
    """Refuse more processes than this machine has GPUs; each of them finds it alike.

    Raises:
        UserError: Names how many there are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(
        device == "cpu" or not 0 < count < processes,
        f"train: processes must have a GPU each, got {processes} with {count}; use --nproc {count} "
        "or --set device=cpu",
    )


def _meet(backend: str) -> None:
    """Start the process group, with a store prefix of this attempt.

    torchrun's agents use one store for all attempts: without the prefix a restarted rank would
    read the addresses of the attempt before.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


@functools.cache
def _cpu_group() -> Any:
    """The group for tensors on the CPU; one for all students of a process."""
    return dist.new_group(backend="gloo")


def say(line: str) -> None:
    """Print a line on the console, from the first rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)


def leave_ranks() -> None:
    """End the process group after success; after an error the other ranks may be gone."""
    if dist.is_initialized():
        _cpu_group.cache_clear()
        dist.destroy_process_group()


def claim_error() -> bool:
    """Whether this rank reports bad input: the first that finds it does."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if not dist.is_initialized():  # All ranks of a machine find it, before they have met.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return _count(BAD_INPUT_KEY, 1) <= 1


BAD_INPUT_KEY, LOST_KEY = "distilcache/bad-input", "distilcache/lost"


def _count(key: str, amount: int) -> int:
    """Add to a number in the store of all ranks; 0 where the store is gone."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(key, amount))
    except RuntimeError:  # dist.DistError among them
        return 0


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """End this process when another rank is gone; one line says so, unless that rank did."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors that name its source files.
        lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if not (dist.is_initialized() and lost):
            raise
        code = BAD_INPUT if _count(BAD_INPUT_KEY, 0) else LOST_PEER
        if code == LOST_PEER and _count(LOST_KEY, 1) <= 1:
            print(
                f"distilcache: train: all ranks must stay alive, rank {dist.get_rank()} lost "
                f"another one ({one_line(error)}); the same command goes on from the newest "
                "checkpoint",
                file=sys.stderr,
            )
        sys.stderr.flush()
        # No clean-up: threads of the process group would wait for the lost rank.
        os._exit(code)
