"""What a sweep of several sizes costs from one cache, against distilling each of them live.

Measured in turns, in one process: stage one over some blocks (masking up to synced shards), and for
every size some steps from the cache and some with the teacher beside the student, both with our
losses at masked positions. At one epoch per round a token costs

    sweep   1 / teacher + sum over sizes of 1 / student from the cache
    live                  sum over sizes of 1 / student beside the teacher

seconds; the ratio of the two is that of whole runs of any length, start-up aside. Beside it stands
the ratio that arithmetic gives from the shapes.

    python -m benchmarks.sweep_cost --json runs/sweep_cost/sweep_cost.json
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks import stage_one
from benchmarks.common import (
    Median,
    benchmark,
    device_options,
    median_of,
    need_paths,
    run_options,
    source_options,
    take_turns,
)
from benchmarks.stage_two import one_turn, rate, training_options
from benchmarks.teachers import chosen_teacher, make_cache, text_corpus
from benchmarks.training_arms import ARMS, Arm, Setting, multiply_adds
from distilcache.pipeline.report.text import markdown_table

STUDENT_ARMS = ("ours", "live")
TARGET = 0.5
"""A sweep of four sizes is to cost at most this share of four live distillations."""


def cost_ratio(teacher: float, students: Sequence[float], live: Sequence[float]) -> float:
    """Time of a sweep over that of live distillations, from tokens per second.

    ``students`` are those from the cache, one per size, ``live`` those beside the teacher.
    """
    return (1 / teacher + sum(1 / r for r in students)) / sum(1 / r for r in live)


def measure(
    work: stage_one.Work, settings: Sequence[Setting], repetitions: int, out: Path
) -> dict[str, Any]:
    """Tokens per second of stage one and of each size's arms; all take turns."""

    def teacher(repetition: int) -> float:
        this = stage_one.prepared(work, repetition + 1)
        return this.tokens / stage_one.seconds_of(stage_one.ours, this)

    arms: dict[str, Callable[[int], float]] = {"teacher": teacher}
    stage_one.ours(work)  # warms up
    for setting in settings:
        for name in STUDENT_ARMS:
            arm = ARMS[name](setting)
            batch = arm[1][0]
            count = batch["input_ids"].numel()
            arms[f"{setting.size} {name}"] = partial(_rate, arm, setting, count, out / "run")
    found = take_turns(arms, repetitions)
    students = {s.size: {n: found[f"{s.size} {n}"] for n in STUDENT_ARMS} for s in settings}
    counts = (count, len(batch["labels"]), batch["input_ids"].shape[1])
    return {"teacher": found["teacher"], "students": students, "counts": counts}


def _rate(arm: Arm, setting: Setting, tokens: int, folder: Path, _: int) -> float:
    return rate(arm, setting, tokens, folder)


def bound(settings: Sequence[Setting], counts: tuple[int, int, int]) -> float:
    """The same ratio from the multiply-adds of a step.

    A live step is one from the cache over the whole vocabulary and the teacher's encoder; stage one
    is that encoder and the teacher's head at the masked positions, which such a step replays.
    """
    steps = [multiply_adds(setting, *counts) for setting in settings]
    encoder, replay = (steps[0][a] - steps[0][b] for a, b in (("live", "full"), ("full", "memory")))
    students = sum(step["ours"] for step in steps)
    return (encoder + replay + students) / sum(step["live"] for step in steps)


def summary(found: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """Ratio of each repetition, and how the time is shared out, by medians of the rates."""
    sizes = found["students"]
    ratios = [
        cost_ratio(
            rate_of_teacher,
            [rates["ours"][i] for rates in sizes.values()],
            [rates["live"][i] for rates in sizes.values()],
        )
        for i, rate_of_teacher in enumerate(found["teacher"])
    ]
    medians = {
        size: {name: median_of(rates).median for name, rates in pair.items()}
        for size, pair in sizes.items()
    }
    return {
        "ratio": asdict(median_of(ratios)),
        "bound": limit,
        "target": TARGET,
        "teacher_us": 1e6 / median_of(found["teacher"]).median,
        "students_us": {
            size: {name: 1e6 / value for name, value in pair.items()}
            for size, pair in medians.items()
        },
    }


def table(values: Mapping[str, Any]) -> str:
    """Microseconds per token, part by part, and the ratio of the sums."""
    rows = [["teacher, once", f"{values['teacher_us']:,.1f}", ""]]
    for size, pair in values["students_us"].items():
        rows.append([size, f"{pair['ours']:,.1f}", f"{pair['live']:,.1f}"])
    live = sum(pair["live"] for pair in values["students_us"].values())
    sweep = values["teacher_us"] + sum(p["ours"] for p in values["students_us"].values())
    rows.append(["all", f"{sweep:,.1f}", f"{live:,.1f}"])
    return (
        markdown_table(("us per token", "sweep from the cache", "live distillations"), rows)
        + f"\n\nsweep / live: {Median(**values['ratio']):.3f}, "
        f"from the shapes {values['bound']:.3f}; target at most {values['target']}"
    )


@benchmark
@training_options(teacher="12x768", sizes="6x768,4x512,3x384,2x128", steps=5)
@source_options
@click.option("--sequences", default=128, help="Of 128 tokens, per repetition of stage one.")
@run_options("runs/sweep_cost", repetitions=3)
@device_options
def main(
    teacher_size: str,
    sizes: str,
    teacher: Path,
    text: Path,
    sequences: int,
    batch_size: int,
    steps: int,
    repetitions: int,
    device: str,
    dtype: str,
    out: Path,
) -> Mapping[str, Any]:
    """Time of a sweep, the teacher's pass included, over that of live distillations."""
    need_paths(teacher=teacher, text=text)
    made = chosen_teacher(out, teacher_size, teacher)
    home = out / f"{teacher_size or 'teacher'}_{sequences}"
    corpus = text_corpus(home, text, teacher, sequences, max(1, sequences // 2))
    work = stage_one.make_work(home / "shards", corpus, made, device, dtype)
    train = one_turn(steps, batch_size)
    cache = make_cache(home / "cache", corpus, made, device=device, dtype=dtype)
    settings = [Setting(cache, work.teacher, size, train) for size in sizes.split(",")]
    found = measure(work, settings, repetitions, home)
    shutil.rmtree(home / "shards")
    values = summary(found, bound(settings, found["counts"]))
    click.echo(table(values))
    return {**values, "tokens_per_s": found}


if __name__ == "__main__":
    main()
