"""Stage one from corpus to finished cache, in one process.

teacher -> provenance -> codecs -> shards -> index and manifest. Every step is skipped where its
result is there, so an interrupted run goes on with the same command.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from data.cache import Cache
from data.corpus import Corpus
from data.device import keep_freed_memory, resolve_device, resolve_dtype
from data.errors import UserError, require
from data.files import locked, read_json, remove_temporaries, sha256_file, sha256_json
from data.manifest import CacheManifest, finish_cache
from data.masking import MaskingConfig
from data.shards import read_marker, shard_path
from data.tokenizers import load_tokenizer, tokenizer_fingerprint
from stages.teacher_cache.adapters import Teacher, load_teacher, saved_head_spec
from stages.teacher_cache.config import CacheConfig
from stages.teacher_cache.pipeline import run_shards
from stages.teacher_cache.plan import plan_encoding, say, with_codecs
from stages.teacher_cache.provenance import (
    environment_of,
    holds_weights,
    identity_of,
    settle_provenance,
)
from stages.teacher_cache.task import Job, ShardTask, shard_tasks


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

    Raises:
        UserError: Teacher, corpus and existing cache do not fit together.
    """
    target = resolve_device(device)
    keep_freed_memory(target)
    config = config.on(target.type)
    autocast = resolve_dtype(dtype, target)
    corpus = Corpus.open(corpus_dir)
    loaded = load_teacher(teacher, target, autocast, needs) if teacher else None
    if loaded is not None and teacher is not None:
        _check_fit(loaded, teacher, corpus, config)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "cache"):
        kept = out / "teacher"
        known = loaded is not None and holds_weights(kept, loaded.model)
        staged = kept if known else _stage_teacher(out, loaded, corpus)
        try:
            teacher_sha256 = sha256_file(staged / "model.safetensors") if loaded else None
            identity = identity_of(
                corpus, masking, config, teacher_sha256, str(autocast).removeprefix("torch.")
            )
            environment = environment_of(teacher, str(target))
            provenance = settle_provenance(out, identity, environment)
            if not kept.exists():
                staged.rename(kept)
        finally:
            if not known:
                shutil.rmtree(staged, ignore_errors=True)
        remove_temporaries(out)
        job = Job(
            out=out,
            corpus=corpus,
            masking=masking,
            config=config,
            encoding=plan_encoding(loaded, corpus, config),
            teacher=loaded,
            codecs={},
            identity=sha256_json(identity),
            block_metadata={},
        )
        return _run_shards(with_codecs(job, identity), provenance)


def _run_shards(job: Job, provenance: Mapping[str, object]) -> CacheManifest:
    """Do what is not done yet, then write index and manifest."""
    blocks = job.corpus.split("train").num_blocks
    tasks = shard_tasks(blocks, job.config.blocks_per_shard, job.config.rounds)
    finished = job.out / "manifest.json"
    if finished.exists():
        manifest = CacheManifest.from_dict(read_json(finished, "cache: manifest"))
        if manifest.rounds >= job.config.rounds:
            say(f"{job.out} is finished ({manifest.rounds} rounds) and reused")
            return Cache.open(job.out).manifest
    tokens = job.corpus.split("train").block_tokens
    bar = tqdm(
        total=int(tokens.sum()) * job.config.rounds,
        unit="tok",
        unit_scale=True,
        desc="teacher cache",
    )
    markers: dict[ShardTask, dict[str, object]] = {}
    for task in tasks:
        marker = read_marker(shard_path(job.out, task.round_index, task.shard))
        if marker is not None and marker["identity"] == job.identity:
            markers[task] = marker
            # Counted as initial, so that the rate is that of this run.
            bar.initial += int(tokens[task.first_block : task.last_block].sum())
            bar.update(int(tokens[task.first_block : task.last_block].sum()))
    reused = len(markers)
    missing = [task for task in tasks if task not in markers]
    with bar, closing(run_shards(job, missing, bar.update)) as made:
        markers |= dict(zip(missing, made, strict=True))
    if reused:
        say(f"{reused} of {len(tasks)} shards were there already")
    return finish_cache(
        job.out,
        [markers[task] for task in tasks],
        encoding=job.encoding,
        head=saved_head_spec(job.teacher, job.out / "teacher") if job.teacher else None,
        provenance=provenance,
        rounds=job.config.rounds,
    )


def _check_fit(teacher: Teacher, name: str, corpus: Corpus, config: CacheConfig) -> None:
    """Tokenizer, lengths and top-k must fit the teacher."""
    manifest = corpus.manifest
    tokenizer = load_tokenizer(name)
    found = tokenizer_fingerprint(tokenizer)
    require(
        len(tokenizer) <= teacher.vocab_size,
        f"teacher: tokenizer must have at most the model's {teacher.vocab_size} ids, got "
        f"{len(tokenizer)} in {name!r}; use the tokenizer that the model was trained with",
    )
    require(
        found == manifest.tokenizer_sha256,
        f"teacher: tokenizer must be the one the corpus was made with (sha256 "
        f"{manifest.tokenizer_sha256[:16]}), got {found[:16]} ({len(tokenizer)} ids against "
        f"{manifest.vocab_size}) from {name!r}; make the corpus anew with that tokenizer",
    )
    limit = teacher.max_length
    require(
        manifest.max_length <= limit,
        f"corpus: max_length must be at most the teacher's {limit} positions, got "
        f"{manifest.max_length}; make the corpus anew with a smaller corpus.max_length",
    )
    require(
        config.top_k <= teacher.vocab_size,
        f"cache: top_k must be at most the vocabulary size {teacher.vocab_size}, got "
        f"{config.top_k}",
    )
    bad = [n for n in config.hidden_layers if not -1 <= n <= teacher.num_layers]
    require(
        not bad,
        f"cache: hidden_layers must lie between 0 and {teacher.num_layers} (or -1: the last), "
        f"got {bad}",
    )
    require(
        config.top_k > 0 or config.tail_samples > 0 or config.hidden_dtype != "none",
        "cache: top_k, tail_samples or hidden_dtype must store something, got 0, 0 and 'none'; set "
        "one of them, or cache.mask_only = true",
    )


def _stage_teacher(out: Path, teacher: Teacher | None, corpus: Corpus) -> Path:
    """Write the teacher's checkpoint and tokenizer into a temporary folder beside the cache."""
    staged = out / f".teacher.{os.getpid()}.tmp"
    try:
        if teacher is not None:
            teacher.model.save_pretrained(staged, max_shard_size="1000GB")
        else:
            staged.mkdir()
        for file in sorted(corpus.tokenizer_dir.iterdir()):
            shutil.copy(file, staged / file.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise UserError(
            f"cache: {out} must be writable and have room for the teacher, got: "
            f"{getattr(error, 'strerror', None) or error}; free space and repeat the command"
        ) from None
    return staged
