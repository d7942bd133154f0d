"""``distilcache student-sweep``: students of several sizes and seeds from one cache.

Each is a run of its own, in a process of its own device; what is finished is skipped, and one that
fails does not stop the others.
"""

import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.recipe import Recipe

WAIT_SECONDS = 1.0
"""Between looks at the workers, so that Ctrl-C is heard."""
COLUMNS = ("student", "seed", "params", "steps", "loss", "L_ce", "L_mlm", "L_cos", "tokens/s", "s")


@dataclass(frozen=True, slots=True)
class Run:
    """One student of a sweep."""

    size: str
    seed: int
    control: bool


def sweep_command(
    recipe: Recipe, sizes: Sequence[str], seeds: Sequence[int], workers: int
) -> tuple[list[dict[str, Any]], str, str | None]:
    """Train the students that are not finished yet.

    Args:
        recipe: The project.
        sizes: ``LAYERSxWIDTH``; none: the recipe's.
        seeds: Seeds of initialisation, order and dropout; none: the recipe's.
        workers: Students at a time, each on a device of its own where there are as many; 0: one
            per GPU, or one.

    Returns:
        Results for JSON, the text for people, and what failed in one line or None.

    Raises:
        UserError: Bad input; nothing is trained then.
    """
    from data.cache import Cache
    from stages.student_train.signals import required_signals

    runs = list(_runs(recipe, sizes or recipe.student.sizes, seeds or (recipe.train.seed,)))
    required_signals(Cache.open(recipe.finished_cache).encoding, recipe.train)
    results = _train_all(recipe, runs, workers)
    failed = [r for r in results if "error" in r]
    text = format_results([r for r in results if "error" not in r])
    lines = [f"student-sweep: {r['name']} failed: {r['error']}" for r in failed]
    summary = None
    if failed:
        names = ", ".join(r["name"] for r in failed)
        summary = (
            f"student-sweep: all {len(results)} students must be trained, got {len(failed)} that "
            f"failed ({names}; see above); the same command tries them again"
        )
    return results, "\n".join([text, *lines]), summary


def _runs(recipe: Recipe, sizes: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    for size in sizes:
        recipe.student.parse(size)
    for seed in seeds:
        replace(recipe.train, seed=seed)  # checks its range
    for size in dict.fromkeys(sizes):
        for seed in dict.fromkeys(seeds):
            yield Run(size, seed, control=False)
            if recipe.student.control:
                yield Run(size, seed, control=True)


def _train_all(recipe: Recipe, runs: list[Run], workers: int) -> list[dict[str, Any]]:
    """Results in the order of ``runs``; those that failed have an ``error``."""
    from pipeline.flow import student_name
    from stages.teacher_cache.engines.local import LocalCrew, places

    waiting = list(reversed(runs))
    busy: dict[Hashable, Run] = {}
    found: dict[Run, dict[str, Any]] = {}
    crew = LocalCrew(places(recipe.device, workers))
    finished = False
    try:
        while waiting or busy:
            while waiting and crew.room():
                run = waiting.pop()
                busy[crew.start(train_run, recipe, run)] = run
            for place, reply in crew.wait(WAIT_SECONDS):
                run = busy.pop(place)
                name = student_name(recipe, run.size, run.seed, control=run.control)
                error = reply.user_error or reply.failure or reply.lost
                found[run] = {"name": name, "size": run.size, "seed": run.seed}
                found[run] |= {"error": error} if error else reply.value
                state = f"failed: {error}" if error else "done"
                print(f"student-sweep: {name}: {state} ({len(found)}/{len(runs)})", file=sys.stderr)
        finished = True
    finally:
        crew.close(kill=not finished)
    return [found[run] for run in runs]


def train_run(recipe: Recipe, run: Run) -> dict[str, Any]:
    """Train one student; what a worker is asked for."""
    from tqdm import tqdm

    from pipeline.flow import train_one

    tqdm.set_lock(threading.RLock())  # Its own is shared by processes, and left behind by workers.
    return train_one(recipe, run.size, seed=run.seed, control=run.control)


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """One aligned line per finished student."""
    from pipeline.report.table import short_count

    rows = [list(COLUMNS)]
    for r in results:
        terms = [f"{r[t]:.4f}" if t in r else "-" for t in ("loss", "ce", "mlm", "cos")]
        rate = [f"{r['tokens_per_s']:,.0f}", f"{r['seconds']:,.0f}"]
        counts = [str(r["seed"]), short_count(r["parameters"]), str(r["steps"])]
        rows.append([r["name"], *counts, *terms, *rate])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
