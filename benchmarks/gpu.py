"""Everything that is measured on a GPU, the most valuable first, within a few minutes.

Each part is a process of its own with a time limit. What it found is added to ``DIR/gpu.json`` and
printed as soon as it ends, so a run that is cut short leaves what it had. A part that fails says
so, and the next one starts; its output is in ``DIR/<part>.log``.

    python -m benchmarks.gpu --minutes 8 --out runs/gpu
    python -m benchmarks.gpu --rehearse          # every part on the CPU, with tiny sizes
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.common import PATH, SHARED, checked_command, environment, need_paths, write_results
from benchmarks.gpu_report import lines_of, update_page
from benchmarks.teachers import rehearsal_data

SIZES = ("6x768", "3x768", "4x312", "2x128")
LAST_SHARE = 0.2
"""Of the whole time, kept for the last part: the limits of the others come to more than 1, so that
one that takes long is not cut where the rest is quick."""
REAL_SECONDS = 30.0
"""Without so much time left the last part is not worth its start."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process."""

    name: str
    fraction: float
    """Of the whole time at most; 1: all that is left."""
    arguments: tuple[str, ...]
    """Of ``python -m``. ``{seconds}`` becomes the part's limit."""


def parts(data: Path, out: Path, device: str, *, tiny: bool) -> Iterator[Part]:
    """All parts, the most valuable first.

    ``data`` is a folder with ``teacher/``, ``corpus/`` and ``glue/``; ``tiny``: sizes for a
    rehearsal on a CPU.
    """
    on = ("--device", device)
    teacher = ("--teacher", str(data / "teacher"))
    text = ("--text", str(data / "corpus" / "wiki_train_10MB.txt.xz"))
    common = (*teacher, *text, *on)
    size = "2x32" if tiny else "12x768"

    def part(name: str, fraction: float, *arguments: str) -> Part:
        fraction = 1.0 if tiny else fraction
        return Part(name, fraction, (*arguments, "--json", str(out / f"{name}.json")))

    yield part("card", 0.06, "benchmarks.gpu_parts", "card", *on)
    yield Part("tests", 0.15, ("pytest", "-q", "-n", "0", "tests/stages/test_gpu.py"))
    repeat = ("--blocks", "2" if tiny else "8")
    yield part("right", 0.15, "benchmarks.gpu_parts", "right", *common, *repeat)
    for length in (16, 32) if tiny else (128, 512):
        tokens = 2**9 if tiny else 2**20
        yield part(
            f"stage_one_{length}",
            0.12,
            *("benchmarks.stage_one", "--size", size, "--length", str(length)),
            *("--sequences", str(tokens // length), "--repetitions", "1" if tiny else "3"),
            *("--out", str(out / "stage_one"), *common),
        )
    batch = ("--batch-size", "4" if tiny else "256", "--steps", "4" if tiny else "12")
    for student in ("1x32",) if tiny else SIZES:
        yield part(
            f"stage_two_{student}",
            0.08,
            *("benchmarks.stage_two", "--teacher-size", size, "--sizes", student, *batch),
            *("--repetitions", "1" if tiny else "2", "--out", str(out / "stage_two"), *common),
        )
    student = "1x32" if tiny else SIZES[0]
    yield part(
        "training",
        0.12,
        *("benchmarks.gpu_parts", "training", "--teacher-size", size, "--sizes", student),
        *(*batch, "--out", str(out / "stage_two"), *common),
    )
    yield part(
        "real",
        1.0,
        *("benchmarks.gpu_parts", "real", "--data", str(data), "--out", str(out / "real"), *on),
        *("--size", "1x32" if tiny else "3x384", "--seconds", "15" if tiny else "{seconds}"),
        *(("--limit", "16") if tiny else ()),
    )


def run_part(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part and read what it found.

    Returns:
        ``seconds``, ``state`` (``done``, ``failed``, ``out of time``) and its ``figures``, which a
        part that was cut may have written in part.
    """
    words = [word.format(seconds=int(seconds)) for word in part.arguments]
    begun = time.monotonic()
    with open(out / f"{part.name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], stdout=log, stderr=log, start_new_session=True
        )
        try:
            state = "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = out / f"{part.name}.json"
    closing = (out / f"{part.name}.log").read_text(encoding="utf-8").splitlines()[-1:]
    figures = {"ends in": closing[0].strip("= ")} if closing else {}
    if found.exists():
        figures = json.loads(found.read_text(encoding="utf-8"))
    return {"seconds": round(time.monotonic() - begun, 1), "state": state, "figures": figures}


def run_all(chosen: Sequence[Part], out: Path, minutes: float, device: str) -> dict[str, Any]:
    """Run parts until the time is over; ``out/gpu.json`` has the results after each one."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    results: dict[str, Any] = {"environment": environment(device), "parts": {}}
    for number, part in enumerate(chosen, start=1):
        kept = 0.0 if number == len(chosen) else 60 * minutes * LAST_SHARE
        left = end - time.monotonic() - kept
        limit = min(left, 60 * minutes * part.fraction)
        if left < (REAL_SECONDS if part.fraction == 1 else 1):
            click.echo(f"{part.name}: no time left")
            continue
        (out / f"{part.name}.json").unlink(missing_ok=True)
        results["parts"][part.name] = run_part(part, out, limit)
        write_results(out / "gpu.json", results)
        click.echo("\n".join(lines_of(part.name, results["parts"][part.name])))
    return results


@checked_command
@click.option("--minutes", default=8.0, help="For all parts together.")
@click.option("--out", default="runs/gpu", type=PATH, help="Work folder.")
@click.option(
    "--data",
    default=SHARED,
    show_default="../shared",
    type=PATH,
    help="Folder with teacher/, corpus/ and glue/, as benchmarks/gpu_pack.sh packs it.",
)
@click.option("--device", default="cuda", help="cuda or cuda:N.")
@click.option("--only", default="", metavar="PART,PART", help="Parts by the start of their names.")
@click.option("--rehearse", is_flag=True, help="On the CPU, tiny, with texts of this project.")
@click.option("--write-docs", is_flag=True, help="Fill the section of docs/benchmarks.md.")
def main(
    minutes: float,
    out: Path,
    data: Path,
    device: str,
    only: str,
    rehearse: bool,
    write_docs: bool,
) -> None:
    """Measure on a GPU, the most valuable first."""
    if rehearse:
        device, data = "cpu", rehearsal_data(out / "data")
    need_paths(data=data / "teacher")
    names = tuple(name for name in only.split(",") if name)
    chosen = [
        part
        for part in parts(data, out, device, tiny=rehearse)
        if not names or part.name.startswith(names)
    ]
    results = run_all(chosen, out, minutes, device)
    if write_docs:
        update_page(results)
    wrong = [name for name, found in results["parts"].items() if found["state"] != "done"]
    click.echo(f"{len(results['parts']) - len(wrong)} of {len(chosen)} parts done")
    if wrong or len(results["parts"]) < len(chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
