"""Corpus building end to end against the bare tokenizer and against a naive script.

The arms go over the same text on the same cores, in turn, each in a process of its own:

    processes  bare: a process per core, each with its blocks of the text in memory, one call of the
               tokenizer per block, nothing kept: the limit
    threads    bare: one process and the tokenizer library's own threads
    naive      the usual script: a transformers tokenizer over batches of lines, token lists
               joined and cut in Python, written as Arrow
    ours       `distilcache corpus`: open the tokenizer, start the workers, read, split by hash,
               tokenise, pack, write, sync, manifest
    ours-xz    the same from an .xz file

Imports are not timed.

    python -m benchmarks.corpus --text ../shared/corpus/wiki_train_100MB.txt.xz --megabytes 100
"""

import lzma
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import click

from benchmarks.common import (
    benchmark,
    excerpt,
    median_of,
    need_paths,
    ratios_to,
    run_options,
    source_options,
    take_turns,
)
from distilcache.pipeline.report.text import markdown_table
from distilcache.stages.workers.processes import worker_pool

LINES = 1000
"""Lines per batch of the naive script: the default of the library that it imitates."""
DOCUMENTS = 500
"""Documents per call of the bare library."""
MAX_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Work:
    """What every arm is given."""

    text: Path
    tokenizer: Path
    out: Path
    """Folder that is not there yet."""
    cores: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What an arm took."""

    seconds: float
    cpu: float
    """CPU seconds of all its processes."""


class Clock:
    """Wall and CPU time from here on; worker processes count once they have ended."""

    def __init__(self) -> None:
        self._begun, self._cpu = time.perf_counter(), self._used()

    def stop(self) -> Cost:
        """Time since the start."""
        return Cost(time.perf_counter() - self._begun, self._used() - self._cpu)

    @staticmethod
    def _used() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, kinds))


def processes(work: Work) -> Cost:
    """The limit."""
    gate = multiprocessing.get_context("spawn").Barrier(work.cores)
    with worker_pool(work.cores, _open, work, gate) as pool:
        found = list(pool.map(_encode_every, range(work.cores)))
    return Cost(max(cost.seconds for cost in found), sum(cost.cpu for cost in found))


_opened: tuple[Any, list[list[str]], Any] | None = None
"""Tokenizer, blocks of text and starting gate of a process of :func:`processes`."""


def _open(work: Work, gate: Any) -> None:
    global _opened
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _opened = *_in_memory(work), gate


def _encode_every(first: int) -> Cost:
    assert _opened is not None
    tokenizer, blocks, gate = _opened
    gate.wait()  # all processes start together, and none takes two tasks
    clock = Clock()
    for block in blocks[first :: gate.parties]:
        tokenizer.encode_batch_fast(block, add_special_tokens=False)
    return clock.stop()


def threads(work: Work) -> Cost:
    """The library's own threads, in batches that keep all of them busy."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(work.cores)}
    tokenizer, blocks = _in_memory(work)
    step = 4 * work.cores
    batches = [list(chain(*blocks[i : i + step])) for i in range(0, len(blocks), step)]
    clock = Clock()
    for batch in batches:
        tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return clock.stop()


