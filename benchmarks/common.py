"""What the benchmarks share: the machine they ran on, spreads, tables, results as JSON."""

import json
import lzma
import os
import platform
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click

from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import write_bytes

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Teacher and text of the default runs, beside the checkout."""
Command = Callable[..., None]


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine and versions that figures hold for.

    Args:
        device: Where the work was done, as ``--device`` says it; a CUDA device is named by its
            model.
    """
    import torch

    from distilcache.stages.models.device import resolve_device

    target = resolve_device(device)
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def machine_line(values: dict[str, Any]) -> str:
    """:func:`environment` as one line for the foot of a table."""
    device = "" if values["device"] == "cpu" else f", {values['device']}"
    return (
        f"Machine: {values['cpu']}, {values['cores']} cores, {values['threads']} threads{device}; "
        f"torch {values['torch']}, Python {values['python']}; {values['date']}."
    )


@dataclass(frozen=True, slots=True)
class Median:
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float


def median_of(values: Sequence[float]) -> Median:
    """Median and quartiles; one value stands for all three."""
    if len(values) == 1:
        return Median(values[0], values[0], values[0])
    q1, middle, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Median(middle, q1, q3)


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean and sample standard deviation (divisor n - 1)."""

    mean: float
    sd: float | None
    """None for a single value."""


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and spread of a few runs."""
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns for a terminal.

    Args:
        headings: One per column.
        rows: Cells.
        left: That many first columns read as text; the others are figures and line up right.
    """
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headings), rule, *map(line, rows)])


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same columns in Markdown."""
    marks = ["---" if i < left else "---:" for i in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, marks, *rows])


def write_results(path: Path, values: Any) -> None:
    """Write figures as JSON, in the order in which they were made."""
    write_bytes(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


class Figures:
    """Figures that are written as they come.

    Args:
        path: JSON file; it is there and whole after each addition.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, dict[str, Any]()

    def add(self, **values: Any) -> None:
        """Write some more, and print them."""
        self.values |= values
        write_results(self.path, self.values)
        click.echo(json.dumps(values, default=str))


def conclude(json_path: Path | None, device: str = "cpu", **figures: Any) -> None:
    """Name the machine below what was printed; write the figures with it where asked for."""
    machine = environment(device)
    click.echo(machine_line(machine))
    if json_path is not None:
        write_results(json_path, {"environment": machine, **figures})


def excerpt(path: Path, characters: int) -> str:
    """The first ``characters`` of a text file, ``.xz`` or plain.

    Raises:
        UserError: The file is not there.
    """
    need_paths(text=path)
    opener: Callable[..., Any] = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text: str = file.read(characters)
    return text


def need_paths(**paths: Path) -> None:
    """Refuse to start without the files that a benchmark reads.

    Args:
        paths: Name of the option (underscores for dashes) to its value.

    Raises:
        UserError: Some are not there; one line names them all with their options.
    """
    missing = [f"--{n.replace('_', '-')} {p}" for n, p in paths.items() if not p.exists()]
    require(
        not missing,
        f"benchmark: files must be there, got none at {', '.join(missing)}; pass paths of your "
        "own, or put the shared folder beside the checkout",
    )


def names_among(option: str, text: str, known: Collection[str]) -> list[str]:
    """Names that an option lists, with commas or spaces between them.

    Raises:
        UserError: Some are not known.
    """
    found = text.replace(",", " ").split()
    wrong = [name for name in found if name not in known]
    require(
        not wrong,
        f"benchmark: --{option} must be among {', '.join(known)}, got {', '.join(wrong)}",
    )
    return found


class _Command(click.Command):
    """Turns bad input into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(str(error), err=True)
            ctx.exit(2)


def benchmark(function: Callable[..., None]) -> click.Command:
    """A command that shows its defaults and refuses bad input in one line."""
    settings = {"show_default": True, "max_content_width": 100}
    return click.command(cls=_Command, context_settings=settings)(function)


def source_options(command: Command) -> Command:
    """``--teacher``, ``--text`` and ``--json``."""
    path = click.Path(path_type=Path)
    corpus = SHARED / "corpus" / "wiki_train_10MB.txt.xz"
    for option in (
        click.option("--json", "json_path", type=path, help="Write figures here."),
        click.option(
            "--text",
            type=path,
            default=corpus,
            show_default="../shared/corpus/wiki_train_10MB.txt.xz",
            help="Plain text, .xz or not.",
        ),
        click.option(
            "--teacher",
            type=path,
            default=SHARED / "teacher",
            show_default="../shared/teacher",
            help="Masked-LM checkpoint.",
        ),
    ):
        command = option(command)
    return command


def run_options(out: str, repetitions: int) -> Callable[[Command], Command]:
    """``--repetitions`` and ``--out`` with these defaults."""

    def add(command: Command) -> Command:
        path = click.Path(path_type=Path)
        folder = click.option("--out", default=out, type=path, help="Work folder.")
        turns = click.option("--repetitions", default=repetitions, help="Interleaved repetitions.")
        return turns(folder(command))

    return add


def device_options(command: Command) -> Command:
    """``--device`` and ``--dtype``."""
    for option in (
        click.option("--dtype", default="auto", help="auto, bfloat16 or float32."),
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
    ):
        command = option(command)
    return command
