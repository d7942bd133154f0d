"""``student-sweep --engine ray``: one task per student on a Ray cluster, all from one cache."""

import contextlib
import os
from collections.abc import Callable, Hashable
from typing import Any

from distilcache.stages.workers.ray_cluster import call_in, joined
from distilcache.stages.workers.ray_pool import RayPool

RETRIES = 5
"""How often a student goes on from its checkpoint after its worker or node is lost. There is a
limit since it may need more memory than there is."""


class StudentPool(RayPool):
    """Trains students wherever the cluster has room.

    Args:
        device: As in the recipe.
        workers: Students at a time; 0: as many as the cluster has room for.
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
        """Cancel what is not finished, and leave the cluster."""
        super().close(kill)
        self._leaving.close()
