"""Stage two against the same student with targets in memory, and against a live teacher.

Four arms train the same student on the same batches through the product's loop, interleaved:

    reference  the teacher beside the student, full heads at all positions: DistilBERT's own step
    live       the teacher beside the student, our losses at masked positions
    memory     no teacher and no cache: random targets that lie in memory: the limit
    ours       from shards: read, decode, replay

    python -m benchmarks.stage_two --teacher-size 12x768 --sizes 6x768,3x768,4x312,2x128
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import click

from benchmarks.common import (
    BenchmarkCommand,
    device_options,
    environment,
    machine_line,
    markdown_table,
    median_of,
    need_paths,
    source_options,
    write_results,
)
from benchmarks.teachers import random_teacher, text_corpus
from benchmarks.training_arms import ARMS, Setting
from data.cache import Cache
from data.device import keep_freed_memory, resolve_device, resolve_dtype
from data.masking import MaskingConfig
from stages.student_train.config import TrainConfig
from stages.student_train.run import fit
from stages.teacher_cache.adapters import load_teacher
from stages.teacher_cache.config import CacheConfig
from stages.teacher_cache.run import build_cache


def rates(setting: Setting, name: str, folder: Path) -> list[float]:
    """Tokens per second of each step of one arm but the first."""
    shutil.rmtree(folder, ignore_errors=True)
    module, batches = ARMS[name](setting)
    fit(
        module,  # type: ignore[arg-type]
        batches,
        train=setting.train,
        out=folder,
        device=setting.device,
        dtype=setting.dtype,
        label=f"{name} {setting.size}",
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    return [line["tokens_per_s"] for line in lines if "loss" in line][1:]


def measure(setting: Setting, repetitions: int, out: Path) -> dict[str, Any]:
    """All arms, interleaved; medians of the steps, and ratios of them per repetition."""
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(repetitions):
        for name in ARMS:
            found[name].append(statistics.median(rates(setting, name, out / "run")))
    pairs = {
        f"ours / {other}": statistics.median(
            a / b for a, b in zip(found["ours"], found[other], strict=True)
        )
        for other in ("memory", "live", "reference")
    }
    return {"size": setting.size, "tokens_per_s": found, "ratios": pairs}


def open_cache(out: Path, corpus: Path, teacher: Path, dtype: str, device: str) -> Cache:
    """The default cache of the corpus, made once."""
    if not (out / "cache" / "manifest.json").exists():
        build_cache(
            corpus_dir=corpus,
            out=out / "cache",
            teacher=str(teacher),
            masking=MaskingConfig(),
            config=CacheConfig(),
            dtype=dtype,
            device=device,
        )
    return Cache.open(out / "cache")


@click.command(cls=BenchmarkCommand, context_settings={"show_default": True})
@click.option(
    "--teacher-size",
    default="",
    metavar="LAYERSxWIDTH",
    show_default="the teacher itself",
    help="Random teacher of this size, with the tokenizer of --teacher.",
)
@click.option("--sizes", default="3x384", metavar="SIZE,SIZE", help="Students.")
@source_options
@click.option("--batch-size", default=16, help="Sequences of 128 tokens per step.")
@click.option("--steps", default=6, help="Steps per repetition and arm; the first is dropped.")
@click.option("--repetitions", default=3, help="Interleaved repetitions.")
@click.option(
    "--signal", default="replay+head", help="replay, replay+head or sparse, for the arm `ours`."
)
@device_options
@click.option(
    "--out", default="runs/stage_two", type=click.Path(path_type=Path), help="Work folder."
)
def main(
    teacher_size: str,
    sizes: str,
    teacher: Path,
    text: Path,
    batch_size: int,
    steps: int,
    repetitions: int,
    signal: str,
    device: str,
    dtype: str,
    out: Path,
    json_path: Path | None,
) -> None:
    """Tokens per second of stage two against its limit and against a live teacher."""
    need_paths(teacher=teacher, text=text)
    target = resolve_device(device)
    keep_freed_memory(target)
    home = out / (teacher_size or "teacher")
    corpus = text_corpus(home / "data", text, teacher, batch_size * steps, batch_size * 2)
    made = random_teacher(home, teacher_size, teacher) if teacher_size else teacher
    kind = resolve_dtype(dtype, target)
    cache = open_cache(home, corpus, made, dtype, device)
    loaded = load_teacher(str(made), target, kind)
    train = TrainConfig(
        signal=signal,
        steps=steps,
        batch_size=batch_size,
        logging_steps=1,
        save_steps=10**6,
        window_blocks=2,
    )
    results = [
        measure(Setting(cache, loaded, size, train, target, kind), repetitions, home)
        for size in sizes.split(",")
    ]
    rows = [
        [
            r["size"],
            *(f"{median_of(r['tokens_per_s'][name]).median:,.0f}" for name in ARMS),
            *(f"{value:.3f}" for value in r["ratios"].values()),
        ]
        for r in results
    ]
    click.echo(markdown_table(("student", *ARMS, *results[0]["ratios"]), rows))
    click.echo(machine_line(environment(device)))
    if json_path:
        write_results(json_path, {"environment": environment(device), "students": results})


if __name__ == "__main__":
    main()
