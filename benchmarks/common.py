"""What the benchmarks share: options, repetitions in turns, spreads, tables, the machine."""

import functools
import json
import lzma
import os
import platform
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import click

from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import write_bytes

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Default teacher and text, beside the checkout."""
PATH = click.Path(path_type=Path)

T = TypeVar("T")
Command = Callable[..., Any]


# Machine


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions that figures hold for; a CUDA device is named by its model."""
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
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def machine_line(values: Mapping[str, Any]) -> str:
    """:func:`environment` as one line below a table."""
    device = "" if values["device"] == "cpu" else f", {values['device']}"
    return (
        f"Machine: {values['cpu']}, {values['cores']} cores, {values['threads']} threads{device}; "
        f"torch {values['torch']}, Python {values['python']}; {values['date']}."
    )


# Repeated measurements


def take_turns(
    arms: Mapping[str, Callable[[int], T]], repetitions: int, *, warm_up: bool = False
) -> dict[str, list[T]]:
    """Call every arm once per repetition, with its number, one after the other.

    ``warm_up``: run a first repetition whose results are dropped.
    """
    found: dict[str, list[T]] = {name: [] for name in arms}
    for repetition in range(repetitions + warm_up):
        for name, arm in arms.items():
            found[name].append(arm(repetition))
    return {name: values[warm_up:] for name, values in found.items()}


def ratios_to(found: Mapping[str, Sequence[float]], name: str) -> dict[str, list[float]]:
    """One arm over each of the others, repetition by repetition."""
    return {
        f"{name} / {other}": [a / b for a, b in zip(found[name], values, strict=True)]
        for other, values in found.items()
        if other != name
    }


@dataclass(frozen=True, slots=True)
class Median:
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float

    def __format__(self, form: str) -> str:
        """``median [q1, q3]``, each in the given format."""
        return f"{self.median:{form}} [{self.q1:{form}}, {self.q3:{form}}]"


def median_of(values: Sequence[float]) -> Median:
    """Median and quartiles; a single value is all three."""
    if len(values) == 1:
        return Median(values[0], values[0], values[0])
    q1, middle, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Median(middle, q1, q3)


# Results


def write_results(path: Path, values: Any) -> None:
    """Write figures as JSON, in the order in which they were made."""
    write_bytes(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


class Figures:
    """Figures that are written as they come, to a JSON file that is whole after each addition."""

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, dict[str, Any]()

    def add(self, **values: Any) -> None:
        """Write some more, and print them."""
        self.values |= values
        write_results(self.path, self.values)
        click.echo(json.dumps(values, default=str))


# Input


def excerpt(path: Path, characters: int) -> str:
    """The first characters of a text file, ``.xz`` or plain."""
    need_paths(text=path)
    opener: Callable[..., Any] = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text: str = file.read(characters)
    return text


def need_paths(**paths: Path) -> None:
    """Check that the files of a benchmark are there, each by the name of its option.

    Raises:
        UserError: Some are missing; one line names them all with their options.
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


# Commands


class _Command(click.Command):
    """Turns bad input into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(str(error), err=True)
            ctx.exit(2)


def checked_command(function: Callable[..., Any]) -> click.Command:
    """A command that shows its defaults and refuses bad input in one line."""
    shown = {"show_default": True, "max_content_width": 100}
    return click.command(cls=_Command, context_settings=shown)(function)


def benchmark(function: Callable[..., Mapping[str, Any] | None]) -> click.Command:
    """Make a command of a function that prints a table and returns its figures.

    The command names the machine below the table and has an option ``--json`` that writes the
    figures. None: there are no figures yet.
    """

    @functools.wraps(function)
    def run(json_path: Path | None, **settings: Any) -> None:
        figures = function(**settings)
        if figures is None:
            return
        machine = figures.get("environment") or environment(settings.get("device", "cpu"))
        click.echo(machine_line(machine))
        if json_path is not None:
            write_results(json_path, {"environment": machine, **figures})

    add_json = click.option("--json", "json_path", type=PATH, help="Write figures here.")
    return checked_command(add_json(run))


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator."""

    def add(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


source_options = options(
    click.option(
        "--teacher",
        type=PATH,
        default=SHARED / "teacher",
        show_default="../shared/teacher",
        help="Masked-LM checkpoint.",
    ),
    click.option(
        "--text",
        type=PATH,
        default=SHARED / "corpus" / "wiki_train_10MB.txt.xz",
        show_default="../shared/corpus/wiki_train_10MB.txt.xz",
        help="Plain text, .xz or not.",
    ),
)
device_options = options(
    click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
    click.option("--dtype", default="auto", help="auto, bfloat16 or float32."),
)


def run_options(out: str, repetitions: int) -> Callable[[Command], Command]:
    """``--repetitions`` and ``--out`` with these defaults."""
    return options(
        click.option("--repetitions", default=repetitions, help="Of each arm; arms take turns."),
        click.option("--out", default=out, type=PATH, help="Work folder."),
    )
