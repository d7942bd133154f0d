"""The loader alone: shards to batches, against bare decompression and against what people write.

Three arms read the same cache, in turn, in one process, with a warm file cache:

    inflate  zstd decompression of every block, nothing else: the limit
    ours     checked, decoded, shuffled, collated batches
    samples  webdataset, one sample per sequence, a shuffle buffer, a collate function

    python -m benchmarks.loader --cache runs/wiki/cache

Rates are tokens per second of CPU time, all threads added up: tokens per second and core.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import webdataset
import zstandard

from benchmarks.common import (
    benchmark,
    conclude,
    markdown_table,
    median_of,
    need_paths,
    run_options,
    source_options,
)
from benchmarks.teachers import default_cache, text_corpus
from distilcache.data.cache.cache import Cache
from distilcache.data.cache.schema import decode_block
from distilcache.data.cache.shards import read_frame, shard_path
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.models.device import keep_freed_memory

SAMPLED_BLOCKS = 2
"""Blocks that ``samples`` reads: it is slow."""
BUFFER = 2000
"""Sequences in its shuffle buffer."""


def inflate(cache: Cache) -> Callable[[], int]:
    """Decompress every block; the frames are in memory."""
    entries = [cache.entry(i) for i in range(cache.num_blocks)]
    frames = [read_frame(shard_path(cache.path, e.round, e.shard), e) for e in entries]
    tokens = sum(e.tokens for e in entries)

    def run() -> int:
        for frame in frames:
            zstandard.ZstdDecompressor().decompress(frame)
        return tokens

    return run


def ours(cache: Cache, signal: str, batch_size: int, epochs: int) -> Callable[[], int]:
    """All batches of some epochs, with the loader's own threads.

    They are at work on the next window when the last batch is there. What they still do counts as
    this arm's, and not as that of the arm that comes next.
    """

    def run() -> int:
        batches = CachedBatches(cache, batch_size=batch_size, seed=0, signal=signal)
        count = epochs * batches.steps_per_epoch
        tokens = sum(batches[k]["input_ids"].numel() for k in range(count))
        batches._pool.shutdown(cancel_futures=True)
        return tokens

    return run


def samples(cache: Cache, batch_size: int) -> Callable[[], int]:
    """What one writes without thinking in columns: a dict per sequence, stacked per batch."""
    tars = [str(p) for p in sorted((cache.path / "shards").rglob("*.tar"))]

    def sequences() -> Iterator[dict[str, Any]]:
        members = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
        for member in itertools.islice(iter(members), SAMPLED_BLOCKS):
            yield from _sequences(decode_block(member["arrow.zst"])[0], cache)

    def run() -> int:
        held: list[dict[str, Any]] = []
        tokens = 0
        generator = np.random.default_rng(0)
        for sample in itertools.chain(sequences(), itertools.repeat(None)):
            if sample is not None:
                held.append(sample)
            if sample is not None and len(held) < BUFFER:
                continue
            if len(held) < batch_size:
                return tokens
            chosen = [held.pop(generator.integers(len(held))) for _ in range(batch_size)]
            tokens += _collate(chosen)["input_ids"].numel()
        return tokens

    return run


def _sequences(columns: dict[str, np.ndarray], cache: Cache) -> Iterator[dict[str, Any]]:
    """One dict per sequence of a block."""
    positions = len(columns["labels"])
    held = {n: v for n, v in columns.items() if n.startswith(("logit_", "log_odds"))}
    by_position = {n: v.reshape(positions, -1) for n, v in held.items() if len(v)}
    for hidden in cache.encoding.hidden:
        # Copied, as any slice of one sequence would be.
        by_position[hidden.column] = columns[hidden.column].reshape(-1, positions).T
    token = masked = 0
    for length, count in zip(columns["lengths"], columns["masked_counts"], strict=True):
        tokens = slice(token, token + int(length))
        rows = slice(masked, masked + int(count))
        yield {
            "input_ids": torch.from_numpy(columns["input_ids"][tokens].astype(np.int64)),
            "positions": columns["masked_positions"][rows].astype(np.int64),
            "labels": torch.from_numpy(columns["labels"][rows].astype(np.int64)),
            **{name: torch.from_numpy(v[rows].copy()) for name, v in by_position.items()},
        }
        token, masked = tokens.stop, rows.stop


def _collate(held: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad and stack."""
    ids = torch.nn.utils.rnn.pad_sequence([s["input_ids"] for s in held], batch_first=True)
    width = ids.shape[1]
    index = np.concatenate([s["positions"] + row * width for row, s in enumerate(held)])
    rest = held[0].keys() - {"input_ids", "positions"}
    batch = {name: torch.cat([s[name] for s in held]) for name in rest}
    return {"input_ids": ids, "masked_index": torch.from_numpy(index), **batch}


def measure(arms: dict[str, Callable[[], int]], repetitions: int) -> dict[str, list[float]]:
    """Tokens per second of CPU time of each arm and repetition; a first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for repetition in range(repetitions + 1):
        for name, arm in arms.items():
            begun = time.process_time()
            tokens = arm()
            rate = tokens / (time.process_time() - begun)
            if repetition:
                rates[name].append(rate)
    return rates


@benchmark
@click.option(
    "--cache",
    "cache_dir",
    type=click.Path(path_type=Path),
    show_default="one is made of --teacher and --text",
    help="A finished cache.",
)
@source_options
@click.option("--tokens", default=500_000, help="Tokens of a cache that is made.")
@click.option("--signal", default="replay+topk", help="replay, replay+topk or sparse.")
@click.option("--batch-size", default=32, help="Sequences per batch.")
@click.option("--epochs", default=24, help="Epochs per repetition of `ours`.")
@run_options("runs/loader", repetitions=5)
def main(
    cache_dir: Path | None,
    teacher: Path,
    text: Path,
    tokens: int,
    signal: str,
    batch_size: int,
    epochs: int,
    repetitions: int,
    out: Path,
    json_path: Path | None,
) -> None:
    """Tokens per second and core of the loader, against its limit and a loader of samples."""
    keep_freed_memory(torch.device("cpu"))
    if cache_dir is None:
        need_paths(teacher=teacher, text=text)
        home = out / str(tokens)
        corpus = text_corpus(home / "data", text, teacher, tokens // 128, 512)
        cache_dir = default_cache(home, corpus, teacher).path
    torch.set_num_threads(1)
    cache = Cache.open(cache_dir)
    arms = {
        "inflate": inflate(cache),
        "ours": ours(cache, signal, batch_size, epochs),
        "samples": samples(cache, batch_size),
    }
    rates = measure(arms, repetitions)
    rows = []
    for name, values in rates.items():
        spread = median_of(values)
        rows.append([name, *(f"{x / 1e6:.2f}" for x in (spread.median, spread.q1, spread.q3))])
    click.echo(markdown_table(("arm", "million tokens per CPU second", "from", "to"), rows))
    ratios = {
        f"ours / {other}": statistics.median(
            a / b for a, b in zip(rates["ours"], rates[other], strict=True)
        )
        for other in ("inflate", "samples")
    }
    for name, value in ratios.items():
        click.echo(f"{name}: {value:.2f}")
    conclude(json_path, tokens_per_cpu_s=rates, ratios=ratios)


if __name__ == "__main__":
    main()
