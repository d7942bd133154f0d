"""The loader alone: shards to batches, against bare decompression and a loader of samples.

Three arms read the same cache, in turn, in one process, with a warm file cache:

    inflate  zstd decompression of every block, nothing else: the limit
    ours     checked, decoded, shuffled, collated batches
    samples  webdataset, one sample per sequence, a shuffle buffer, a collate function

    python -m benchmarks.loader --cache runs/wiki/cache

Rates are tokens per second of CPU time, all threads added up: tokens per second and core.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import webdataset
import zstandard

from benchmarks.common import (
    PATH,
    benchmark,
    median_of,
    need_paths,
    ratios_to,
    run_options,
    source_options,
    take_turns,
)
from benchmarks.teachers import make_cache, text_corpus
from distilcache.data.cache.cache import Cache
from distilcache.data.cache.frames import decode_block
from distilcache.data.cache.shards import read_frame, shard_path
from distilcache.data.loader.dataset import CachedBatches
from distilcache.pipeline.report.text import markdown_table
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


def ours(cache: Cache, batch_size: int, epochs: int) -> Callable[[], int]:
    """All batches of some epochs, with the loader's own threads.

    After the last batch they still work on the next window; that work counts for this arm, and not
    for the next one.
    """

    def run() -> int:
        batches = CachedBatches(cache, batch_size=batch_size, seed=0, signal="replay+topk")
        count = epochs * batches.steps_per_epoch
        tokens = sum(batches[k]["input_ids"].numel() for k in range(count))
        batches._pool.shutdown(cancel_futures=True)
        return tokens

    return run


def samples(cache: Cache, batch_size: int) -> Callable[[], int]:
    """The usual way: a dict per sequence, stacked per batch."""
    tars = [str(p) for p in sorted((cache.path / "shards").rglob("*.tar"))]

    def sequences() -> Iterator[dict[str, Any]]:
        members = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
        for member in itertools.islice(iter(members), SAMPLED_BLOCKS):
            yield from _sequences(decode_block(member["arrow.zst"])[0], cache)

    def run() -> int:
        buffer: list[dict[str, Any]] = []
        tokens = 0
        generator = np.random.default_rng(0)
        for sample in itertools.chain(sequences(), itertools.repeat(None)):
            if sample is not None:
                buffer.append(sample)
            if sample is not None and len(buffer) < BUFFER:
                continue
            if len(buffer) < batch_size:
                return tokens
            chosen = [buffer.pop(generator.integers(len(buffer))) for _ in range(batch_size)]
            tokens += _collate(chosen)["input_ids"].numel()
        return tokens

    return run


def _sequences(columns: dict[str, np.ndarray], cache: Cache) -> Iterator[dict[str, Any]]:
    """One dict per sequence of a block."""
    positions = len(columns["labels"])
    stored = {n: v for n, v in columns.items() if n.startswith(("logit_", "log_odds"))}
    by_position = {n: v.reshape(positions, -1) for n, v in stored.items() if len(v)}
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


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad and stack."""
    ids = torch.nn.utils.rnn.pad_sequence([s["input_ids"] for s in rows], batch_first=True)
    width = ids.shape[1]
    index = np.concatenate([s["positions"] + row * width for row, s in enumerate(rows)])
    rest = rows[0].keys() - {"input_ids", "positions"}
    batch = {name: torch.cat([s[name] for s in rows]) for name in rest}
    return {"input_ids": ids, "masked_index": torch.from_numpy(index), **batch}


def cpu_rate(arm: Callable[[], int]) -> float:
    """Tokens per second of CPU time."""
    begun = time.process_time()
    tokens = arm()
    return tokens / (time.process_time() - begun)


@benchmark
@click.option(
    "--cache",
    "cache_dir",
    type=PATH,
    show_default="one is made of --teacher and --text",
    help="A finished cache.",
)
@source_options
@click.option("--tokens", default=500_000, help="Tokens of a cache that is made.")
@click.option("--batch-size", default=32, help="Sequences per batch.")
@click.option("--epochs", default=24, help="Epochs per repetition of `ours`.")
@run_options("runs/loader", repetitions=5)
def main(
    cache_dir: Path | None,
    teacher: Path,
    text: Path,
    tokens: int,
    batch_size: int,
    epochs: int,
    repetitions: int,
    out: Path,
) -> Mapping[str, Any]:
    """Tokens per second and core of the loader, against its limit and a loader of samples."""
    keep_freed_memory(torch.device("cpu"))
    if cache_dir is None:
        need_paths(teacher=teacher, text=text)
        home = out / str(tokens)
        corpus = text_corpus(home / "data", text, teacher, tokens // 128, 512)
        cache_dir = make_cache(home / "cache", corpus, teacher).path
    torch.set_num_threads(1)
    cache = Cache.open(cache_dir)
    arms = {
        "inflate": inflate(cache),
        "ours": ours(cache, batch_size, epochs),
        "samples": samples(cache, batch_size),
    }
    turns = {name: lambda _, arm=arm: cpu_rate(arm) for name, arm in arms.items()}
    rates = take_turns(turns, repetitions, warm_up=True)
    millions = {name: [rate / 1e6 for rate in values] for name, values in rates.items()}
    rows = [[name, f"{median_of(values):.2f}"] for name, values in millions.items()]
    click.echo(markdown_table(("arm", "million tokens per CPU second"), rows))
    ratios = ratios_to(rates, "ours")
    for name, values in ratios.items():
        click.echo(f"{name}: {median_of(values):.2f}")
    return {"tokens_per_cpu_s": rates, "ratios": ratios}


if __name__ == "__main__":
    main()
