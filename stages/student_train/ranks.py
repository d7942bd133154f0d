"""The processes that train one student together: who they are and what they agree on.

torchrun (or Ray Train) starts them and says by environment variables who is who. Gradients go
through DDP on the devices; what is said here goes between the hosts, so that agreeing on the
counts of a step does not wait for a device.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from distilcache.data.errors import BAD_INPUT, LOST_PEER, require
from distilcache.stages.models.device import resolve_device


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of a run; all methods but :attr:`is_first` are collective."""

    rank: int = 0
    world: int = 1
    hosts: Any = None
    """Process group between the hosts."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks; whole numbers stay exact."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total, group=self.hosts)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum([flag])[0] > 0

    def from_first(self, value: int) -> int:
        """The first rank's value."""
        return int(self.sum([value if self.is_first else 0])[0])

    def wait(self) -> None:
        """Go on when all have come here."""
        self.sum([])

    def gather(self, content: bytes) -> list[bytes]:
        """What each rank has, by rank; on the first rank alone."""
        if self.world == 1:
            return [content]
        lengths = self.sum([len(content) if r == self.rank else 0 for r in range(self.world)])
        mine = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.gather(mine, parts if self.is_first else None, dst=0, group=self.hosts)
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
        device: The recipe's; each rank of a machine takes one CUDA device of it.

    Returns:
        This rank, and its device; alone where nothing else was started.

    Raises:
        UserError: There are fewer devices than ranks.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    target = resolve_device(device)
    if world == 1:
        return ALONE, target
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
    hosts = _hosts_group()
    return Ranks(dist.get_rank(), dist.get_world_size(), hosts), target


def _meet(backend: str) -> None:
    """Find the other ranks, by names of this attempt.

    torchrun's agents serve all attempts from one store, and addresses that the ranks of the last
    attempt have left there would be taken for those of this one.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


_GROUPS: list[Any] = []


def _hosts_group() -> Any:
    """One group for all students of a process."""
    if not _GROUPS:
        _GROUPS.append(dist.new_group(backend="gloo"))
    return _GROUPS[0]


def leave_ranks() -> None:
    """End the process group after success; after an error there may be nobody to wait for."""
    if dist.is_initialized():
        _GROUPS.clear()
        dist.destroy_process_group()


def claim_error() -> bool:
    """Whether this rank is the one to report bad input: the first that met it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if not dist.is_initialized():  # An error in what all ranks read.
        return os.environ.get("RANK", "0") == "0"
    return _count(BAD_INPUT_KEY, 1) <= 1


BAD_INPUT_KEY, LOST_KEY = "distilcache/bad-input", "distilcache/lost"


def _count(key: str, amount: int) -> int:
    """Add to a number that all ranks share; 0 where its keeper is gone."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(key, amount))
    except RuntimeError:  # dist.DistError among them
        return 0


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """End this process when another rank is gone, with one line unless that one has said why."""
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
                "another one; the same command goes on from the newest checkpoint",
                file=sys.stderr,
            )
        sys.stderr.flush()
        # No clean-up: threads of the process group would wait for the lost rank.
        os._exit(code)
