"""``distilcache student-sweep``: students of several sizes, settings and seeds from one cache.

Each student is a run in a process of its own. Finished ones are skipped, and one that fails does
not stop the others.
"""

import sys
import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import click

from distilcache.data.errors import InUse, UserError, tell
from distilcache.data.storage.locks import in_use
from distilcache.pipeline.options import recipe_options, say_evaluate, show, size_option
from distilcache.pipeline.ranks.ray_options import check_address, ray_options
from distilcache.pipeline.recipe import Recipe, override_recipe
from distilcache.pipeline.sweep.runs import Run, runs_of

if TYPE_CHECKING:
    from distilcache.stages.workers.pool import Pool

WAIT_SECONDS = 1.0
"""How long to wait for a worker before Ctrl-C is handled."""
SAVE_SECONDS = 60.0
"""For workers that were told to stop: a step of training, and a checkpoint."""


@click.command("student-sweep", short_help="Students of several sizes, settings and seeds.")
@recipe_options
@size_option
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=int,
    metavar="N",
    help="Seed of initialisation, order and dropout; may be repeated.  [default: the recipe's "
    "train.seed]",
)
@click.option(
    "--vary",
    multiple=True,
    metavar="FIELD=A,B",
    help="Train with each of these values, e.g. train.alpha_cos=0,1; if repeated, with all "
    "combinations.",
)
@click.option("--evaluate", is_flag=True, help="Measure and compare all students afterwards.")
@click.option(
    "--workers",
    default=0,
    type=click.IntRange(min=0),
    metavar="N",
    help="Students at a time, each on a GPU of its own.  [default: one per GPU, else one]",
)
@ray_options("Where students are trained: on this machine, or as tasks on a Ray cluster.")
def student_sweep(
    recipe: Any,
    as_json: bool,
    sizes: Sequence[str],
    seeds: Sequence[int],
    vary: Sequence[str],
    evaluate: bool,
    workers: int,
    engine: str,
    ray_address: str | None,
) -> None:
    """Train students of all sizes, settings and seeds from one cache; finished ones are skipped.

    One that fails does not stop the others; the exit code is 2 then, with a line for each. With
    --evaluate, ROOT/NAME/report holds the comparison: sweep.md, sweep.json, pareto.png.
    """
    from distilcache.data.cache.cache import Cache
    from distilcache.pipeline.measured import tell_other_inputs
    from distilcache.stages.student_train.signals import required_signals

    check_address(engine, ray_address)
    runs = list(runs_of(recipe, sizes or recipe.student.sizes, seeds or (recipe.train.seed,), vary))
    encoding = Cache.open(recipe.finished_cache).encoding
    for run in runs:
        varied = override_recipe(recipe, run.settings)
        required_signals(encoding, varied.train, trimmed=varied.student.vocabulary != 1)
    if not recipe.cache_from:
        tell_other_inputs(recipe, "student-sweep")
    results = _train_all(recipe, runs, _pool(recipe, workers, engine, ray_address))
    failed = [r for r in results if "error" in r]
    text = format_results([r for r in results if "error" not in r])
    lines = [f"student-sweep: {r['name']} failed: {r['error']}" for r in failed]
    parts = ["\n".join([text, *lines])]
    if evaluate and len(failed) < len(results):
        parts.append(_evaluated(recipe))
    show(results, "\n\n".join(parts), as_json)
    if failed:
        names = ", ".join(r["name"] for r in failed)
        raise UserError(
            f"student-sweep: all {len(results)} students must be trained, got {len(failed)} that "
            f"failed ({names}; see above); put that right and run the same command, which trains "
            "the rest"
        )
    if not evaluate:
        say_evaluate(recipe)


def _evaluated(recipe: Recipe) -> str:
    """Compare all trained students, and write the report."""
    from distilcache.pipeline import flow
    from distilcache.pipeline.report.pareto import sweep_rows, sweep_table

    rows = sweep_rows(flow.evaluate(recipe)["models"], recipe.home / "students")
    report = recipe.home / "report"
    page = report / "sweep.md"  # one student alone has none
    return f"{sweep_table(rows)}\n\nreport: {page if page.is_file() else report / 'report.md'}"


