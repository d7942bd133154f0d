"""Peak memory and time of every stage as corpus and cache grow: 1x, 4x, 16x.

Each stage runs as a user runs it, `distilcache ...` in a process of its own. Teacher, student,
vocabulary, blocks and shards are small, so that the memory of data structures shows and not that of
a model:

    corpus, teacher-cache, verify   work grows with the text: CPU time per further token is
                                    compared, 4x to 16x against 1x to 4x (start-up cancels)
    student-train, evaluate         a fixed amount of work: its CPU time is compared with 1x
    index                           student-train, the same fixed steps, with a larger index (a real
                                    one repeated): what a large cache takes to open and to order

    python -m benchmarks.growth --megabytes 1 --blocks 100000
"""

import shutil
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pyarrow as pa

from benchmarks.common import (
    benchmark,
    excerpt,
    names_among,
    need_paths,
    run_options,
    source_options,
)
from benchmarks.teachers import random_teacher
from benchmarks.usage import Usage, run_command
from distilcache.data.cache.manifest import CacheManifest
from distilcache.data.storage.files import read_json, sha256_file, write_bytes, write_json
from distilcache.pipeline.report.text import markdown_table
from distilcache.stages.models.wordpiece import train_wordpiece

SIZES = (1, 4, 16)
STAGES = ("corpus", "teacher-cache", "verify", "student-train", "evaluate", "index")
GROWING = STAGES[:3]
"""Stages whose work is the text; the others do a fixed amount."""
RECIPE = """
dtype = "float32"
device = "cpu"
[corpus]
sources = ["{text}"]
chunk_bytes = {chunk_bytes}
block_sequences = {block_sequences}
heldout_fraction = 0.1
[teacher]
model = "{teacher}"
[cache]
blocks_per_shard = 4
calibration_sequences = 256
[student]
sizes = ["1x64"]
init = "random"
[train]
steps = {steps}
batch_size = 16
[evaluate]
sequences = 128
latency_repeats = 2
"""
CHUNKS, BLOCK_SEQUENCES = 8, 64
"""Chunks of text in the 1x corpus, enough to keep all workers busy; sequences per block."""
VOCABULARY, TEACHER_SIZE, STEPS = 2048, "1x64", 60


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, and where."""

    out: Path
    text: Path
    megabytes: float
    """Text of the 1x corpus."""
    blocks: int
    """Index rows of the 1x cache of stage ``index``."""
    stages: tuple[str, ...] = STAGES


def make_teacher(plan: Plan) -> Path:
    """A small vocabulary and a random teacher with it."""
    sample = excerpt(plan.text, min(1_000_000, int(plan.megabytes * 1e6)))
    train_wordpiece(sample.split("\n\n"), VOCABULARY).save_pretrained(plan.out / "words")
    return random_teacher(plan.out, TEACHER_SIZE, plan.out / "words")


def write_recipe(plan: Plan, teacher: Path, size: int) -> Path:
    """Text and recipe of one size; the recipe's path."""
    home = plan.out / f"{size}x"
    text = plan.out / f"text_{size}x.txt"
    recipe = home.with_suffix(".toml")
    text.write_text(excerpt(plan.text, int(size * plan.megabytes * 1e6)), encoding="utf-8")
    filled = RECIPE.format(
        text=text,
        teacher=teacher,
        chunk_bytes=max(1024, int(plan.megabytes * 1e6) // CHUNKS),
        block_sequences=BLOCK_SEQUENCES,
        steps=STEPS,
    )
    recipe.write_text(f'name = "{home.name}"\nroot = "{plan.out}"\n{filled}', encoding="utf-8")
    return recipe


def repeat_index(cache: Path, out: Path, blocks: int) -> None:
    """A cache of at least so many blocks, all of them those of ``cache``."""
    out.mkdir(parents=True)
    for name in ("shards", "teacher", "provenance.json"):
        (out / name).symlink_to((cache / name).resolve())
    manifest = CacheManifest.from_dict(read_json(cache / "manifest.json", "cache: manifest"))
    with pa.memory_map(str(cache / "index.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all()
    times = -(-blocks // rows.num_rows)
    (batch,) = pa.concat_tables([rows] * times).combine_chunks().to_batches()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    write_bytes(out / "index.arrow", sink.getvalue().to_pybytes())
    totals = {**manifest.totals, "tokens": times * manifest.totals["tokens"]}
    index_sha256 = sha256_file(out / "index.arrow")
    made = replace(manifest, index_sha256=index_sha256, totals=totals).seal()
    write_json(out / "manifest.json", made.to_dict())


def run_stage(plan: Plan, stage: str, size: int) -> Usage:
    """One stage at one size; the stages before it have run."""
    home = plan.out / f"{size}x"
    arguments = [stage, "--recipe", str(plan.out / f"{size}x.toml")]
    if stage == "verify":
        arguments = [stage, str(home / "cache")]
    if stage == "index":
        home = plan.out / f"index_{size}x"
        repeat_index(plan.out / "1x" / "cache", home / "cache", size * plan.blocks)
        arguments = ["student-train", *arguments[1:], "--set", f"name={home.name}"]
    usage = run_command(arguments, plan.out / "log.txt")
    if stage in ("corpus", "evaluate"):
        splits = read_json(home / "corpus" / "manifest.json", "corpus: manifest")["splits"]
        tokens = sum(split["tokens"] for split in splits.values())
    else:
        tokens = read_json(home / "cache" / "manifest.json", "cache: manifest")["totals"]["tokens"]
    return replace(usage, tokens=int(tokens))


def measure(plan: Plan, repetitions: int) -> dict[str, dict[int, list[Usage]]]:
    """Every stage at every size; the sizes take turns."""
    shutil.rmtree(plan.out, ignore_errors=True)
    plan.out.mkdir(parents=True)
    teacher = make_teacher(plan)
    for size in SIZES:
        write_recipe(plan, teacher, size)
    found: dict[str, dict[int, list[Usage]]] = {
        stage: {size: [] for size in SIZES} for stage in plan.stages
    }
    for _ in range(repetitions):
        for folder in plan.out.glob("*x"):
            shutil.rmtree(folder)
        for stage in plan.stages:
            for size in SIZES:
                found[stage][size].append(run_stage(plan, stage, size))
    return found


def growth_of(stage: str, runs: dict[int, list[Usage]]) -> dict[str, Any]:
    """Medians per size, and what they say of growth."""
    median = {
        name: {size: statistics.median(getattr(u, name) for u in runs[size]) for size in SIZES}
        for name in ("peak", "private", "cpu", "seconds")
    }
    first, *_, last = SIZES
    tokens = {size: runs[size][0].tokens for size in SIZES}
    cpu, peak, private = median["cpu"], median["peak"], median["private"]
    slopes = [(cpu[b] - cpu[a]) / (tokens[b] - tokens[a]) for a, b in pairwise(SIZES)]
    further = tokens[last] - tokens[first]
    return {
        "tokens": tokens,
        "peak_mb": peak,
        "private_mb": private,
        "cpu_s": cpu,
        "seconds": median["seconds"],
        "peak_ratio": peak[last] / peak[first],
        "bytes_per_token": 1e6 * (private[last] - private[first]) / further,
        "time_ratio": slopes[-1] / slopes[0] if stage in GROWING else cpu[last] / cpu[first],
        "runs": {size: [asdict(usage) for usage in runs[size]] for size in SIZES},
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row per stage."""
    rows = [
        [
            stage,
            *(f"{found['peak_mb'][size]:,.0f}" for size in SIZES),
            f"{found['peak_ratio']:.3f}",
            f"{found['bytes_per_token']:.3f}",
            *(f"{found['cpu_s'][size]:,.1f}" for size in SIZES),
            f"{found['time_ratio']:.3f}",
        ]
        for stage, found in results.items()
    ]
    peaks, cpu = ([f"{name}, {size}x" for size in SIZES] for name in ("peak MB", "CPU s"))
    headings = ("stage", *peaks, "16x / 1x", "bytes/token", *cpu, "time ratio")
    return markdown_table(headings, rows)


@benchmark
@source_options
@click.option("--megabytes", default=1.0, help="Text of the 1x corpus.")
@click.option("--blocks", default=100_000, help="Blocks of the 1x index.")
@click.option(
    "--stages", default=" ".join(STAGES), help="Which of them; each needs those before it."
)
@run_options("runs/growth", repetitions=1)
def main(
    text: Path, megabytes: float, blocks: int, stages: str, repetitions: int, out: Path, **_: Any
) -> Mapping[str, Any]:
    """Peak memory and CPU time of every stage at 1x, 4x and 16x."""
    need_paths(text=text)
    asked = names_among("stages", stages, STAGES)
    chosen = tuple(stage for stage in STAGES if stage in asked)
    plan = Plan(out.resolve(), text, megabytes, blocks, chosen)
    found = measure(plan, repetitions)
    results = {stage: growth_of(stage, runs) for stage, runs in found.items()}
    shutil.rmtree(plan.out)
    click.echo(table(results))
    return {"stages": results}


if __name__ == "__main__":
    main()
