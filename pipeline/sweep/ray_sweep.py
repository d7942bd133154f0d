"""``student-sweep --engine ray``: one task per student on a Ray cluster, all from one cache."""

import contextlib
import os
from collections.abc import Callable, Hashable
from typing import Any

from distilcache.stages.workers.ray_cluster import call_in, joined
from distilcache.stages.workers.ray_pool import RayPool

RETRIES = 5
"""Times that a student whose worker or node is lost goes on from its checkpoint: machines may be
taken away, but one that needs more memory than there is must end."""


class StudentPool(RayPool):
    """Trains students wherever the cluster has room; used as the pool of one machine is.

    Args:
        device: As in the recipe.
        workers: Students at a time at most; 0: what the cluster has room for.
        address: Of a running cluster; "": RAY_ADDRESS, or one is started on this machine.

    Raises:
        UserError: There is no such cluster.
    """

    def __init__(self, device: str, workers: int, address: str) -> None:
        self._folder = os.getcwd()
        with contextlib.ExitStack() as stack:
            ray = stack.enter_context(joined(address))
            super().__init__(ray, device, workers, retries=RETRIES)
            self._leaving = stack.pop_all()

    def start(self, function: Callable[..., Any], *args: Any) -> Hashable:
        """Hand a student to the cluster."""
        return super().start(call_in, self._folder, function, *args)

    def close(self, kill: bool) -> None:
        """Take back what is not finished, and leave the cluster."""
        super().close(kill)
        self._leaving.close()
