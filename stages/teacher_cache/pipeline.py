"""Stage one as a chain of iterators, each step in threads of its own.

    reader            mask, place, cut into batches      -> BlockInputs, pinned
    device            teacher, LM head, codecs           -> tensors on their way to the host
                      (on a CPU in the caller's thread)
    encoders          checks, columns, zstd              -> EncodedBlock
    writer            shards, in order, synced           (the caller's thread)

The device thread only starts work and copies. Encoders wait for values, each for one block's event.
Every queue is bounded, and blocks keep their order. An error in any step is raised in the caller,
which writes a shard's marker last, as it would without threads.
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import torch

from distilcache.data.cache.shards import EncodedBlock, shard_path, write_shard
from distilcache.stages.teacher_cache.columns import block_signals
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.room import in_room
from distilcache.stages.teacher_cache.task import (
    Job,
    PreparedBlock,
    ShardTask,
    encode,
    prepare_block,
)

INPUTS_AHEAD = 4
"""Blocks that are masked and cut into batches before the device needs them."""
CPU_OUTPUTS = 2
"""Blocks that are encoded while a teacher on the CPU runs. It runs in the caller's thread: in other
threads the C library gets each large piece of memory anew from the kernel (measured: 7 % of an
encoder's time). To wait for the disk a few times a minute costs less."""
OUTPUTS_AHEAD = 16
"""The most blocks between device and writer: a second of a fast device, while a disk syncs."""
OUTPUT_BYTES = 256 << 20
"""The most bytes of these blocks; two blocks are always allowed."""
ENCODERS = {"cpu": 1, "cuda": 4}
"""Threads that encode. Where the teacher uses all cores, a second one would not help."""

T = TypeVar("T")


def run_shards(
    job: Job, tasks: Iterable[ShardTask], progress: Callable[[int], Any]
) -> Generator[dict[str, Any]]:
    """Compute and write shards in order; yields the commit marker of each.

    Args:
        job: What all shards have in common.
        tasks: The shards. They are taken one by one, in another thread, some blocks before they
            are computed.
        progress: Called with the number of tokens of each finished block.
    """
    kind = "cpu" if job.teacher is None else job.teacher.device.type
    with ThreadPoolExecutor(ENCODERS.get(kind, 1), "distilcache-encode") as pool:
        begun: deque[ShardTask] = deque()
        inputs = ahead(_prepared(job, tasks, begun), INPUTS_AHEAD, "distilcache-read")
        outputs = _started(job, inputs, pool)
        if kind == "cpu":
            outputs = delayed(outputs, CPU_OUTPUTS)
        else:
            outputs = ahead(outputs, _depth(job), "distilcache-teacher")
        with closing(outputs):
            for first in outputs:
                task = begun.popleft()
                rest = itertools.islice(outputs, task.num_blocks - 1)
                blocks = _finished(itertools.chain([first], rest), progress)
                tar = shard_path(job.out, task.round_index, task.shard)
                yield write_shard(tar, task.round_index, task.shard, blocks, job.identity)


def _prepared(
    job: Job, tasks: Iterable[ShardTask], begun: deque[ShardTask]
) -> Generator[PreparedBlock]:
    for task in tasks:
        begun.append(task)
        for block in range(task.first_block, task.last_block):
            yield prepare_block(job, task.round_index, block)


def _started(
    job: Job, inputs: Generator[PreparedBlock], pool: ThreadPoolExecutor
) -> Generator[Future[EncodedBlock]]:
    config = job.config
    with closing(inputs):
        for prepared in inputs:
            signals, config = _signals(job, prepared, config)
            yield pool.submit(_encode, job, prepared, *to_host(signals))


def _signals(
    job: Job, prepared: PreparedBlock, config: CacheConfig
) -> tuple[dict[str, torch.Tensor], CacheConfig]:
    """Signals of a block, and the sizes for which the device had memory."""
    teacher = job.teacher
    if teacher is None or prepared.inputs is None:
        return {}, config
    return in_room(
        job,
        prepared,
        config,
        lambda inputs, sizes: block_signals(
            teacher, inputs, job.encoding, job.codecs, sizes.row_chunk
        ),
    )


def _encode(
    job: Job,
    prepared: PreparedBlock,
    signals: Mapping[str, torch.Tensor],
    arrived: torch.cuda.Event | None,
) -> EncodedBlock:
    if arrived is not None:
        arrived.synchronize()
    return encode(job, prepared, signals)


def _finished(
    outputs: Iterator[Future[EncodedBlock]], progress: Callable[[int], Any]
) -> Iterator[EncodedBlock]:
    for output in outputs:
        block = output.result()
        yield block
        progress(block.tokens)


def _depth(job: Job) -> int:
    """Blocks between device and writer, fewer where all logits are stored."""
    split = job.corpus.manifest.splits["train"]
    tokens = -(-split["tokens"] // max(1, split["blocks"]))  # all but the last are of one size
    encoding = job.encoding
    width = sum(h.width for h in encoding.states)
    block_bytes = tokens * 4 * (1 + width + 2 * encoding.top_k)
    return max(2, min(OUTPUTS_AHEAD, OUTPUT_BYTES // block_bytes))


def to_host(
    signals: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
    """Start the copies to pinned memory; returns them and the event of their arrival."""
    copies, arrived = dict(signals), None
    for name, values in signals.items():
        if values.device.type == "cuda":
            copies[name] = torch.empty_like(values, device="cpu", pin_memory=True)
            copies[name].copy_(values, non_blocking=True)
            # One that lets the encoder's thread sleep.
            arrived = arrived or torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    if arrived is not None:
        arrived.record(torch.cuda.current_stream(next(iter(signals.values())).device))
    return copies, arrived


def delayed(items: Generator[T], depth: int) -> Generator[T]:
    """The same items, each only when ``depth`` more have been made after it."""
    waiting: deque[T] = deque()
    with closing(items):
        for item in items:
            waiting.append(item)
            if len(waiting) > depth:
                yield waiting.popleft()
    yield from waiting


def ahead(items: Generator[T], depth: int, name: str) -> Generator[T]:
    """The same items, made ahead of time in a thread.

    What ``items`` raises is raised here. Closing this closes ``items``, in its thread, and waits.
    ``depth`` is the number of items that may be ready before they are taken.
    """
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room, stopped = threading.Semaphore(depth), threading.Event()

    def make() -> None:
        try:
            with closing(items):
                for item in items:
                    room.acquire()
                    if stopped.is_set():
                        return
                    ready.put((item, None))
        except BaseException as error:
            ready.put((None, error))
        else:
            ready.put((None, StopIteration()))

    thread = threading.Thread(target=make, name=name, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        room.release()
        thread.join()
