"""Is a student trained from the cache the student that a live teacher would have made?

The same student, seeds, batches and steps with the teacher beside it and from caches:

    a        teacher live, full distribution, masked positions (weights 5/2/1, T = 2)
    a_all    the same at all positions: the published recipe
    b        the default cache: coded hidden states and 8 exact logits
    b_extra  the same at the masked and a tenth of the other positions, weighted
    c8, c64  the 8 or 64 largest logits alone, the rest as one bucket; no L_cos
    c50      50 draws from the softened distribution alone; no L_cos
    d        no teacher: L_mlm alone

    python -m benchmarks.offline_equals_online --out runs/offline_equals_online

Every (arm, seed) leaves a file and is skipped when it is there; an interrupted training goes on.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks.common import benchmark, need_paths
from benchmarks.comparison import comparison_options, finished_parts, publish

NAMES = ("a", "a_all", "b", "b_extra", "c8", "c64", "c50", "d")


@benchmark
@comparison_options(
    NAMES,
    steps=250,
    out="runs/offline_equals_online",
    room="by default about 0.2 GB, and 0.6 GB per training under way",
)
@click.option("--save-steps", default=125, help="Steps between checkpoints.")
@click.option("--keep", is_flag=True, help="Keep the trained models.")
@click.option("--summary", "only_sum", is_flag=True, help="Train nothing; sum up what is there.")
def main(
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    only_prepare: bool,
    only_sum: bool,
    json_path: Path | None,
    plot: Path | None,
    **settings: Any,
) -> None:
    """Students from a live teacher against students from caches, on held-out text.

    Parts may run one after another or side by side (--arms, --seeds; first --prepare). Whichever
    ends last finds all parts done and prints the summary.
    """
    if not only_sum:
        need_paths(**{name: settings[name] for name in ("teacher", "text", "heldout")})
        from benchmarks.arms import ARMS, Plan, prepare, run_part

        plan = Plan(**settings)
        plan.settle()
        for name in dict.fromkeys(("a", *arms)):
            prepare(plan, ARMS[name])
        for seed, name in () if only_prepare else product(seeds, arms):
            run_part(plan, ARMS[name], seed)
    if not only_prepare:
        report(settings["out"], only_sum, json_path, plot)


def report(out: Path, incomplete: bool, json_path: Path | None, plot: Path | None) -> None:
    """Print and write the summary, or say which parts are still to be done."""
    from benchmarks.online_report import draw, summarise, tables
    from distilcache.data.errors import require
    from distilcache.data.storage.files import write_bytes

    results, missing = found_parts(out)
    if missing and not incomplete:
        click.echo(f"still to be done: {', '.join(missing)}", err=True)
        return
    require(bool(results), f"benchmark: {out} must hold a finished part, got none")
    summary = summarise(results)
    publish(out, results, summary, tables, json_path)
    if plot is not None:
        write_bytes(plot, draw(summary, results))


def found_parts(out: Path) -> tuple[list[dict[str, Any]], Sequence[str]]:
    """Results in order of arms and seeds; names of the parts that other arms have and one lacks."""
    results = finished_parts(out, NAMES)
    there = {(r["arm"], r["seed"]) for r in results}
    seeds = sorted({seed for _, seed in there})
    missing = [f"{arm}-{seed}" for arm in NAMES for seed in seeds if (arm, seed) not in there]
    return results, missing


if __name__ == "__main__":
    main()
