"""Measure a small real run: the teacher on some blocks, each student for some steps."""

import json
import shutil
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.manifest import finish_cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import require
from distilcache.data.progress import Bar
from distilcache.pipeline.flow import build_of
from distilcache.pipeline.plan.corpus_size import other_settings, tokenizer_of
from distilcache.pipeline.plan.cost import Rates
from distilcache.pipeline.plan.size import Size, cache_size, tar_bytes
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.student_train.run import train_student
from distilcache.stages.teacher_cache.ensemble import lm_head_to_keep
from distilcache.stages.teacher_cache.phases import prepare
from distilcache.stages.teacher_cache.pipeline import run_shards
from distilcache.stages.teacher_cache.task import Job, ShardTask

TEXT_BYTES_PER_TOKEN = 8
"""An upper bound for most text; a sample is taken from the start of the sources."""
WARM, STEPS = 2, 6
"""Steps of a student before the measurement, and in it."""


def measured(recipe: Recipe, blocks: int) -> tuple[Size, Rates]:
    """Run teacher and students on some blocks; what they write is removed at the end.

    Blocks are spread over the corpus if it exists, else made from the start of the sources. With a
    corpus the codecs are calibrated as for the real cache, so blocks are the same to the byte.

    Args:
        recipe: The project; its teacher must be there.
        blocks: How many; the first one warms up, and is not timed.

    Raises:
        UserError: Teacher, corpus or a student do not fit the recipe.
    """
    require(blocks >= 2, f"plan: --measure must be 2 blocks or more, got {blocks}")
    with _folder() as folder:
        cache, teacher_rate = _run_teacher(recipe, blocks, Path(folder))
        count, frames = cache.num_blocks, cache.index["size"].tolist()
        stored = tar_bytes(frames, recipe.cache.blocks_per_shard)
        size = cache_size(cache, f"measured on {count} blocks", count, stored)
        return size, replace(measured_students(recipe, cache), teacher=teacher_rate)


def measured_students(recipe: Recipe, cache: Cache) -> Rates:
    """Run students for some steps on a finished cache; what they write is removed at the end."""
    with _folder() as folder:
        students = {
            size: _run_student(recipe, size, cache, Path(folder)) for size in recipe.student.sizes
        }
    return Rates(students=students, source="measured")


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="distilcache-plan-", ignore_cleanup_errors=True)


def _run_teacher(recipe: Recipe, blocks: int, folder: Path) -> tuple[Cache, float]:
    """A cache of some blocks, and the tokens per second of all but the first."""
    corpus = _corpus(recipe, blocks, folder)
    build = build_of(recipe, corpus.path, folder / "cache", _teacher(recipe))
    job = prepare(build)
    assert job.teacher is not None
    there = corpus.split("train").num_blocks
    chosen = sorted({i * there // blocks for i in range(blocks)})
    tasks = [ShardTask(0, shard, block, block + 1) for shard, block in enumerate(chosen)]
    require(len(tasks) > 1, "plan: corpus must have 2 blocks or more to be measured, got 1")
    total = sum(len(corpus.split("train").block(block)[0]) for block in chosen)
    with Bar(total=total, desc="plan: teacher", unit="tok", unit_scale=True) as bar:
        markers = _run(job, tasks[:1], bar)
        begun = time.perf_counter()
        markers += _run(job, tasks[1:], bar)
    seconds = time.perf_counter() - begun
    provenance = json.loads((build.out / "provenance.json").read_text(encoding="utf-8"))
    finish_cache(
        build.out,
        markers,
        encoding=job.encoding,
        head=lm_head_to_keep(job.teacher, build.out / "teacher"),
        provenance=provenance,
        rounds=1,
    )
    timed = sum(row["tokens"] for marker in markers[1:] for row in marker["blocks"])
    return Cache.open(build.out), timed / seconds


def _run(job: Job, tasks: list[ShardTask], bar: Bar) -> list[dict[str, Any]]:
    with closing(run_shards(job, tasks, bar.update)) as markers:
        return list(markers)


def _teacher(recipe: Recipe) -> str:
    """The teacher's checkpoint, given or made by the project."""
    if recipe.teacher.model:
        return recipe.teacher.model
    made = recipe.home / "teacher" / "model"
    require(
        (made / "model.safetensors").is_file(),
        f"plan: teacher must be there to be measured, got none in {made}; run distilcache "
        "teacher-cache, which makes it, or plan without --measure",
    )
    return str(made)


def _corpus(recipe: Recipe, blocks: int, folder: Path) -> Corpus:
    """The project's corpus, or one of some blocks from the start of its sources."""
    if recipe.has_corpus and not other_settings(recipe):
        return Corpus.open(recipe.corpus_dir)
    config = recipe.corpus
    wanted = blocks * config.block_sequences * config.max_length * TEXT_BYTES_PER_TOKEN
    limit = min(wanted, config.max_bytes or wanted)
    small = replace(config, max_bytes=limit, heldout_sources=(), heldout_fraction=0.0)
    name, revision = tokenizer_of(recipe)
    return build_corpus(
        small, folder / "corpus", name, needs=recipe.needs, revision=revision, sample=True
    )


def _run_student(recipe: Recipe, size: str, cache: Cache, folder: Path) -> float:
    """Tokens per second of a student's steps after the first ones."""
    train = replace(
        recipe.train,
        steps=WARM + STEPS,
        accumulation=1,
        logging_steps=WARM,
        save_steps=10**9,
        window_blocks=min(recipe.train.window_blocks, 2),
        report_to=(),
    )
    out = folder / "students" / size
    train_student(
        cache_dir=cache.source,
        out=out,
        size=size,
        student=recipe.student,
        train=train,
        device=recipe.device,
        dtype=recipe.dtype,
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    return statistics.median(float(line["tokens_per_s"]) for line in lines[1:])
