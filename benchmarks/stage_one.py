"""Stage one end to end against the teacher's bare forward pass and against a naive script.

Three arms go over the same masked blocks, interleaved, in one process:

    naive   full logits of all positions, softmax, top-k and a copy to the host per batch
    bare    the encoder, and the LM head on the masked rows; nothing is kept: the limit
    ours    stage one: masking, teacher, signals, coding, compression, synced shards

    python -m benchmarks.stage_one --size 12x768
"""

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

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
from data.corpus import Corpus
from data.device import autocast, keep_freed_memory, resolve_device, resolve_dtype
from data.masking import MaskingConfig
from stages.teacher_cache.adapters import Teacher, load_teacher
from stages.teacher_cache.config import CacheConfig
from stages.teacher_cache.run import plan_encoding, with_codecs
from stages.teacher_cache.task import Job, ShardTask, placed_block, run_shard

BATCH = 32
"""Sequences per batch of the naive script."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one repetition goes over."""

    job: Job
    teacher: Teacher
    blocks: int
    round_index: int

    @property
    def tokens(self) -> int:
        """Tokens of all blocks."""
        return int(self.job.corpus.split("train").block_tokens[: self.blocks].sum())


def naive(work: Work) -> None:
    """The pattern of public scripts."""
    kept = []
    for block in range(work.blocks):
        placed = placed_block(work.job, work.round_index, block)
        ids_BL = torch.from_numpy(placed.block.input_ids.astype("int64"))
        ids_BL = ids_BL.reshape(len(placed.lengths), -1)
        for rows in torch.split(ids_BL, BATCH):
            with torch.no_grad(), autocast(work.teacher.device, work.teacher.dtype):
                logits = work.teacher.model(input_ids=rows.to(work.teacher.device)).logits
            top = (logits.float() / 2.0).softmax(-1).topk(work.job.config.top_k, dim=-1)
            kept.append((top.values.cpu(), top.indices.cpu()))


def bare(work: Work) -> None:
    """Encoder and selected-rows head, as large batches as stage one takes."""
    config, teacher = work.job.config, work.teacher
    for block in range(work.blocks):
        placed = placed_block(work.job, work.round_index, block)
        ids_BL = torch.from_numpy(placed.block.input_ids.astype("int64")).to(teacher.device)
        ids_BL = ids_BL.reshape(len(placed.lengths), -1)
        chosen = torch.zeros(ids_BL.numel(), dtype=torch.bool, device=teacher.device)
        chosen[torch.from_numpy(placed.hidden_rows).to(teacher.device)] = True
        width = ids_BL.shape[1]
        per_batch = max(1, config.batch_tokens // width)
        states = []
        for rows, mask in zip(
            torch.split(ids_BL, per_batch),
            torch.split(chosen.reshape(-1, width), per_batch),
            strict=True,
        ):
            states.append(teacher.encode(rows, None, (teacher.num_layers,))[0][mask])
        for hidden in torch.split(torch.cat(states), config.row_chunk):
            teacher.logits(hidden)


def ours(work: Work) -> None:
    """One shard of stage one, from masking to the synced file."""
    task = ShardTask(work.round_index, 0, 0, work.blocks)
    run_shard(work.job, task, lambda tokens: None)


ARMS: dict[str, Callable[[Work], None]] = {"naive": naive, "bare": bare, "ours": ours}


def measure(work: Work, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each arm and repetition; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for repetition in range(repetitions + 1):
        for name, arm in ARMS.items():
            if repetition == 0 and name == "naive":
                continue
            begun = time.perf_counter()
            arm(replace(work, round_index=repetition))
            if work.teacher.device.type == "cuda":
                torch.cuda.synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def summary(work: Work, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Tokens per second, and the ratios that the arms are for."""
    rates = {name: [work.tokens / s for s in values] for name, values in seconds.items()}
    ratio = {
        f"ours / {other}": statistics.median(
            a / b for a, b in zip(rates["ours"], rates[other], strict=True)
        )
        for other in ("bare", "naive")
    }
    return {"tokens_per_s": rates, "ratios": ratio}


def make_work(out: Path, corpus_dir: Path, teacher_dir: Path, device: str, dtype: str) -> Work:
    """Load teacher and corpus, calibrate the codec."""
    target = resolve_device(device)
    keep_freed_memory(target)
    teacher = load_teacher(str(teacher_dir), target, resolve_dtype(dtype, target))
    corpus, config = Corpus.open(corpus_dir), CacheConfig()
    shutil.rmtree(out, ignore_errors=True)
    (out / "teacher").mkdir(parents=True)
    job = Job(
        out=out,
        corpus=corpus,
        masking=MaskingConfig(),
        config=config,
        encoding=plan_encoding(teacher, corpus, config),
        teacher=teacher,
        codecs={},
        identity="",
        block_metadata={},
    )
    return Work(with_codecs(job, {}), teacher, corpus.split("train").num_blocks, 0)


@click.command(cls=BenchmarkCommand, context_settings={"show_default": True})
@click.option(
    "--size",
    default="",
    metavar="LAYERSxWIDTH",
    show_default="the teacher itself",
    help="Random teacher of this size, with the tokenizer of --teacher.",
)
@source_options
@click.option("--sequences", default=256, help="Sequences of 128 tokens per repetition and arm.")
@click.option("--repetitions", default=3, help="Interleaved repetitions.")
@device_options
@click.option(
    "--out", default="runs/stage_one", type=click.Path(path_type=Path), help="Work folder."
)
def main(
    size: str,
    teacher: Path,
    text: Path,
    sequences: int,
    repetitions: int,
    device: str,
    dtype: str,
    out: Path,
    json_path: Path | None,
) -> None:
    """Tokens per second of stage one against its limit and against a naive script."""
    need_paths(teacher=teacher, text=text)
    corpus = text_corpus(out / "data", text, teacher, sequences, max(1, sequences // 4))
    made = random_teacher(out, size, teacher) if size else teacher
    work = make_work(out / "cache", corpus, made, device, dtype)
    work = replace(work, blocks=min(4, work.blocks))
    results = summary(work, measure(work, repetitions))
    shutil.rmtree(out / "cache")
    rows = []
    for name, rates in results["tokens_per_s"].items():
        spread = median_of(rates)
        rows.append([name, f"{spread.median:,.0f}", f"{spread.q1:,.0f} to {spread.q3:,.0f}"])
    click.echo(markdown_table(("arm", "tokens/s", "quartiles"), rows))
    for name, value in results["ratios"].items():
        click.echo(f"{name}: {value:.3f}")
    click.echo(machine_line(environment(device)))
    if json_path:
        write_results(json_path, {"environment": environment(device), "size": size, **results})


if __name__ == "__main__":
    main()
