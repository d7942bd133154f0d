"""What a stored signal costs in bytes, and how close it is to the live teacher's gradient.

For each encoding stage one writes a cache, the loader reads it, and the fused loss computes L_ce.
Its gradient by all of the student's parameters is compared with that of the live full distribution:
for one batch and for sums over more of them (an angle that stops falling is bias), for a fresh
student and a trained one. Codecs are fitted to the text that the student was trained on, and
measured on another. Bytes are those of the shards.

    python -m benchmarks.fidelity --json runs/fidelity.json --plot docs/fidelity.png
"""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
from transformers import DistilBertForMaskedLM

from benchmarks.common import PATH, benchmark, need_paths, source_options
from benchmarks.encodings import ENCODINGS, EXACT, POSITIONS, Stored
from benchmarks.fidelity_report import save_plot, tables
from benchmarks.gradients import Source, gradient_gaps, replay_error
from benchmarks.rivals import Rival, Rivalled, rivals
from benchmarks.teachers import SPARE, make_cache, text_corpus
from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.corpus.store import Corpus
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student
from distilcache.stages.teacher_cache import calibration_runs, encoding
from distilcache.stages.teacher_cache.task import Plan

BATCH = 16
BLOCK = 512
"""Sequences per block."""
CALIBRATION = 400
"""Sequences that codecs are fitted to."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement shares."""

    out: Path
    teacher: Path
    sequences: int
    only: tuple[str, ...] = ()
    """Parts of names; where there are any, only these encodings are measured."""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def cache(self, corpus: Path, name: str, settings: Mapping[str, Any]) -> Cache:
        """A cache of a corpus; float32, so that only the encoding makes a difference."""
        path = self.out / "caches" / name.replace(" ", "_")
        settings = {"calibration_sequences": CALIBRATION, **settings}
        return make_cache(path, corpus, self.teacher, dtype="float32", **settings)

    def chosen(self, encodings: Sequence[Stored]) -> list[Stored]:
        """Those whose names hold one of ``only``."""
        return [e for e in encodings if not self.only or any(o in e.name for o in self.only)]

    def marks(self, long: bool) -> tuple[int, ...]:
        """Numbers of batches whose sums are reported."""
        marks = {1, min(5, self.sequences // BATCH)}
        return tuple(sorted(marks | ({self.sequences // BATCH} if long else set())))

    def add(
        self,
        live: Cache,
        sources: Mapping[tuple[str, str], Source],
        student: tuple[str, Any],
        temperature: float,
        *,
        long: bool = False,
    ) -> None:
        """Measure the angles of some sources, by encoding and signal, against the live one."""
        name, model = student
        exact = Source(live, "replay", model, BATCH, temperature)
        marks = self.marks(long)
        sums = gradient_gaps(exact, sources, model, range(marks[-1]) if sources else ())
        for number, gaps in enumerate(sums, start=1):
            if number not in marks:
                continue
            for (stored, signal), gap in gaps.items():
                self.rows.append(
                    {
                        "student": name,
                        "encoding": stored,
                        "signal": signal,
                        "temperature": temperature,
                        "sequences": number * BATCH,
                        **asdict(gap),
                    }
                )


@contextmanager
def calibrating_on(corpus: Corpus) -> Iterator[None]:
    """Within this context stage one fits codecs to this corpus, whatever it encodes."""
    fit = calibration_runs.codec_of_layer

    def fitted(plan: Plan, layer: int) -> HiddenCodec:
        return fit(replace(plan, corpus=corpus), layer)

    with mock.patch.object(encoding, "codec_of_layer", fitted):
        yield


def make_student(bench: Bench, size: str, cache: Cache, steps: int) -> Path:
    """A student of the shared recipe after some steps (0: as it starts)."""
    out = bench.out / f"student_{steps}"
    train = TrainConfig(
        signal="replay",
        vocabulary_fraction=1.0,
        steps=max(steps, 1),
        batch_size=BATCH,
        # A rate of next to nothing leaves the student as it was initialised.
        lr=5e-4 if steps else 1e-30,
        save_steps=10**6,
    )
    train_student(
        cache_dir=cache.path,
        out=out,
        size=size,
        student=StudentConfig(sizes=(size,)),
        train=train,
        dtype="float32",
    )
    return out


def measure(
    bench: Bench,
    live: Cache,
    stored: list[tuple[Stored, Cache]],
    student: tuple[str, Any],
    temperature: float,
    *,
    long: bool = False,
) -> None:
    """Add the angles of all encodings at one temperature; where ``long``, of some over all."""
    for longer in {False, long}:
        sources = {
            (s.name, signal): Source(c, signal, student[1], BATCH, temperature, sampled=s.sampled)
            for s, c in stored
            if not long or s.long == longer
            for signal in s.signals
        }
        bench.add(live, sources, student, temperature, long=longer)


def measure_rivals(
    bench: Bench, live: Cache, others: list[Rival], student: tuple[str, Any]
) -> None:
    """Add the angles of the other codecs, T = 2."""
    sources = {}
    for rival in others:
        source = Source(live, "replay", student[1], BATCH, 2.0)
        source.model.hidden_decoder = Rivalled(live, rival)
        sources[rival.name, "rival"] = source
    bench.add(live, sources, student, 2.0)


def describe(stored: Stored, cache: Cache, bare: Cache, live: Cache) -> list[dict[str, Any]]:
    """Bytes of a cache's shards, and the replay error of each signal it serves."""
    totals, without = cache.manifest.totals, bare.manifest.totals
    figures = {
        "encoding": stored.name,
        "bytes_per_token": totals["bytes"] / totals["tokens"],
        "bytes_per_position": (totals["bytes"] - without["bytes"]) / totals["positions"],
        "clipped_codes": totals["clipped_codes"],
    }
    return [
        {**figures, "signal": signal, **replay_error(cache, live, signal, BATCH)}
        for signal in stored.signals
    ]


def run_bench(
    bench: Bench,
    corpus: Path,
    training: Cache,
    students: Mapping[str, Path],
    long: Collection[str],
) -> dict[str, Any]:
    """All measurements; sums over all batches for the students named in ``long``.

    Args:
        bench: What they share.
        corpus: What is measured on.
        training: Exact hidden states of what codecs are fitted to.
        students: Checkpoints by name.
        long: Some of these names.
    """
    with calibrating_on(Corpus.open(bench.out / "training" / "corpus")):
        bare = bench.cache(corpus, "bare", {"mask_only": True})
        live = bench.cache(corpus, "live", EXACT)
        everywhere = bench.cache(corpus, "live everywhere", {**EXACT, "positions": "all"})
        caches = [(s, bench.cache(corpus, s.name, s.cache)) for s in bench.chosen(ENCODINGS)]
        hot = [
            (s, bench.cache(corpus, f"{s.name} T4", {**s.cache, "temperatures": (4.0,)}))
            for s in (replace(s, long=False) for s in bench.chosen(ENCODINGS) if s.long)
        ]
        placed = [
            (s, bench.cache(corpus, f"at {s.name}", s.cache)) for s in bench.chosen(POSITIONS)
        ]
    prices = [row for s, c in caches for row in describe(s, c, bare, live)]
    chosen = next((c for s, c in caches if s.name == "coded 1e-3"), None)
    others = rivals(training, chosen) if chosen is not None else []
    prices += [
        {"encoding": r.name, "signal": "rival", "bytes_per_position": r.bytes_per_position}
        for r in others
    ]
    at = [row for s, c in placed for row in describe(s, c, bare, live)]
    for name, path in students.items():
        student = name, DistilBertForMaskedLM.from_pretrained(path).eval()
        served = [(s, c) for s, c in caches if "draws" not in s.name]
        measure(bench, live, served, student, 1.0, long=name in long)
        measure(bench, live, caches, student, 2.0, long=name in long)
        measure_rivals(bench, live, others, student)
        measure(bench, live, hot, student, 4.0)
        measure(bench, everywhere, placed, student, 2.0)
    return {"prices": prices, "positions": at, "angles": bench.rows}


@benchmark
@source_options
@click.option("--sequences", default=800, help="Sequences of 128 tokens that are measured.")
@click.option("--size", default="3x384", help="Student, LAYERSxWIDTH, from the teacher's layers.")
@click.option("--steps", default=100, help="Training steps of the trained student (batch 16).")
@click.option(
    "--student",
    "more",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A further trained student of the same vocabulary; may be repeated.",
)
@click.option("--only", multiple=True, help="Part of the name of encodings; may be repeated.")
@click.option("--out", default="runs/fidelity", type=PATH, help="Work folder.")
@click.option("--plot", type=PATH, help="Write angle against bytes here.")
def main(
    teacher: Path,
    text: Path,
    sequences: int,
    size: str,
    steps: int,
    more: tuple[Path, ...],
    only: tuple[str, ...],
    out: Path,
    plot: Path | None,
) -> Mapping[str, Any]:
    """Bytes per position against gradient fidelity, for every encoding."""
    need_paths(teacher=teacher, text=text)
    measured = text_corpus(out / "measured", text, teacher, sequences, BLOCK)
    further = max(CALIBRATION, BATCH * (steps + 1))
    skip = sequences + SPARE
    corpus = text_corpus(out / "training", text, teacher, further, BLOCK, skip=skip)
    bench = Bench(out, teacher, sequences, only)
    training = bench.cache(corpus, "training", EXACT)
    students = {
        "fresh": make_student(bench, size, training, 0),
        f"{steps} steps": make_student(bench, size, training, steps),
        **{path.name: path for path in more},
    }
    results = run_bench(bench, measured, training, students, {f"{steps} steps"})
    shutil.rmtree(out / "caches")
    click.echo(tables(results) + "\n")
    if plot:
        save_plot(results, plot)
    return results


if __name__ == "__main__":
    main()
