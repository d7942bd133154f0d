"""Stage two against the same student with targets in memory, and against a live teacher.

Six arms train the same student on the same batches through the product's loop, interleaved:

    reference  the teacher beside the student, full heads at all positions: DistilBERT's own step
    live       the teacher beside the student, our losses at masked positions
    memory     the same losses against random distributions that lie in memory: the limit
    mlm        no teacher in any form: plain masked language modelling
    full       from shards: read, decode, replay; each step over the whole vocabulary
    ours       the same, each step over a sample of the vocabulary: the default

Beside each ratio stands the one that arithmetic allows: replay is the teacher's head at the
masked positions, and no code can spare it.

    python -m benchmarks.stage_two --teacher-size 12x768 --sizes 6x768,3x768,4x312,2x128
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from benchmarks.common import (
    Command,
    Median,
    benchmark,
    device_options,
    median_of,
    names_among,
    need_paths,
    options,
    ratios_to,
    run_options,
    source_options,
    take_turns,
)
from benchmarks.teachers import chosen_teacher, make_cache, teacher_option, text_corpus
from benchmarks.training_arms import ARMS, Arm, Setting, multiply_adds
from benchmarks.utilisation import matmul_rate
from distilcache.data.cache.cache import Cache
from distilcache.pipeline.report.text import markdown_table
from distilcache.stages.models.device import (
    keep_freed_memory,
    resolve_device,
    resolve_dtype,
    synchronise,
)
from distilcache.stages.student_train.arguments import training_arguments
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.trainer import DistillationTrainer
from distilcache.stages.teacher_cache.teacher import Teacher, load_teacher

BESIDE_TEACHER = ("reference", "live")
"""Arms that the teacher's weights are a part of; they lie on the device for the others, too."""
WARM = 2
"""Steps of a repetition before the clock runs: the optimizer's state is made in the first."""


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Marks the end of each step; on a GPU by events, for which nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set a mark."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds of each step but the first."""
        synchronise(self.device)
        pairs = pairwise(self._marks)
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]


def rate(arm: Arm, setting: Setting, tokens: int, folder: Path) -> float:
    """Tokens per second of the median step after the warm ones."""
    module, batches = arm
    train, teacher = setting.train, setting.teacher
    arguments = training_arguments(
        train, steps=train.steps, out=folder, device=teacher.device, dtype=teacher.dtype
    )
    arguments.save_strategy = SaveStrategy.NO
    clock = StepClock(teacher.device)
    trainer = DistillationTrainer(module, arguments, batches, [clock])  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return tokens / statistics.median(clock.seconds()[WARM - 1 :])


def measure(setting: Setting, names: Sequence[str], repetitions: int, out: Path) -> dict[str, Any]:
    """Tokens per second of the arms, which take turns; ratios with their bounds.

    An arm is made for its turn, so that its peak of memory is not that of all.
    """
    batch, device = ARMS["ours"](setting)[1][0], setting.teacher.device
    tokens, length = batch["input_ids"].numel(), batch["input_ids"].shape[1]
    peak: dict[str, float] = {}

    def turn(name: str, _: int) -> float:
        gc.collect()  # A Trainer refers to itself.
        teacher = held_memory(device)
        found = rate(ARMS[name](setting), setting, tokens, out / "run")
        peak.update(peak_memory(name, device, 0.0 if name in BESIDE_TEACHER else teacher))
        return found

    found = take_turns({name: partial(turn, name) for name in names}, repetitions)
    work = multiply_adds(setting, tokens, len(batch["labels"]), length)
    flops = 2 * work["ours"] * median_of(found["ours"]).median / tokens
    return {
        "size": setting.size,
        "tokens_per_s": found,
        "peak_gib": peak,
        "utilisation": flops / matmul_rate(device, setting.teacher.dtype),
        "multiply_adds": work,
        "ratios": {
            name: {
                "measured": asdict(median_of(values)),
                "bound": work[name.removeprefix("ours / ")] / work["ours"],
            }
            for name, values in ratios_to(found, "ours").items()
        },
    }


