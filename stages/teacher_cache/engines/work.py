"""What a worker of any engine does: it is called with what is asked for, and answers in a line.

A process loads the teacher once, whatever the number of its calls. Errors are answers, too: no
exception has to travel between processes.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from distilcache.data.errors import UserError
from distilcache.stages.teacher_cache.engines.base import one_line
from distilcache.stages.teacher_cache.pipeline import run_shards
from distilcache.stages.teacher_cache.run import Build, begun_identity, finish, open_job, prepare
from distilcache.stages.teacher_cache.task import Job, ShardTask, done_marker


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a call."""

    value: Any = None
    user_error: str | None = None
    """Bad input or storage: ends the run."""
    failure: str | None = None
    """Any other exception, in one line: the work is tried again."""
    lost: str | None = None
    """The worker ended; said by the engine in its place."""


_job: tuple[Build, Job] | None = None
"""The job that this process has open; one is enough, since a worker serves one build."""


def answer(function: Callable[..., Any], *args: Any) -> Reply:
    """Call ``function(*args)`` and pack what comes of it."""
    try:
        return Reply(value=function(*args))
    except UserError as error:
        return Reply(user_error=str(error))
    except Exception as error:
        traceback.print_exc()
        return Reply(failure=one_line(error))


def prepare_build(build: Build) -> None:
    """First phase; keeps the teacher for the shards to come."""
    global _job
    _job = (build, prepare(build))


def make_shards(build: Build, tasks: Sequence[ShardTask]) -> float:
    """Second phase: compute those of the shards that are not there; returns seconds per shard."""
    job = _opened(build)
    missing = [task for task in tasks if done_marker(job.out, task, job.identity) is None]
    start = time.perf_counter()  # without what the teacher takes to load
    with closing(run_shards(job, missing, lambda tokens: None)) as made:
        for _ in made:
            pass
    return (time.perf_counter() - start) / max(1, len(missing))


def finish_build(build: Build) -> None:
    """Third phase."""
    finish(_opened(build))


def _opened(build: Build) -> Job:
    global _job
    if _job is None or _job[0] != build or _job[1].identity != begun_identity(build.out):
        _job = None  # no room for two teachers
        _job = (build, open_job(build))
    return _job[1]