def _pool(recipe: Recipe, workers: int, engine: str, ray_address: str | None) -> "Pool":
    """The workers that train."""
    if engine == "ray":
        from distilcache.pipeline.sweep.ray_sweep import StudentPool

        return StudentPool(recipe.device, workers, ray_address or recipe.engine.ray_address)
    from distilcache.stages.workers.pool import LocalPool, places

    return LocalPool(places(recipe.device, workers))


def _train_all(recipe: Recipe, runs: list[Run], pool: "Pool") -> list[dict[str, Any]]:
    """Results in the order of ``runs``; those that failed have an ``error``.

    A student that another process trains is left to it, and looked for again in the end.
    """
    from distilcache.pipeline.flow import student_name

    names = {
        run: student_name(recipe, run.size, run.seed, control=run.control, label=run.label)
        for run in runs
    }
    waiting = list(runs)
    busy: dict[Hashable, Run] = {}
    found: dict[Run, dict[str, Any]] = {}
    try:
        while waiting or busy:
            for run in list(waiting):
                if pool.room() <= 0:
                    break
                if in_use(recipe.home / "students" / names[run]):
                    tell(f"student-sweep: {names[run]}: another process trains it; waits for it")
                    continue
                waiting.remove(run)
                busy[pool.start(train_run, recipe, run)] = run
            if not busy:
                time.sleep(WAIT_SECONDS)
                continue
            for place, reply in pool.wait(WAIT_SECONDS):
                run = busy.pop(place)
                error = reply.user_error or reply.failure
                if not (error or reply.value):
                    waiting.append(run)
                    continue
                found[run] = {"name": names[run], "size": run.size, "seed": run.seed}
                found[run] |= {"settings": list(run.settings)} if run.settings else {}
                found[run] |= {"error": error} if error else reply.value
                state = f"failed: {error}" if error else "done"
                _say(f"{names[run]}: {state} ({len(found)}/{len(runs)})")
    except KeyboardInterrupt:
        _save(pool, {place: names[run] for place, run in busy.items()})
        raise
    finally:
        pool.close(kill=len(found) < len(runs))
    return [found[run] for run in runs]


def _save(pool: "Pool", busy: dict[Hashable, str]) -> None:
    """Stop students in training at a checkpoint; a second signal ends the wait."""
    pool.stop()
    deadline = time.monotonic() + SAVE_SECONDS
    while busy and (left := deadline - time.monotonic()) > 0:
        for place, reply in pool.wait(min(left, WAIT_SECONDS)):
            name = busy.pop(place)
            if reply.user_error:
                _say(f"{name}: {reply.user_error}")


def _say(line: str) -> None:
    print(f"student-sweep: {line}", file=sys.stderr)


def train_run(recipe: Recipe, run: Run) -> dict[str, Any] | None:
    """Train one student, in a worker; None: another process has begun with it."""
    from distilcache.data.progress import share_no_lock
    from distilcache.pipeline.flow import train_one

    share_no_lock()  # in a worker of Ray; a killed one may keep it
    varied = override_recipe(recipe, run.settings)
    try:
        return train_one(varied, run.size, seed=run.seed, control=run.control, label=run.label)
    except InUse:
        return None


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A table with a row per finished student."""
    from distilcache.pipeline.report.text import short_count, text_table
    from distilcache.stages.student_train.model import TERMS

    there = [term for term in TERMS if any(term in result for result in results)]
    losses = ("loss", *(f"L_{term}" for term in there))
    columns = ("student", "seed", "params", "steps", *losses, "tokens/s", "s")
    rows = []
    for r in results:
        terms = [f"{r[t]:.4f}" if t in r else "-" for t in ("loss", *there)]
        rate = [f"{r['tokens_per_s']:,.0f}", f"{r['seconds']:,.0f}"]
        counts = [str(r["seed"]), short_count(r["parameters"]), str(r["steps"])]
        rows.append([r["name"], *counts, *terms, *rate])
    return text_table(columns, rows)
