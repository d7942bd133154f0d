"""Stage one from corpus to finished cache, in three phases that any engine may compose.

    prepare   provenance, the teacher's checkpoint, calibrated codecs: once, by whoever has the turn
    shards    pure tasks, by any number of processes on any number of machines
    finish    index and manifest: by whoever sees that every shard is there

Every step is skipped where its result is there, so an interrupted run goes on with the same
command.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.manifest import CacheManifest, finish_cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, require
from distilcache.data.masks.masking import MaskingConfig
from distilcache.data.storage.files import read_json, remove_temporaries, sha256_file, sha256_json
from distilcache.stages.models.device import keep_freed_memory, resolve_device, resolve_dtype
from distilcache.stages.teacher_cache.config import CacheConfig, EngineConfig, check_ensemble
from distilcache.stages.teacher_cache.encoding import plan_encoding, say, with_codecs
from distilcache.stages.teacher_cache.ensemble import (
    AnyTeacher,
    head_to_keep,
    load_teachers,
    members_of,
    others_sha256,
)
from distilcache.stages.teacher_cache.provenance import (
    check_configuration,
    environment_of,
    git_revision,
    holds_weights,
    identity_of,
    settle_provenance,
)
from distilcache.stages.teacher_cache.staging import (
    WEIGHTS,
    check_fit,
    check_maskable,
    check_tokenizer,
    check_weights,
    for_all,
    in_place,
    is_whole,
    put_teacher,
    stage_teacher,
)
from distilcache.stages.teacher_cache.task import Job, ShardTask, done_marker, tasks_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """What is asked for: small, and sent to every process that helps."""

    corpus_dir: Path
    """A finished corpus."""
    out: Path
    """Folder of the cache; an interrupted one is continued, a finished one reused."""
    teacher: str | None
    """Path or hub id, as it is recorded; None for a mask-only cache."""
    checkpoint: str = ""
    """The same, where other processes find it."""
    teacher_revision: str = ""
    """Of the teacher on the hub; "": the newest."""
    ensemble: tuple[str, ...] = ()
    """Further teachers that are averaged with it, as they are recorded."""
    members: tuple[str, ...] = ()
    """The same, where other processes find them: the cache holds the first teacher alone."""
    masking: MaskingConfig
    config: CacheConfig
    device: str = "auto"
    dtype: str = "auto"
    needs: str = ""
    """The recipe's word on what must be at hand, for errors."""
    revision: str | None = None
    """Of the project's checkout, which workers need not have."""


def build_cache(
    *,
    corpus_dir: Path,
    out: Path,
    teacher: str | None,
    masking: MaskingConfig,
    config: CacheConfig,
    device: str = "auto",
    dtype: str = "auto",
    needs: str = "",
    engine: EngineConfig | None = None,
    ensemble: Sequence[str] = (),
    teacher_revision: str = "",
) -> CacheManifest:
    """Run the teacher once per round over the corpus and store what it says.

    Args:
        corpus_dir: A finished corpus.
        out: Folder of the cache; an interrupted one is continued, a finished one reused.
        teacher: Path or hub id; None for a mask-only cache.
        masking: Which tokens are masked.
        config: What is stored.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        dtype: ``auto``, ``bfloat16``, ``float32``.
        needs: The recipe's word on what must be at hand, for errors.
        engine: Where the shards are computed; None: in this process.
        ensemble: Further teachers that are averaged with ``teacher``, see :class:`Ensemble`.
        teacher_revision: Branch, tag or commit of ``teacher`` on the hub; "": the newest.

    Raises:
        UserError: Teacher, corpus and existing cache do not fit together.
    """
    from distilcache.stages.teacher_cache.engines.base import engine_of

    ensemble = tuple(ensemble) if teacher else ()
    if ensemble:
        check_ensemble(config)
    build = Build(
        corpus_dir=corpus_dir.absolute(),
        out=out.absolute(),
        teacher=teacher,
        checkpoint=for_all(teacher) if teacher else "",
        teacher_revision=teacher_revision if teacher else "",
        ensemble=ensemble,
        members=tuple(for_all(name) for name in ensemble),
        masking=masking,
        config=config,
        device=device,
        dtype=dtype,
        needs=needs,
        revision=git_revision(),
    )
    return engine_of(engine or EngineConfig()).run(build)


