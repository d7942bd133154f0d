"""One block of stage one before and after the device: pure functions, safe to run anywhere."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distilcache.data.cache.frames import encode_block
from distilcache.data.cache.schema import Encoding
from distilcache.data.cache.shards import EncodedBlock, read_marker, shard_path
from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.corpus.store import Corpus
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.teacher_cache.batches import (
    BlockInputs,
    SignalBlock,
    block_inputs,
    place_signals,
)
from distilcache.stages.teacher_cache.columns import block_columns, mask_columns
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.ensemble import AnyTeacher


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One unit of work: some consecutive corpus blocks in one round."""

    round_index: int
    shard: int
    first_block: int
    last_block: int
    """One past the last."""

    def __str__(self) -> str:
        return f"round {self.round_index} shard {self.shard}"

    @property
    def num_blocks(self) -> int:
        """Blocks of the shard."""
        return self.last_block - self.first_block


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a cache is made from, before its codecs are known."""

    out: Path
    corpus: Corpus
    masking: MaskingConfig
    config: CacheConfig
    encoding: Encoding
    teacher: AnyTeacher | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Plan):
    """Everything that the shards of one cache have in common."""

    codecs: Mapping[str, HiddenCodec]
    """By column, on the teacher's device."""
    identity: str
    """Hash of the provenance."""
    block_metadata: Mapping[str, Any]
    """Metadata in the Arrow schema of every block."""


@dataclass(frozen=True, slots=True)
class PreparedBlock:
    """One masked block on its way to the device."""

    round_index: int
    block: int
    placed: SignalBlock
    inputs: BlockInputs | None
    """None for a mask-only cache."""


class ShardTasks:
    """All tasks of a cache in order of (round, shard); each is made when it is asked for.

    The last shard of a round may hold fewer blocks.
    """

    def __init__(self, num_blocks: int, blocks_per_shard: int, rounds: int) -> None:
        self._num_blocks = num_blocks
        self._blocks = blocks_per_shard
        self._shards = -(-num_blocks // blocks_per_shard)
        self._rounds = rounds

    def __len__(self) -> int:
        return self._shards * self._rounds

    def __iter__(self) -> Iterator[ShardTask]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> ShardTask:
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        round_index, shard = divmod(index, self._shards)
        first = shard * self._blocks
        return ShardTask(round_index, shard, first, min(first + self._blocks, self._num_blocks))


def tasks_of(corpus: Corpus, config: CacheConfig) -> ShardTasks:
    """All tasks of a cache."""
    blocks = int(corpus.manifest.splits["train"]["blocks"])
    return ShardTasks(blocks, config.blocks_per_shard, config.rounds)


def placed_block(plan: Plan, round_index: int, block: int) -> SignalBlock:
    """Read and mask one corpus block, and choose the positions of its signals."""
    masked, lengths = plan.corpus.masked("train", block, plan.masking, round_index)
    return place_signals(masked, lengths, plan.encoding, (plan.masking.seed, round_index, block))


def prepare_block(plan: Plan, round_index: int, block: int) -> PreparedBlock:
    """Everything of a block that comes before the device."""
    placed = placed_block(plan, round_index, block)
    inputs = None
    if plan.teacher is not None:
        inputs = block_inputs(placed, plan.encoding, plan.config.batch_tokens, plan.teacher.device)
    return PreparedBlock(round_index, block, placed, inputs)


def encode(job: Job, prepared: PreparedBlock, signals: Mapping[str, torch.Tensor]) -> EncodedBlock:
    """Everything of a block that comes after the device.

    Raises:
        UserError: A signal is not finite.
    """
    placed, encoding = prepared.placed, job.encoding
    columns = mask_columns(placed.block, placed.lengths, encoding)
    clipped = 0
    if job.teacher is not None:
        of_teacher, clipped = block_columns(placed, encoding, signals)
        columns |= of_teacher
    metadata = {**job.block_metadata, "round": prepared.round_index, "block": prepared.block}
    counts = {h.column: len(placed.hidden_rows) for h in encoding.hidden if h.dtype == "coded"}
    if encoding.relation is not None and encoding.relation.dtype == "coded":
        counts[encoding.relation.column] = len(columns["input_ids"])
    rows = placed.hidden_rows if encoding.hidden else placed.logit_rows
    return EncodedBlock(
        block=prepared.block,
        frame=encode_block(columns, metadata, counts),
        sequences=len(columns["lengths"]),
        tokens=len(columns["input_ids"]),
        masked=len(columns["labels"]),
        positions=0 if job.teacher is None else len(rows),
        column_bytes={name: values.nbytes for name, values in columns.items()},
        clipped=clipped,
    )


def done_marker(out: Path, task: ShardTask, identity: str) -> dict[str, Any] | None:
    """The commit marker of a finished shard of this cache; None where it must be made."""
    marker = read_marker(shard_path(out, task.round_index, task.shard))
    return marker if marker is not None and marker["identity"] == identity else None
