"""What comparisons of arms and seeds share: their options, their parts and what is written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.common import (
    SHARED,
    Command,
    device_options,
    machine_line,
    mean_of,
    source_options,
    write_results,
)
from distilcache.data.storage.files import read_json, write_bytes

_PATH = click.Path(path_type=Path)


def comparison_options(
    arms: Sequence[str], *, steps: int, out: str, room: str
) -> Callable[[Command], Command]:
    """Options of a comparison; those of :class:`benchmarks.arms.Plan` have its fields' names.

    Args:
        arms: Names that ``--arms`` may give; all of them by default.
        steps: Of one training by default.
        out: Work folder by default.
        room: What the work folder takes, for its help.
    """

    def names(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in text.split(","))
        wrong = [name for name in found if name not in arms]
        if wrong:
            raise click.BadParameter(f"must be among {', '.join(arms)}, got {', '.join(wrong)}")
        return found

    options = (
        source_options,
        click.option(
            "--heldout",
            type=_PATH,
            default=SHARED / "corpus" / "wiki_valid_2MB.txt.xz",
            show_default="../shared/corpus/wiki_valid_2MB.txt.xz",
            help="Text that quality is measured on.",
        ),
        click.option(
            "--arms",
            callback=names,
            default=",".join(arms),
            metavar="ARM,ARM",
            help="Arms of this part.",
        ),
        click.option(
            "--seeds", callback=_seeds, default="0,1,2", metavar="N,N", help="Seeds of this part."
        ),
        click.option("--size", default="3x384", metavar="LAYERSxWIDTH", help="Student."),
        click.option("--steps", default=steps, help="Optimizer steps per training."),
        click.option("--batch-size", default=16, help="Sequences per step."),
        click.option("--max-length", default=128, help="Tokens per sequence."),
        click.option("--lr", default=3e-4, help="Peak learning rate of AdamW."),
        click.option(
            "--max-bytes",
            default=0,
            show_default="enough that no sequence comes twice",
            help="Bytes of training text.",
        ),
        click.option("--heldout-sequences", default=512, help="Of held-out text."),
        device_options,
        click.option("--out", type=_PATH, default=Path(out), help=f"Work folder; {room}."),
        click.option(
            "--prepare", "only_prepare", is_flag=True, help="Make corpus and caches, then stop."
        ),
        click.option("--plot", type=_PATH, help="Write the figures by arm here (PNG)."),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _seeds(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"must be whole numbers with commas, got {text!r}")
    return tuple(int(part) for part in parts)


def finished_parts(out: Path, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Results that are there, in order of arms and seeds."""
    results = [read_json(p, "benchmark: result") for p in (out / "results").glob("*.json")]
    return sorted(results, key=lambda r: (arms.index(r["arm"]), r["seed"]))


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """``mean`` and ``sd`` of a figure over seeds."""
    return asdict(mean_of(values))


def paired(
    runs: Mapping[int, Mapping[str, float]],
    reference: Mapping[int, Mapping[str, float]],
    figures: Iterable[str],
) -> dict[str, Any]:
    """Mean and sd over common seeds of (arm - reference), per figure; nothing without any.

    Args:
        runs: Figures of an arm by seed.
        reference: Those of the one it is compared with.
        figures: Names of figures.
    """
    seeds = sorted(runs.keys() & reference.keys())
    return {f: spread_of([runs[s][f] - reference[s][f] for s in seeds]) for f in figures if seeds}


def with_sd(value: Mapping[str, Any] | None, form: str, missing: str = "") -> str:
    """``mean ± sd``, or what there is of it."""
    if value is None:
        return missing
    mean = format(value["mean"], form)
    return mean if value["sd"] is None else f"{mean} ± {format(value['sd'], form.lstrip('+'))}"


def publish(
    out: Path,
    results: list[dict[str, Any]],
    summary: Mapping[str, Any],
    tables: Callable[..., str],
    json_path: Path | None,
) -> None:
    """Print the summary and write it: as a page to the work folder, as figures where asked for."""
    machine = machine_line(results[-1]["environment"])
    click.echo(f"{tables(summary)}\n\n{machine}")
    write_bytes(out / "summary.md", f"{tables(summary, markdown=True)}\n\n{machine}\n".encode())
    if json_path is not None:
        shared = read_json(out / "plan.json", "benchmark: plan.json")
        write_results(json_path, {"plan": shared, "summary": summary, "results": results})
