"""``student-train --engine ray``: the ranks of each student are the workers of a Ray Train job.

Each worker runs what a process under torchrun runs. Ray finds machines for them and tells them each
other's addresses. Checkpoints are those of the student, not Ray's.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distilcache.data.errors import LOST_RANK, UserError, reason_of
from distilcache.data.storage.files import make_folder
from distilcache.data.storage.locks import joined as sharing
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.workers.ray_cluster import call_in, joined, missing, unit_of


def launch_on_ray(
    recipe: Recipe, sizes: Sequence[str], *, workers: int, restarts: int, address: str
) -> list[dict[str, Any]]:
    """Train students, each by several processes on a Ray cluster.

    Args:
        recipe: The project; all nodes must see its folder.
        sizes: ``LAYERSxWIDTH``; none: the recipe's.
        workers: Processes per student; each takes one GPU where the cluster has GPUs.
        restarts: How often all start again, from the newest checkpoint, after one is lost.
        address: Of a running cluster; "": RAY_ADDRESS, or one is started on this machine.

    Returns:
        Results of the first rank, see ``train_students``.

    Raises:
        UserError: A rank met bad input, or there is no cluster.
        SystemExit: A process was lost too often; the same command goes on.
    """
    # Ray Train would log what is printed, as errors.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    try:
        from ray.train import TrainingFailedError
    except ImportError:
        raise missing() from None
    with joined(address) as ray:
        unit = unit_of(ray, recipe.device)
        there = int(ray.cluster_resources().get(unit, 0))
        if there < workers:
            _say(f"waiting for {workers} free {unit}s, the cluster has {there}")
        for attempt in range(restarts + 1):
            try:
                return _fit(recipe, sizes, workers, use_gpu=unit == "GPU")
            except TrainingFailedError as error:
                reason = _reason(error)
            again = f"starting again ({attempt + 1} of {restarts})"
            _say(f"{reason}; {again if attempt < restarts else 'given up'}")
        sys.exit(LOST_RANK)


def _fit(recipe: Recipe, sizes: Sequence[str], workers: int, use_gpu: bool) -> list[dict[str, Any]]:
    """One attempt. Ray Train's own retries are off: they would repeat bad input too."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # In the main thread Ray Train would catch Ctrl-C and end with exit code 0.
    home = recipe.home.absolute()
    with _scratch(home / ".ray-train") as scratch, ThreadPoolExecutor(1) as thread:
        trainer = TorchTrainer(
            train_rank,
            train_loop_config={"folder": os.getcwd(), "recipe": recipe, "sizes": tuple(sizes)},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=RunConfig(
                name="student-train",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0),
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        try:
            results: list[dict[str, Any]] = thread.submit(trainer.fit).result().return_value
            return results
        except KeyboardInterrupt:
            import ray

            ray.shutdown()  # Ends the workers, and with them the thread.
            raise


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[str]:
    """A folder for Ray Train's own notes on one attempt; those of killed drivers are removed."""
    make_folder(folder)
    notes = TemporaryDirectory(".tmp", ".", folder, ignore_cleanup_errors=True)
    try:
        with sharing(folder), notes as own:
            yield own
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # Fails where another driver uses it.


def train_rank(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run in each worker: the same as in a process under torchrun."""
    from distilcache.pipeline.flow import train_students
    from distilcache.stages.student_train.ranks import leave_ranks

    # accelerate shall take the device of the rank's number, as all else here does.
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if os.environ["WORLD_SIZE"] == "1":
        leave_ranks()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    results: list[dict[str, Any]] = call_in(
        job["folder"], train_students, job["recipe"], job["sizes"]
    )
    return results


def _reason(error: Exception) -> str:
    """Why an attempt failed, in one line.

    Raises:
        UserError: A rank raised one; another attempt would raise it too.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for rank in sorted(failures):
        if isinstance(failures[rank], UserError):
            raise UserError(str(failures[rank])) from None
    ranks = ", ".join(map(str, sorted(failures)))
    first = failures[min(failures)] if failures else error
    text = reason_of(first)
    return f"lost rank {ranks}: {text}" if failures else text


def _say(text: str) -> None:
    print(f"distilcache: train: {text}", file=sys.stderr)
