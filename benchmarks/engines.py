"""What an engine costs: stage one by each of them on one device, as whole commands.

The arms take turns. The rate is measured from the end of the preparations, when the codecs are
written, to the last shard's commit marker. So it leaves out what starts once (imports, the teacher,
a Ray cluster; see the column of whole commands), and counts the time between shards. Caches of one
repetition must hold the same bytes.

    python -m benchmarks.engines --sequences 4096 --repetitions 3
"""

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from benchmarks.common import (
    benchmark,
    device_options,
    excerpt,
    median_of,
    names_among,
    need_paths,
    run_options,
    source_options,
)
from benchmarks.usage import ROOT, check_success, command_line
from distilcache.data.errors import require
from distilcache.data.storage.files import read_json
from distilcache.pipeline.report.text import markdown_table

ARMS = {
    "in-process": ("--engine", "in-process"),
    "local": ("--engine", "local", "--workers", "1"),
    "ray": ("--engine", "ray", "--workers", "1"),
    "slurm": ("--engine", "slurm"),
}
ALONE = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
RECIPE = """
name = "engines"
[corpus]
sources = ["{text}"]
heldout_fraction = 0.0
block_sequences = {block}
workers = 1
[teacher]
model = "{teacher}"
[cache]
blocks_per_shard = {shard}
calibration_sequences = 64
"""


def command(recipe: Path, out: Path, *arguments: str) -> float:
    """Run ``distilcache``; returns its seconds."""
    log = out / "log.txt"
    begun = time.perf_counter()
    with log.open("wb") as words:
        done = subprocess.run(
            command_line(*arguments, "--recipe", recipe, root=out),
            env={**os.environ, **ALONE, "PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.DEVNULL,
            stderr=words,
        )
    seconds = time.perf_counter() - begun
    check_success(done.returncode, arguments[0], log)
    return seconds


def shard_rate(cache: Path) -> float:
    """Tokens per second from the end of the preparations to the last finished shard."""
    markers = list(cache.glob("shards/*/*.json"))
    begin = max(path.stat().st_mtime for path in (cache / "teacher").iterdir())
    end = max(path.stat().st_mtime for path in markers)
    blocks = [b for path in markers for b in read_json(path, "cache: shard marker")["blocks"]]
    return float(sum(block["tokens"] for block in blocks) / (end - begin))


def content(cache: Path) -> str:
    """Hash over all shards and the index."""
    digest = hashlib.sha256()
    for path in [*sorted(cache.glob("shards/*/*")), cache / "index.arrow"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measure(
    recipe: Path, out: Path, arms: list[str], repetitions: int, options: list[str]
) -> dict[str, dict[str, list[float]]]:
    """Seconds and rates of each arm."""
    cache = out / "engines" / "cache"
    found: dict[str, dict[str, list[float]]] = {n: {"seconds": [], "rates": []} for n in arms}
    for repetition in range(repetitions):
        contents = set()
        for name in arms[repetition % len(arms) :] + arms[: repetition % len(arms)]:
            shutil.rmtree(cache, ignore_errors=True)
            arguments = ("teacher-cache", *ARMS[name], *options)
            found[name]["seconds"].append(command(recipe, out, *arguments))
            found[name]["rates"].append(shard_rate(cache))
            contents.add(content(cache))
        require(len(contents) == 1, "benchmark: engines must write the same bytes, got others")
    shutil.rmtree(cache, ignore_errors=True)
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """One row per arm; overheads are medians of ratios within a repetition."""
    rows = []
    plain = found["in-process"]
    for name, values in found.items():
        over = median_of([a / b - 1 for a, b in zip(plain["rates"], values["rates"], strict=True)])
        more = median_of([b - a for a, b in zip(plain["seconds"], values["seconds"], strict=True)])
        rate = f"{median_of(values['rates']):,.0f}"
        rows.append([name, rate, f"{over.median:+.1%}", f"{more.median:+.1f} s"])
    headings = ("engine", "tokens/s", "time per shard over in-process", "whole command")
    return markdown_table(headings, rows)


@benchmark
@source_options
@click.option("--sequences", default=2048, help="Sequences of 128 tokens.")
@click.option("--block-sequences", default=32, help="Sequences per block.")
@click.option(
    "--shard-blocks",
    default=2,
    help="Blocks per shard; fewer blocks make more shards, and each shard's end costs time.",
)
@run_options("runs/engines", repetitions=3)
@click.option("--arms", default=" ".join(ARMS), help="Engines, in-process among them.")
@device_options
def main(
    teacher: Path,
    text: Path,
    sequences: int,
    block_sequences: int,
    shard_blocks: int,
    repetitions: int,
    arms: str,
    device: str,
    dtype: str,
    out: Path,
) -> Mapping[str, Any]:
    """Cost of each engine over stage one in a single process."""
    need_paths(teacher=teacher, text=text)
    asked = names_among("arms", arms, ARMS)
    require("in-process" in asked, f"benchmark: --arms must name in-process, got {arms}")
    chosen = [name for name in asked if name != "ray" or find_spec("ray")]
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    source = out / f"text_{sequences}.txt"
    source.write_text(excerpt(text, sequences * 128 * 5))
    recipe = out / "recipe.toml"
    sizes = {"block": block_sequences, "shard": shard_blocks}
    recipe.write_text(RECIPE.format(text=source, teacher=teacher.absolute(), **sizes))
    shutil.rmtree(out / "engines", ignore_errors=True)
    command(recipe, out, "corpus")
    options = ["--set", f"device={device}", "--set", f"dtype={dtype}"]
    found: dict[str, Any] = measure(recipe, out, chosen, repetitions, options)
    click.echo(table(found))
    return {"arms": found}


if __name__ == "__main__":
    main()
