"""Stage one end to end against the teacher's bare forward pass and against a naive script.

Four arms go over the same masked blocks, interleaved, in one process:

    naive    full logits of all positions, softmax, top-k and a copy to the host per batch
    bare     the model's own encoder, and the LM head on the signal rows; nothing is kept: the limit
    trimmed  the same, the last layer on the signal rows alone once its attention is done
    ours     stage one: masking, teacher (trimmed), signals, coding, compression, synced shards

Masking is timed in ``ours`` alone. Model FLOPs are those of each arm's matrix products; their
utilisation is against the rate of a large matrix product measured beside the arms. On a GPU a
trace of ``ours`` says what share of the time no kernel was running.

    python -m benchmarks.stage_one --size 12x768
    python -m benchmarks.stage_one --size 12x768 --device cuda --sequences 16384
"""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.common import (
    benchmark,
    device_options,
    median_of,
    need_paths,
    ratios_to,
    run_options,
    source_options,
    take_turns,
)
from benchmarks.teachers import chosen_teacher, teacher_option, text_corpus
from benchmarks.utilisation import idle_share, matmul_rate, top_kernels
from distilcache.data.corpus.store import Corpus
from distilcache.data.masks.masking import MaskingConfig
from distilcache.pipeline.report.text import markdown_table
from distilcache.stages.models.device import (
    autocast,
    keep_freed_memory,
    resolve_device,
    resolve_dtype,
    synchronise,
)
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.encoding import plan_encoding, with_codecs
from distilcache.stages.teacher_cache.pipeline import run_shards
from distilcache.stages.teacher_cache.staging import check_fit
from distilcache.stages.teacher_cache.task import Job, Plan, PreparedBlock, ShardTask, prepare_block
from distilcache.stages.teacher_cache.teacher import Teacher, load_teacher

BATCH = 32
"""Sequences per batch of the naive script."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one repetition goes over."""

    job: Job
    teacher: Teacher
    round_index: int
    blocks: list[PreparedBlock]
    """Made before the clock runs; ``ours`` makes its own."""

    @property
    def tokens(self) -> int:
        """Tokens of all blocks."""
        return sum(len(block.placed.block.input_ids) for block in self.blocks)

    @property
    def rows(self) -> int:
        """Signal positions of all blocks."""
        return sum(len(block.placed.rows) for block in self.blocks)


def naive(work: Work) -> None:
    """The pattern of public scripts."""
    kept = []
    for block in work.blocks:
        placed = block.placed
        ids_BL = torch.from_numpy(placed.block.input_ids.astype("int64"))
        ids_BL = ids_BL.reshape(len(placed.lengths), -1)
        for rows in torch.split(ids_BL, BATCH):
            with torch.no_grad(), autocast(work.teacher.device, work.teacher.dtype):
                logits = work.teacher.model(input_ids=rows.to(work.teacher.device)).logits
            top = (logits.float() / 2.0).softmax(-1).topk(work.job.config.top_k, dim=-1)
            kept.append((top.values.cpu(), top.indices.cpu()))


@torch.no_grad()
def bare(work: Work, trim: bool = False) -> None:
    """Encoder and LM head of the signal rows, on the batches of stage one."""
    teacher, last = work.teacher, (work.teacher.num_layers,)
    for block in work.blocks:
        assert block.inputs is not None
        states = []
        for batch in block.inputs.batches:
            ids_BL, rows_N = (
                x.to(teacher.device, non_blocking=True) for x in (batch.ids_BL, batch.rows_N)
            )
            if trim:
                states += teacher.encode(ids_BL, None, last, rows_N)
            else:
                with autocast(teacher.device, teacher.dtype):
                    whole_BLD = teacher.model.base_model(input_ids=ids_BL).last_hidden_state
                states.append(whole_BLD.flatten(0, 1).index_select(0, rows_N))
        for hidden_ND in torch.split(torch.cat(states), work.job.config.row_chunk):
            with autocast(teacher.device, teacher.dtype):
                rows_ND = teacher.lm_head.transform(hidden_ND)
            teacher.decode(rows_ND)


def ours(work: Work) -> None:
    """One shard of stage one, from masking to the synced file."""
    task = ShardTask(work.round_index, 0, 0, len(work.blocks))
    with closing(run_shards(work.job, [task], lambda tokens: None)) as markers:
        list(markers)


ARMS: dict[str, Callable[[Work], None]] = {
    "naive": naive,
    "bare": bare,
    "trimmed": partial(bare, trim=True),
    "ours": ours,
}