def _in_memory(work: Work) -> tuple[Any, list[list[str]]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work.tokenizer / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    documents = work.text.read_text(encoding="utf-8").split("\n\n")
    return tokenizer, [documents[i : i + DOCUMENTS] for i in range(0, len(documents), DOCUMENTS)]


def naive(work: Work) -> Cost:
    """The usual script."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(work.cores)}
    import pyarrow as pa
    from transformers import AutoTokenizer

    clock = Clock()
    tokenizer: Any = AutoTokenizer.from_pretrained(work.tokenizer)
    columns = {"input_ids": pa.int32(), "attention_mask": pa.int8()}
    columns["special_tokens_mask"] = pa.int8()
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in columns.items()])
    lines = work.text.read_text(encoding="utf-8").splitlines()
    work.out.mkdir(parents=True)
    with (
        pa.OSFile(str(work.out / "data.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for first in range(0, len(lines), LINES):
            batch = lines[first : first + LINES]
            encoded = tokenizer(batch, return_special_tokens_mask=True, verbose=False)
            rows = {name: _grouped(encoded[name]) for name in columns}
            writer.write_batch(pa.record_batch(rows, schema=schema))
    return clock.stop()


def _grouped(lists: list[list[int]]) -> list[list[int]]:
    joined = list(chain(*lists))
    end = len(joined) // MAX_LENGTH * MAX_LENGTH
    return [joined[i : i + MAX_LENGTH] for i in range(0, end, MAX_LENGTH)]


def ours(work: Work) -> Cost:
    """The stage."""
    from distilcache.stages.corpus.build import build_corpus
    from distilcache.stages.corpus.config import CorpusConfig

    clock = Clock()
    config = CorpusConfig(sources=(str(work.text),), workers=work.cores, max_length=MAX_LENGTH)
    build_corpus(config, work.out, str(work.tokenizer))
    return clock.stop()


def ours_xz(work: Work) -> Cost:
    """The stage, from compressed text."""
    packed = work.text.with_suffix(".txt.xz")
    return ours(Work(packed, work.tokenizer, work.out, work.cores))


ARMS: dict[str, Callable[[Work], Cost]] = {
    "processes": processes,
    "threads": threads,
    "naive": naive,
    "ours": ours,
    "ours-xz": ours_xz,
}


def run_arm(name: str, work: Work) -> Cost:
    """One arm in a fresh process."""
    with worker_pool(1) as pool:
        cost = pool.submit(ARMS[name], work).result()
    shutil.rmtree(work.out, ignore_errors=True)
    return cost


def summary(costs: dict[str, list[Cost]], megabytes: float) -> dict[str, Any]:
    """Rates, and ratios of rates per repetition, by the clock and by CPU time."""
    wall = {name: [megabytes / c.seconds for c in found] for name, found in costs.items()}
    cpu = {name: [megabytes / c.cpu for c in found] for name, found in costs.items()}
    kinds = {"wall": wall, "cpu": cpu}
    return {
        "megabytes": megabytes,
        "megabytes_per_s": wall,
        "megabytes_per_cpu_s": cpu,
        "ratios": {
            kind: {n: v for name in ("ours", "ours-xz") for n, v in ratios_to(rates, name).items()}
            for kind, rates in kinds.items()
        },
    }


def prepare(out: Path, text: Path, megabytes: float) -> Path:
    """The start of the text, plain and as .xz."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    plain = out / "text.txt"
    plain.write_text(excerpt(text, int(megabytes * 1e6)), encoding="utf-8")
    with lzma.open(plain.with_suffix(".txt.xz"), "wb", preset=6) as packed:
        packed.write(plain.read_bytes())
    return plain


@benchmark
@source_options
@click.option("--megabytes", default=10.0, help="Text per repetition and arm.")
@run_options("runs/corpus", repetitions=3)
def main(
    teacher: Path, text: Path, megabytes: float, repetitions: int, out: Path
) -> Mapping[str, Any]:
    """Megabytes of text per second of stage `corpus` against its limit and a naive script.

    Of TEACHER, only the tokenizer is used.
    """
    need_paths(teacher=teacher, text=text)
    plain = prepare(out, text, megabytes)
    work = Work(plain, teacher, out / "made", len(os.sched_getaffinity(0)))
    arms = {name: lambda _, name=name: run_arm(name, work) for name in ARMS}
    results = summary(take_turns(arms, repetitions), plain.stat().st_size / 1e6)
    rows = [
        [name, f"{median_of(rates):.2f}", f"{median_of(results['megabytes_per_cpu_s'][name]):.2f}"]
        for name, rates in results["megabytes_per_s"].items()
    ]
    click.echo(markdown_table(("arm", "MB/s", "MB per CPU second"), rows))
    for name, values in results["ratios"]["wall"].items():
        cpu = median_of(results["ratios"]["cpu"][name]).median
        click.echo(f"{name}: {median_of(values).median:.3f} (CPU time: {cpu:.3f})")
    shutil.rmtree(out)
    return {"cores": work.cores, **results}


if __name__ == "__main__":
    main()