def prepare(build: Build, alone: Callable[[], AbstractContextManager[None]] | None = None) -> Job:
    """Settle what all shards share: provenance, teacher, codecs.

    Args:
        build: What is asked for.
        alone: Waits for the turn of this process where others build the same cache; None: no
            other process does, and what killed runs have left is cleared away.

    Raises:
        UserError: Teacher, corpus and existing cache do not fit together.
    """
    target = resolve_device(build.device)
    keep_freed_memory(target)
    autocast = resolve_dtype(build.dtype, target)
    corpus = Corpus.open(build.corpus_dir)
    check_maskable(corpus)
    teacher = None
    if build.teacher:
        names = (build.checkpoint, *build.members)
        teacher = load_teachers(names, target, autocast, build.needs, build.teacher_revision)
        for name, member in zip(names, members_of(teacher), strict=True):
            own = build.teacher_revision if name == names[0] else ""
            check_fit(member, name, corpus, build.config, own)
    config = build.config.on(target.type)
    check_tokenizer(corpus, build.out / "teacher")
    encoding = plan_encoding(teacher, corpus, config)
    write = alone if alone is not None and not in_place(build.out, encoding) else nullcontext
    with write():
        identity = _settle(build, corpus, teacher, str(target), str(autocast).split(".")[-1])
        if alone is None:
            remove_temporaries(build.out)
        job = Job(
            out=build.out,
            corpus=corpus,
            masking=build.masking,
            config=config,
            encoding=encoding,
            teacher=teacher,
            codecs={},
            identity=sha256_json(identity),
            block_metadata={},
        )
        return with_codecs(job, identity)


def open_job(build: Build) -> Job:
    """The job of a cache that another process has prepared: reads, and writes nothing.

    The teacher is that of the cache itself, in the type that the cache was begun with; further
    ones of an ensemble come from where they are.

    Raises:
        UserError: Further ones are not those that the cache was begun with.
    """
    target = resolve_device(build.device)
    keep_freed_memory(target)
    identity = _provenance(build.out)["identity"]
    corpus = Corpus.open(build.corpus_dir)
    config = build.config.on(target.type)
    teacher = None
    if build.teacher:
        dtype = resolve_dtype(identity["dtype"], target)
        check_weights(build.out / "teacher", identity["teacher_sha256"])
        names = (str(build.out / "teacher"), *build.members)
        teacher = load_teachers(names, target, dtype, build.needs)
        require(
            others_sha256(teacher) == identity.get("ensemble_sha256", []),
            "teacher: ensemble must be the checkpoints that the cache was begun with, got other "
            f"weights or configurations in {', '.join(build.members)}; put the old ones there and "
            "repeat the command",
        )
    job = Job(
        out=build.out,
        corpus=corpus,
        masking=build.masking,
        config=config,
        encoding=plan_encoding(teacher, corpus, config),
        teacher=teacher,
        codecs={},
        identity=sha256_json(identity),
        block_metadata={},
    )
    return with_codecs(job, identity)


def finish(job: Job) -> CacheManifest:
    """Write index and manifest from the commit markers of all shards.

    Raises:
        UserError: A shard is not there.
    """
    # A generator: memory does not grow with the number of shards.
    markers = (_marker(job, task) for task in tasks_of(job.corpus, job.config))
    settled: dict[str, Any] = {"provenance": _provenance(job.out), "rounds": job.config.rounds}
    head = head_to_keep(job.teacher, job.out / "teacher")
    return finish_cache(job.out, markers, encoding=job.encoding, head=head, **settled)


def _marker(job: Job, task: ShardTask) -> dict[str, Any]:
    marker = done_marker(job.out, task, job.identity)
    if marker is None:
        raise UserError(
            f"cache: shards must all be there, got none for round {task.round_index} shard "
            f"{task.shard} in {job.out}; repeat the command"
        )
    return marker


def reused(build: Build) -> CacheManifest | None:
    """The manifest of a cache that has all that is asked for, None where work is left."""
    path = build.out / "manifest.json"
    if not path.exists():
        return None
    manifest = CacheManifest.from_dict(read_json(path, "cache: manifest"))
    if manifest.rounds < build.config.rounds:
        return None
    say(f"{build.out} is finished ({manifest.rounds} rounds) and reused")
    return Cache.open(build.out).manifest


def begun_identity(out: Path) -> str:
    """Hash of the provenance of a cache that is prepared."""
    return sha256_json(_provenance(out)["identity"])


def _provenance(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(out / "provenance.json", "cache: provenance")
    return values


def _settle(
    build: Build, corpus: Corpus, teacher: AnyTeacher | None, device: str, dtype: str
) -> dict[str, Any]:
    """Provenance and the teacher's checkpoint; returns the identity of the cache."""
    kept = build.out / "teacher"
    first = members_of(teacher)[0] if teacher else None
    if first is not None:
        check_configuration(build.out, first.model.config)
    known = first is not None and is_whole(kept, corpus) and holds_weights(kept, first.model)
    staged = kept if known else stage_teacher(build.out, first, corpus)
    try:
        teacher_sha256 = sha256_file(staged / WEIGHTS) if teacher else None
        others = others_sha256(teacher)
        identity = identity_of(corpus, build.masking, build.config, teacher_sha256, dtype, others)
        environment = environment_of(
            build.teacher, device, build.revision, build.ensemble, build.teacher_revision
        )
        settle_provenance(build.out, identity, environment)
        if not known:
            put_teacher(staged, kept)
    finally:
        if not known:
            shutil.rmtree(staged, ignore_errors=True)
    return identity