def prepared(work: Work, round_index: int) -> Work:
    """The same blocks in another round, masked anew."""
    count = work.job.corpus.split("train").num_blocks
    blocks = [prepare_block(work.job, round_index, block) for block in range(count)]
    return replace(work, round_index=round_index, blocks=blocks)


def seconds_of(arm: Callable[[Work], None], work: Work) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    arm(work)
    synchronise(work.teacher.device)
    return time.perf_counter() - begun


def measure(work: Work, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each arm and repetition, each repetition with masks of its own."""

    def turn(arm: Callable[[Work], None], repetition: int) -> float:
        return seconds_of(arm, prepared(work, repetition))

    arms = {name: partial(turn, arm) for name, arm in ARMS.items()}
    return take_turns(arms, repetitions, warm_up=True)


def flops(work: Work, arm: str) -> float:
    """Of the matrix products of an arm: 2 for each weight and token, and attention's."""
    config = work.teacher.model.config
    width, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, rows = work.tokens, work.rows
    length = tokens / sum(len(block.placed.lengths) for block in work.blocks)
    layer = tokens * (2 * (4 * width**2 + 2 * width * ffn) + 4 * length * width)
    head_rows = tokens if arm == "naive" else rows
    head = head_rows * 2 * (width**2 + width * work.teacher.vocab_size)
    spared = (tokens - rows) * 2 * (width**2 + 2 * width * ffn)
    return float(layers * layer + head - (spared if arm in ("trimmed", "ours") else 0))


def summary(work: Work, seconds: dict[str, list[float]], rate: float) -> dict[str, Any]:
    """Tokens per second, what the arms are compared for, and utilisation."""
    rates = {name: [work.tokens / s for s in values] for name, values in seconds.items()}
    return {
        "tokens": work.tokens,
        "tokens_per_s": rates,
        "ratios": ratios_to(rates, "ours"),
        "matmul_flops_per_s": rate,
        "utilisation": {
            name: flops(work, name) / statistics.median(values) / rate
            for name, values in seconds.items()
        },
        "device_idle_share": idle_share(lambda: ours(work), work.teacher.device),
        "kernels": top_kernels(lambda: ours(work), work.teacher.device),
    }


def make_work(out: Path, corpus_dir: Path, teacher_dir: Path, device: str, dtype: str) -> Work:
    """Load teacher and corpus, calibrate the codec."""
    target = resolve_device(device)
    keep_freed_memory(target)
    teacher = load_teacher(str(teacher_dir), target, resolve_dtype(dtype, target))
    corpus, config = Corpus.open(corpus_dir), CacheConfig().on(target.type)
    check_fit(teacher, str(teacher_dir), corpus, config)
    shutil.rmtree(out, ignore_errors=True)
    (out / "teacher").mkdir(parents=True)
    plan = Plan(
        out=out,
        corpus=corpus,
        masking=MaskingConfig(),
        config=config,
        encoding=plan_encoding(teacher, corpus, config),
        teacher=teacher,
    )
    return prepared(Work(with_codecs(plan, {}), teacher, 0, []), 0)


@benchmark
@teacher_option("--size")
@source_options
@click.option("--length", default=128, help="Tokens per sequence.")
@click.option("--sequences", default=256, help="Sequences per repetition.")
@run_options("runs/stage_one", repetitions=3)
@device_options
def main(
    size: str,
    teacher: Path,
    text: Path,
    length: int,
    sequences: int,
    repetitions: int,
    device: str,
    dtype: str,
    out: Path,
) -> Mapping[str, Any]:
    """Tokens per second of stage one against its limit and against a naive script."""
    need_paths(teacher=teacher, text=text)
    block_sequences = min(512, max(1, sequences // 4))
    data = out / f"data_{sequences}x{length}"
    corpus = text_corpus(data, text, teacher, sequences, block_sequences, length)
    made = chosen_teacher(out, size, teacher)
    work = make_work(out / "cache", corpus, made, device, dtype)
    seconds = measure(work, repetitions)
    results = summary(work, seconds, matmul_rate(work.teacher.device, work.teacher.dtype))
    shutil.rmtree(out / "cache")
    rows = [
        [name, f"{median_of(rates):,.0f}", f"{results['utilisation'][name]:.0%}"]
        for name, rates in results["tokens_per_s"].items()
    ]
    click.echo(markdown_table(("arm", "tokens/s", "of the matmul rate"), rows))
    for name, values in results["ratios"].items():
        click.echo(f"{name}: {median_of(values):.3f}")
    click.echo(f"matmul rate: {results['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s")
    if results["device_idle_share"] is not None:
        click.echo(f"device idle: {results['device_idle_share']:.1%}")
    return {"size": size, **results}


if __name__ == "__main__":
    main()
