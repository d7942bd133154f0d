"""What stored relations cost in bytes, and how close they are to the teacher's.

For each quality stage one writes a cache that holds nothing else; ``verify --rerun`` compares all
of its blocks with the teacher. Codecs are fitted to other text. Bytes are those of the shards, less
those of a mask-only cache.

    python -m benchmarks.relations --json runs/relations.json
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click

from benchmarks.common import PATH, benchmark, need_paths, source_options
from benchmarks.teachers import SPARE, make_cache, text_corpus
from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.corpus.store import Corpus
from distilcache.pipeline.report.text import markdown_table
from distilcache.stages.teacher_cache import calibration_runs, encoding
from distilcache.stages.teacher_cache.task import Plan
from distilcache.stages.verify.rerun import RerunSettings, rerun

BLOCK = 512
"""Sequences per block."""
QUALITIES = (0.005, 0.01, 0.0175, 0.02, 0.04, 0.05, 0.08)
"""Of ``cache.relation_quality``."""


def relation_error(cache: Cache) -> float:
    """Mean relation KL of all blocks, in nats."""
    rows = rerun(cache, RerunSettings(blocks=cache.num_blocks))
    return next(row.value for row in rows if row.name.startswith("relations"))


@benchmark
@source_options
@click.option("--sequences", default=512, help="Sequences of 128 tokens that are measured.")
@click.option("--out", default="runs/relations", type=PATH, help="Work folder.")
def main(teacher: Path, text: Path, sequences: int, out: Path) -> Mapping[str, Any]:
    """Bytes per token against relation KL, for several qualities."""
    need_paths(teacher=teacher, text=text)
    measured = text_corpus(out / "measured", text, teacher, sequences, BLOCK)
    skip = sequences + SPARE
    fitted = Corpus.open(text_corpus(out / "fitted", text, teacher, BLOCK, BLOCK, skip=skip))
    fit = calibration_runs.codec_of_relations

    def on_other_text(plan: Plan) -> HiddenCodec:
        return fit(replace(plan, corpus=fitted))

    def cache(name: str, **settings: Any) -> Cache:
        path = out / "caches" / name
        return make_cache(path, measured, teacher, dtype="float32", **settings)

    bare = cache("bare", mask_only=True).manifest.totals
    rows = []
    with mock.patch.object(encoding, "codec_of_relations", on_other_text):
        for quality in QUALITIES:
            made = cache(
                f"{quality:g}",
                hidden_dtype="none",
                top_k=0,
                relation_layer=-1,
                relation_quality=quality,
            )
            totals = made.manifest.totals
            row = {
                "relation_quality": quality,
                "relation_kl": relation_error(made),
                "bytes_per_token": (totals["bytes"] - bare["bytes"]) / totals["tokens"],
                "clipped_fraction": made.manifest.clipped_fraction,
            }
            rows.append(row)
    click.echo(
        markdown_table(list(rows[0]), [[f"{value:.3g}" for value in r.values()] for r in rows])
    )
    return {"relations": rows}


if __name__ == "__main__":
    main()
