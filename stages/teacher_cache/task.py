"""One shard of stage one: a pure function of its task, safe to run twice, anywhere."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.codecs.hidden import HiddenCodec
from data.corpus import Corpus
from data.masking import MaskingConfig, mask_block
from data.schema import Encoding, encode_block
from data.shards import EncodedBlock, shard_path, write_shard
from stages.teacher_cache.adapters import Teacher
from stages.teacher_cache.config import CacheConfig
from stages.teacher_cache.signals import SignalBlock, mask_columns, place_signals, signal_columns

IN_FLIGHT = 2
"""Blocks being serialised and compressed while the teacher works on the next."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Name of one unit of work: some consecutive corpus blocks in one round."""

    round_index: int
    shard: int
    first_block: int
    last_block: int
    """One past the last."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that the shards of one cache share."""

    out: Path
    corpus: Corpus
    masking: MaskingConfig
    config: CacheConfig
    encoding: Encoding
    teacher: Teacher | None
    codecs: Mapping[int, HiddenCodec]
    identity: str
    """Hash of the provenance."""
    block_metadata: Mapping[str, Any]
    """What is written into the Arrow schema of every block."""


def shard_tasks(num_blocks: int, blocks_per_shard: int, rounds: int) -> list[ShardTask]:
    """All tasks of a cache, in order of (round, shard)."""
    starts = range(0, num_blocks, blocks_per_shard)
    return [
        ShardTask(r, number, first, min(first + blocks_per_shard, num_blocks))
        for r in range(rounds)
        for number, first in enumerate(starts)
    ]


def placed_block(job: Job, round_index: int, block: int) -> SignalBlock:
    """Read and mask one corpus block, and decide where its signals lie."""
    ids, lengths = job.corpus.split("train").block(block)
    manifest = job.corpus.manifest
    masked = mask_block(
        ids,
        lengths,
        config=job.masking,
        round_index=round_index,
        block_index=block,
        special_ids=manifest.all_special_ids,
        mask_id=manifest.special_ids["mask"],
        vocab_size=manifest.vocab_size,
        token_counts=job.corpus.token_counts,
    )
    return place_signals(masked, lengths, job.encoding, (job.masking.seed, round_index, block))


def run_shard(job: Job, task: ShardTask, progress: Callable[[int], Any]) -> dict[str, Any]:
    """Compute and write one shard; returns its commit marker.

    Args:
        job: What all shards share.
        task: Which one.
        progress: Called with the number of tokens of each finished block.
    """
    tar = shard_path(job.out, task.round_index, task.shard)
    with ThreadPoolExecutor(1, thread_name_prefix="distilcache-encode") as pool:
        blocks = _encoded_blocks(job, task, pool, progress)
        return write_shard(tar, task.round_index, task.shard, blocks, job.identity)


def _encoded_blocks(
    job: Job, task: ShardTask, pool: ThreadPoolExecutor, progress: Callable[[int], Any]
) -> Iterator[EncodedBlock]:
    """The teacher runs here; serialising and compressing run beside it in ``pool``."""
    pending: deque[Future[EncodedBlock]] = deque()
    for block in range(task.first_block, task.last_block):
        placed = placed_block(job, task.round_index, block)
        columns = mask_columns(placed.block, placed.lengths, job.encoding)
        clipped = 0
        if job.teacher is not None:
            signals, clipped = signal_columns(
                job.teacher,
                placed,
                job.encoding,
                job.codecs,
                batch_tokens=job.config.batch_tokens,
                row_chunk=job.config.row_chunk,
            )
            columns |= signals
        metadata = {**job.block_metadata, "round": task.round_index, "block": block}
        pending.append(pool.submit(_encode, job, placed, columns, metadata, clipped))
        progress(int(placed.lengths.sum()))
        while len(pending) > IN_FLIGHT:
            yield pending.popleft().result()
    yield from (future.result() for future in itertools.chain(pending))


def _encode(
    job: Job,
    placed: SignalBlock,
    columns: dict[str, np.ndarray],
    metadata: dict[str, Any],
    clipped: int,
) -> EncodedBlock:
    coded = {h.column for h in job.encoding.hidden if h.dtype == "coded"}
    rows = placed.hidden_rows if job.encoding.hidden else placed.logit_rows
    return EncodedBlock(
        block=metadata["block"],
        frame=encode_block(columns, metadata, dict.fromkeys(coded, len(placed.hidden_rows))),
        sequences=len(columns["lengths"]),
        tokens=len(columns["input_ids"]),
        masked=len(columns["labels"]),
        positions=0 if job.teacher is None else len(rows),
        column_bytes={name: values.nbytes for name, values in columns.items()},
        clipped=clipped,
    )