def held_memory(device: torch.device) -> float:
    """GiB of the device that tensors take; the peak is counted from here on. 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**30


def peak_memory(name: str, device: torch.device, others: float) -> dict[str, float]:
    """GiB of the device that tensors took at most, less what is not the arm's; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {name: torch.cuda.max_memory_allocated(device) / 2**30 - others}


def training_options(*, teacher: str, sizes: str, steps: int) -> Callable[[Command], Command]:
    """``--teacher-size``, ``--sizes``, ``--batch-size`` and ``--steps`` with these defaults."""
    return options(
        teacher_option("--teacher-size", teacher),
        click.option("--sizes", default=sizes, metavar="SIZE,SIZE", help="Students."),
        click.option("--batch-size", default=16, help="Sequences of 128 tokens per step."),
        click.option(
            "--steps",
            default=steps,
            type=click.IntRange(WARM + 1),
            help=f"Per repetition and arm; the first {WARM} are not timed.",
        ),
    )


def one_turn(steps: int, batch_size: int) -> TrainConfig:
    """Steps of one repetition and arm: nothing is logged or saved."""
    never = 10**6
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        logging_steps=never,
        save_steps=never,
        window_blocks=2,
    )


def cache_and_teacher(
    home: Path, size: str, teacher: Path, text: Path, train: TrainConfig, device: str, dtype: str
) -> tuple[Cache, Teacher]:
    """A cache with text for the steps of one repetition, and its teacher, loaded.

    Both are made once, in ``home``. ``size`` is that of a random teacher; "": the given one.
    """
    sequences = train.batch_size * train.steps
    corpus = text_corpus(home / "data", text, teacher, sequences, train.batch_size * 2)
    made = chosen_teacher(home, size, teacher)
    cache = make_cache(home / "cache", corpus, made, device=device, dtype=dtype)
    target = resolve_device(device)
    return cache, load_teacher(str(made), target, resolve_dtype(dtype, target))


def table(results: list[dict[str, Any]]) -> str:
    """Medians of the rates; ratios with quartiles and, after the stroke, their bounds."""
    rows, names = [], list(results[0]["tokens_per_s"])
    for result in results:
        rates = (f"{median_of(result['tokens_per_s'][name]).median:,.0f}" for name in names)
        ratios = (
            f"{Median(**ratio['measured']):.3f} / {ratio['bound']:.3f}"
            for ratio in result["ratios"].values()
        )
        rows.append([result["size"], *rates, *ratios, f"{result['utilisation']:.0%}"])
    headings = ("student", *names, *results[0]["ratios"], "of the matmul rate")
    return markdown_table(headings, rows)


@benchmark
@training_options(teacher="", sizes="3x384", steps=6)
@click.option("--arms", default=",".join(ARMS), metavar="ARM,ARM", help="Arms besides `ours`.")
@source_options
@run_options("runs/stage_two", repetitions=3)
@device_options
def main(
    teacher_size: str,
    sizes: str,
    arms: str,
    teacher: Path,
    text: Path,
    batch_size: int,
    steps: int,
    repetitions: int,
    device: str,
    dtype: str,
    out: Path,
) -> Mapping[str, Any]:
    """Tokens per second of stage two against its limit and against a live teacher."""
    need_paths(teacher=teacher, text=text)
    asked = names_among("arms", arms, ARMS)
    names = [name for name in ARMS if name in (*asked, "ours")]
    keep_freed_memory(resolve_device(device))
    home = out / f"{teacher_size or 'teacher'}_{batch_size}x{steps}"
    train = one_turn(steps, batch_size)
    cache, loaded = cache_and_teacher(home, teacher_size, teacher, text, train, device, dtype)
    results = [
        measure(Setting(cache, loaded, size, train), names, repetitions, home)
        for size in sizes.split(",")
    ]
    click.echo(table(results))
    return {"students": results}


if __name__ == "__main__":
    main()
