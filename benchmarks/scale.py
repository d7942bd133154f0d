"""The index of a cache of a trillion tokens.

    python -m benchmarks.scale

Writes index and manifest of this many shards and blocks from made-up commit markers. Then measures
each step in a process of its own that has imported what it needs: opening, the order of the first
epoch and the blocks of its first window, and the same at a random step of a later epoch, which a
resumed run has to find. Resident memory is that of the whole process; it includes the pages of the
mapped index that were read.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import PATH, benchmark
from distilcache.data.cache.cache import Cache
from distilcache.data.cache.manifest import finish_cache
from distilcache.data.cache.schema import Encoding
from distilcache.data.loader.order import EpochOrder, Layout, choose_streams
from distilcache.data.storage.files import write_json
from distilcache.pipeline.report.text import markdown_table

STEPS = ("finish", "open", "order", "resume")
SEQUENCES, LENGTH, BLOCK_BYTES = 512, 128, 4_300_000
"""Per block: 65,536 tokens, at 33 to 65 bytes."""
BATCH_SIZE, WINDOW_BLOCKS = 1024, 16


def memory() -> dict[str, float]:
    """Resident MB of this process: now, its private part, and the most so far."""
    names = {"VmRSS": "resident_mb", "RssAnon": "private_mb", "VmHWM": "peak_mb"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        names[word[0][:-1]]: int(word[1]) * 1024 / 1e6
        for word in lines
        if word and word[0][:-1] in names
    }


def made_up_markers(shards: int, blocks: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Commit markers of shards that are not there."""
    rng = np.random.default_rng(0)
    per_round = shards // rounds
    for number in range(shards):
        round_index, shard = divmod(number, per_round)
        first, last = (blocks * n // shards for n in (number, number + 1))
        sizes = rng.integers(BLOCK_BYTES // 2, BLOCK_BYTES, last - first).tolist()
        ends = np.cumsum([0, *(512 + -(-size // 512) * 512 for size in sizes)]).tolist()
        shared = {"round": round_index, "shard": shard, "masked": 9830, "positions": 9830}
        rows = [
            {**shared, "block": first + i, "offset": ends[i] + 512, "size": size, "crc32": i,
             "sequences": SEQUENCES - i % 7, "tokens": LENGTH * (SEQUENCES - i % 7)}
            for i, size in enumerate(sizes)
        ]  # fmt: skip
        yield {"bytes": ends[-1], "clipped_codes": 0, "column_bytes": {}, "blocks": rows}


def finish(out: Path, shards: int, blocks: int) -> dict[str, Any]:
    """Write index and manifest."""
    provenance: dict[str, Any] = {"identity": {"made_up": True}, "environment": {}}
    (out / "teacher").mkdir(parents=True)
    write_json(out / "provenance.json", provenance)
    manifest = finish_cache(
        out,
        made_up_markers(shards, blocks, 2),
        encoding=Encoding(vocab_size=30522, max_length=LENGTH, pad_id=0, mask_only=True),
        head=None,
        provenance=provenance,
        rounds=2,
    )
    return {"index_mb": (out / "index.arrow").stat().st_size / 1e6, **manifest.totals}


def find_batch(cache: Cache, epoch: int, fraction: float) -> dict[str, Any]:
    """The blocks that a batch is read from, as a run that begins there has to find them."""
    blocks = cache.round_range(epoch % cache.manifest.rounds)
    sizes = cache.index["sequences"][blocks.start : blocks.stop]
    total, most = int(sizes.sum()), int(sizes.max())
    streams = choose_streams(0, BATCH_SIZE, total)
    layout = Layout(total, BATCH_SIZE, streams, WINDOW_BLOCKS * most)
    step = int(fraction * layout.steps)
    order = EpochOrder(sizes, 0, epoch, layout)
    window = step // layout.window_steps
    parts = [part for stream in range(streams) for part in order.slices(window, stream)]
    rows = sum(len(order.shuffle(window, stream)) for stream in range(streams))
    entries = [cache.entry(blocks.start + part.block) for part in parts]
    assert rows == sum(part.stop - part.start for part in parts)
    return {"steps": layout.steps, "step": step, "blocks_read": len(entries)}


def run_step(step: str, out: Path, shards: int, blocks: int) -> dict[str, Any]:
    """One measurement, in this process."""
    before = memory()
    opened = Cache.open(out) if step in ("order", "resume") else None
    start = time.perf_counter()
    if opened is None:
        made = step == "finish"
        found = finish(out, shards, blocks) if made else {"blocks": Cache.open(out).num_blocks}
    elif step == "order":
        found = find_batch(opened, 0, 0.0)
    else:
        found = find_batch(opened, 3, float(np.random.default_rng().random()))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "before_mb": before["resident_mb"], **memory(), **found}


def measure(step: str, out: Path, shards: int, blocks: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--step", step, "--out", str(out)]
    sizes = ["--shards", str(shards), "--blocks", str(blocks)]
    done = subprocess.run(
        [*command, *sizes],
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row per step."""
    names = ("before_mb", "private_mb", "resident_mb", "peak_mb")
    rows = [
        [step, f"{found['seconds']:.2f}", *(f"{found[name]:,.0f}" for name in names)]
        for step, found in results.items()
    ]
    headings = ("step", "seconds", "MB before", "private MB", "resident MB", "peak MB")
    return markdown_table(headings, rows)


@benchmark
@click.option("--shards", default=500_000, help="Shards of the cache.")
@click.option("--blocks", default=15_000_000, help="Blocks of the cache.")
@click.option("--repetitions", default=3, help="Of each step but the first; the median is shown.")
@click.option("--out", default="runs/scale", type=PATH, help="Work folder.")
@click.option("--step", type=click.Choice(STEPS), help="This one alone, in this process.")
def main(
    shards: int, blocks: int, repetitions: int, out: Path, step: str | None
) -> Mapping[str, Any] | None:
    """Opening, order and resuming with the index of a very large cache."""
    if step:
        click.echo(json.dumps(run_step(step, out, shards, blocks)))
        return None
    shutil.rmtree(out, ignore_errors=True)
    results = {}
    for name in STEPS:
        times = 1 if name == "finish" else repetitions
        runs = [measure(name, out, shards, blocks) for _ in range(times)]
        results[name] = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    shutil.rmtree(out)
    click.echo(table(results))
    return {"steps": results}


if __name__ == "__main__":
    main()
