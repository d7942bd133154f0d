"""Compare arms over several seeds: the command."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks.arms import Plan, prepare, run_arm
from benchmarks.common import (
    PATH,
    SHARED,
    Command,
    benchmark,
    device_options,
    machine_line,
    names_among,
    need_paths,
    options,
    source_options,
)
from benchmarks.comparison_summary import Comparison, draw, summarise, tables
from benchmarks.task_scores import task_scores, task_table
from distilcache.data.storage.files import read_json, write_bytes


def comparison_command(
    comparison: Comparison, *, about: str, steps: int, out: str
) -> click.Command:
    """The command that trains, measures and compares the arms; ``about`` begins its help."""

    @benchmark
    @source_options
    @_plan_options(steps)
    @_task_options(comparison)
    @device_options
    @click.option("--arms", default=",".join(comparison.names), help="Arms of this call.")
    @click.option("--seeds", callback=_seeds, default="0,1,2", help="Seeds of this call.")
    @click.option("--out", type=PATH, default=Path(out), help="Work folder; keeps results.")
    @click.option("--prepare", "only_prepare", is_flag=True, help="Make corpus and caches, stop.")
    @click.option("--plot", type=PATH, help="Draw the figures by arm here (PNG).")
    def main(
        arms: str,
        seeds: tuple[int, ...],
        only_prepare: bool,
        plot: Path | None,
        data: Path = SHARED,
        **settings: Any,
    ) -> Mapping[str, Any] | None:
        chosen = names_among("arms", arms, comparison.names)
        need_paths(**{name: settings[name] for name in ("teacher", "text", "heldout")})
        need_paths(**({"data": data} if comparison.tasks else {}))
        plan = Plan(**settings, keep=bool(comparison.tasks))
        plan.record()
        run = [arm for arm in comparison.arms if arm.name in chosen]
        for cache in ("masks", *(arm.cache for arm in run)):
            prepare(plan, cache)
        if only_prepare:
            return None
        for seed, arm in product(seeds, run):
            run_arm(plan, arm, seed)
        found = report(comparison, plan, [(arm.name, seed) for arm in run for seed in seeds], plot)
        if not comparison.tasks:
            return found
        scores = task_scores(plan, found["results"], comparison.tasks, data)
        click.echo(task_table(scores, {arm.name: arm.label for arm in comparison.arms}))
        return {**found, "tasks": scores}

    main.help = (
        f"{about}\n\nRuns may be spread over several calls side by side (--arms, --seeds; first "
        "--prepare). Finished runs are kept, an interrupted one goes on. Every call sums up the "
        "runs that it was asked for."
    )
    return main


def _plan_options(steps: int) -> Callable[[Command], Command]:
    """Options with the names of fields of :class:`benchmarks.arms.Plan`."""
    return options(
        click.option(
            "--heldout",
            type=PATH,
            default=SHARED / "corpus" / "wiki_valid_2MB.txt.xz",
            show_default="../shared/corpus/wiki_valid_2MB.txt.xz",
            help="Text that quality is measured on.",
        ),
        click.option("--size", default="3x384", metavar="LAYERSxWIDTH", help="Student."),
        click.option("--steps", default=steps, help="Optimizer steps per training."),
        click.option("--save-steps", default=125, help="Steps between checkpoints."),
        click.option("--batch-size", default=16, help="Sequences per step."),
        click.option("--max-length", default=128, help="Tokens per sequence."),
        click.option("--lr", default=3e-4, help="Peak learning rate of AdamW."),
        click.option(
            "--max-bytes",
            default=0,
            show_default="enough that no sequence comes twice, or all of it",
            help="Bytes of training text.",
        ),
        click.option("--heldout-sequences", default=512, help="Of held-out text."),
    )


def _task_options(comparison: Comparison) -> Callable[[Command], Command]:
    glue = click.option(
        "--data",
        type=PATH,
        default=SHARED / "glue",
        show_default="../shared/glue",
        help=f"Folder with {', '.join(comparison.tasks)}.",
    )
    return options(*([glue] if comparison.tasks else []))


def _seeds(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"must be whole numbers with commas, got {text!r}")
    return tuple(int(part) for part in parts)


def report(
    comparison: Comparison, plan: Plan, runs: Sequence[tuple[str, int]], plot: Path | None
) -> Mapping[str, Any]:
    """Print the summary of finished runs, by arm and seed, and write it to the work folder."""
    results = [read_json(plan.result(*run), "benchmark: result") for run in runs]
    summary = summarise(comparison, results)
    machine, shown = results[-1]["environment"], tables(comparison, summary)
    click.echo(f"{shown}\n")
    write_bytes(plan.out / "summary.md", f"{shown}\n\n{machine_line(machine)}\n".encode())
    if plot is not None:
        write_bytes(plot, draw(comparison, results))
    shared = read_json(plan.out / "plan.json", "benchmark: plan.json")
    return {"environment": machine, "plan": shared, "summary": summary, "results": results}
