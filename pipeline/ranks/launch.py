"""Several processes for one student: ``--nproc``, and which of them prints.

``student-train --nproc N`` starts the same command N times with torchrun's launcher. On several
machines the user runs torchrun (see ``--help``), or Ray starts the processes (launch_ray.py).
"""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from distilcache.data.errors import BAD_INPUT, LOST_RANK
from distilcache.pipeline.ranks.ray_options import check_address
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.workers.processes import threads_each

WATCH_SECONDS = 1.0
"""Between two looks of a rank for its launcher."""


def is_rank() -> bool:
    """Whether this is one of several processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def may_report() -> bool:
    """Whether this process prints results."""
    return os.environ.get("RANK", "0") == "0"


def may_complain() -> bool:
    """Whether this process prints its error: the first that has one."""
    if not is_rank():
        return True
    from distilcache.stages.student_train.ranks import claim_error

    return claim_error()


def train_on_ranks(
    recipe: Recipe,
    sizes: Sequence[str],
    *,
    engine: str,
    nproc: int,
    max_restarts: int,
    ray_address: str | None,
) -> list[dict[str, Any]]:
    """Train students in this process, or in several of this machine or of a Ray cluster.

    Returns:
        See ``train_students``.

    Raises:
        SystemExit: The processes of this machine have ended; they have printed the results.
    """
    check_address(engine, ray_address)
    if engine == "ray":
        from distilcache.pipeline.ranks.launch_ray import launch_on_ray

        address = ray_address or recipe.engine.ray_address
        return launch_on_ray(recipe, sizes, workers=nproc, restarts=max_restarts, address=address)
    if nproc > 1 and not is_rank():
        from distilcache.stages.student_train.ranks import check_gpus

        check_gpus(recipe.device, nproc)
        sys.exit(launch(nproc, max_restarts, sys.argv[1:]))
    if is_rank():
        _keep_stdout()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # Ours or torchrun's launcher has started this rank.
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    from distilcache.pipeline.flow import train_students

    return train_students(recipe, sizes)


def _keep_stdout() -> None:
    """Keep stdout for results: C libraries write there as well (gloo in torch 2.8)."""
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, however that ended: nobody would stop it."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(LOST_RANK)


def launch(processes: int, restarts: int, arguments: Sequence[str]) -> int:
    """Run ``distilcache <arguments>`` in several processes until all have finished.

    Args:
        processes: How many; each takes one GPU where there are GPUs.
        restarts: How often all start again, from the newest checkpoint, after one is lost.
        arguments: Of the command line.

    Returns:
        The exit code.
    """
    os.environ["OMP_NUM_THREADS"] = threads_each(processes)
    for attempt in range(restarts + 1):
        code, reason = _attempt(processes, arguments)
        if code != LOST_RANK:
            if reason:
                print(f"distilcache: train: {reason}", file=sys.stderr)
            return code
        again = (
            f"starting again ({attempt + 1} of {restarts})" if attempt < restarts else "given up"
        )
        print(f"distilcache: train: {reason}; {again}", file=sys.stderr)
    return code


def _attempt(processes: int, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code, and the reason if no process has printed it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the launcher would repeat what is printed here
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "distilcache.pipeline.cli", *arguments)
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        reason = f"stopped by {name}; the same command goes on from the newest checkpoint"
        return 128 + error.sigval, reason
    except ChildFailedError as error:
        failures = error.failures.values()
        if any(failure.exitcode == BAD_INPUT for failure in failures):
            return BAD_INPUT, ""
        rank, first = error.get_first_failure()
        code = first.exitcode
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return LOST_RANK, f"rank {rank} ended with {name}"
    return 0, ""
