"""The phases of stage one, which any process may run: prepare, then shards, then finish.

    prepare   provenance, the teacher's checkpoint, calibrated codecs: by one process at a time
    shards    see pipeline.py: by any number of processes on any number of machines
    finish    index and manifest: by a process that sees that every shard is there

Every phase is skipped where its result is there, so an interrupted run goes on with the same
command.
"""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from distilcache.data.cache.cache import lacking, read_manifest
from distilcache.data.cache.manifest import CacheManifest, finish_cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.storage.files import read_json, sha256_file
from distilcache.data.storage.locks import claimed
from distilcache.stages.models.device import resolve_device, resolve_dtype, room_for, settle
from distilcache.stages.models.relations import RelationTap
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.console import say
from distilcache.stages.teacher_cache.encoding import plan_encoding, with_codecs
from distilcache.stages.teacher_cache.ensemble import (
    AnyTeacher,
    lm_head_to_keep,
    load_teachers,
    others_sha256,
)
from distilcache.stages.teacher_cache.fit import teacher_config
from distilcache.stages.teacher_cache.provenance import (
    check_configuration,
    environment_of,
    identity_of,
    settle_provenance,
)
from distilcache.stages.teacher_cache.staging import (
    WEIGHTS,
    check_copies,
    check_fit,
    check_maskable,
    check_tokenizer,
    in_place,
    is_whole,
    put_teacher,
    stage_teacher,
)
from distilcache.stages.teacher_cache.task import Job, Plan, ShardTask, done_marker, tasks_of


def one_at_a_time(build: Build) -> Any:
    """Context in which one process writes to the cache, and others wait."""
    return claimed(build.out / "cache", wait=True)


@room_for("teacher: it and its calibration", "take the CPU (--set device=cpu)")
def prepare(build: Build) -> Job:
    """Write or check what all shards have in common: provenance, teacher, codecs.

    Raises:
        UserError: Teacher, corpus and existing cache do not fit together.
    """
    target = resolve_device(build.device)
    settle(target)
    configs = [teacher_config(*named, build.needs) for named in build.checkpoints]
    autocast = resolve_dtype(build.dtype, target, configs)
    corpus = Corpus.open(build.corpus_dir)
    check_maskable(corpus)
    teacher = None
    if build.checkpoints:
        teacher = load_teachers(build.checkpoints, target, autocast, build.needs)
        for (name, revision), member in zip(build.checkpoints, teacher.members, strict=True):
            check_fit(member, name, corpus, build.config, revision)
        if build.config.relation_layer:
            (member,) = teacher.members
            where = "cache: relation_layer"
            tap = RelationTap(member.model, build.config.relation_layer, where)
            teacher = replace(member, relation=tap)
    config = build.config.on(target.type)
    check_tokenizer(corpus, build.out / "teacher")
    encoding = plan_encoding(teacher, corpus, config)
    with nullcontext() if in_place(build.out, encoding) else one_at_a_time(build):
        identity = _settle(build, corpus, teacher, str(target), str(autocast).split(".")[-1])
        check_copies(corpus, build.out)
        plan = Plan(
            out=build.out,
            corpus=corpus,
            masking=build.masking,
            config=config,
            encoding=encoding,
            teacher=teacher,
        )
        return with_codecs(plan, identity)


def finish(job: Job) -> None:
    """Write index and manifest from the commit markers of all shards.

    Raises:
        UserError: A shard is not there.
    """
    check_copies(job.corpus, job.out)
    finish_cache(
        job.out,
        # A generator: memory does not grow with the number of shards.
        (_marker(job, task) for task in tasks_of(job.corpus, job.config)),
        encoding=job.encoding,
        head=lm_head_to_keep(job.teacher, job.out / "teacher"),
        provenance=read_json(job.out / "provenance.json", "cache: provenance"),
        rounds=job.config.rounds,
    )


def _marker(job: Job, task: ShardTask) -> dict[str, Any]:
    marker = done_marker(job.out, task, job.identity)
    if marker is None:
        raise UserError(
            f"cache: shards must all be there, got none for {task} in {job.out}; repeat the command"
        )
    return marker


def finished(build: Build) -> CacheManifest | None:
    """The manifest of a cache that has all that is asked for, None where work is left.

    Raises:
        UserError: The manifest is damaged.
    """
    if not (build.out / "manifest.json").exists():
        return None
    manifest = read_manifest(build.out)
    if manifest.rounds < build.config.rounds:
        return None
    if name := lacking(build.out, manifest):
        say(f"{build.out / name} is not there as it was written; what is missing is made again")
        return None
    return manifest


def _settle(
    build: Build, corpus: Corpus, teacher: AnyTeacher | None, device: str, dtype: str
) -> dict[str, Any]:
    """Provenance and the teacher's checkpoint; returns the identity of the cache."""
    kept = build.out / "teacher"
    first = teacher.members[0] if teacher else None
    if first is not None:
        check_configuration(build.out, first.model.config)
    known = is_whole(kept, corpus, first)
    staged = kept if known else stage_teacher(build.out, first, corpus)
    try:
        teacher_sha256 = sha256_file(staged / WEIGHTS) if teacher else None
        others = others_sha256(teacher)
        identity = identity_of(build, corpus, teacher_sha256, dtype, others)
        settle_provenance(build.out, identity, lambda: environment_of(build, corpus, device))
        if not known:
            put_teacher(staged, kept)
    finally:
        if not known:
            shutil.rmtree(staged, ignore_errors=True)
    return identity
