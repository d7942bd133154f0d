"""Stage one from corpus to finished cache, in one process.

teacher -> provenance -> codecs -> shards -> index and manifest. Every step is skipped where its
result is there, so an interrupted run goes on with the same command.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from data.cache import Cache, codec_path
from data.codecs.hidden import HiddenCodec
from data.corpus import Corpus
from data.device import keep_freed_memory, resolve_device, resolve_dtype
from data.errors import UserError, require
from data.files import locked, read_json, remove_temporaries, sha256_file, sha256_json
from data.manifest import CacheManifest, finish_cache
from data.masking import MaskingConfig
from data.schema import SCHEMA_VERSION, Encoding, HiddenEncoding
from data.shards import read_marker, shard_path
from data.tokenizers import load_tokenizer, tokenizer_fingerprint
from stages.teacher_cache.adapters import Teacher, load_teacher, saved_head_spec
from stages.teacher_cache.calibrate import calibrate
from stages.teacher_cache.config import CacheConfig
from stages.teacher_cache.provenance import environment_of, identity_of, settle_provenance
from stages.teacher_cache.signals import hidden_states
from stages.teacher_cache.task import Job, placed_block, run_shard, shard_tasks


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
    autocast = resolve_dtype(dtype, target)
    corpus = Corpus.open(corpus_dir)
    loaded = load_teacher(teacher, target, autocast, needs) if teacher else None
    if loaded is not None and teacher is not None:
        _check_fit(loaded, teacher, corpus, config)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "cache"):
        staged = _stage_teacher(out, loaded, corpus)
        try:
            teacher_sha256 = sha256_file(staged / "model.safetensors") if loaded else None
            identity = identity_of(
                corpus, masking, config, teacher_sha256, str(autocast).removeprefix("torch.")
            )
            environment = environment_of(teacher, str(target))
            provenance = settle_provenance(out, identity, environment)
            if not (out / "teacher").exists():
                staged.rename(out / "teacher")
        finally:
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
            _say(f"{job.out} is finished ({manifest.rounds} rounds) and reused")
            return Cache.open(job.out).manifest
    tokens = job.corpus.split("train").block_tokens
    bar = tqdm(
        total=int(tokens.sum()) * job.config.rounds,
        unit="tok",
        unit_scale=True,
        desc="teacher cache",
    )
    markers, reused = [], 0
    with bar:
        for task in tasks:
            tar = shard_path(job.out, task.round_index, task.shard)
            marker = read_marker(tar)
            if marker is not None and marker["identity"] == job.identity:
                reused += 1
                # Counted as initial, so that the rate is that of this run.
                bar.initial += int(tokens[task.first_block : task.last_block].sum())
                bar.update(int(tokens[task.first_block : task.last_block].sum()))
            else:
                marker = run_shard(job, task, bar.update)
            markers.append(marker)
    if reused:
        _say(f"{reused} of {len(tasks)} shards were there already")
    return finish_cache(
        job.out,
        markers,
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


def plan_encoding(teacher: Teacher | None, corpus: Corpus, config: CacheConfig) -> Encoding:
    """The encoding before calibration (codec parameters still empty)."""
    max_length = corpus.manifest.max_length
    pad_id = corpus.manifest.special_ids["pad"]
    if teacher is None:
        return Encoding(
            vocab_size=corpus.manifest.vocab_size,
            max_length=max_length,
            pad_id=pad_id,
            mask_only=True,
        )
    layers = {teacher.num_layers if n == -1 else n for n in config.hidden_layers}
    stored = sorted(layers) if config.hidden_dtype != "none" else []
    return Encoding(
        vocab_size=teacher.vocab_size,
        max_length=max_length,
        pad_id=pad_id,
        hidden_positions=config.positions,
        logit_positions=config.logit_positions or config.positions,
        temperatures=tuple(t for t in config.temperatures if t != 1.0),
        top_k=config.top_k,
        top_p=config.top_p if config.top_k else 1.0,
        tail_samples=config.tail_samples,
        residual_samples=config.residual_samples,
        logits_dtype=config.logits_dtype,
        hidden=tuple(
            HiddenEncoding(layer=n, width=teacher.width, dtype=config.hidden_dtype) for n in stored
        ),
        num_layers=teacher.num_layers,
    )


def with_codecs(job: Job, identity: Mapping[str, object]) -> Job:
    """Load or calibrate the codecs and fix what every block says of itself."""
    codecs: dict[int, HiddenCodec] = {}
    hidden = []
    for planned in job.encoding.hidden:
        if planned.dtype == "coded":
            path = codec_path(job.out, planned.layer)
            if not path.exists():
                _calibrate_layer(job, planned.layer).save(path)
            codecs[planned.layer] = HiddenCodec.load(path)
            planned = replace(
                planned,
                planes=codecs[planned.layer].packing.planes,
                codec_sha256=sha256_file(path),
            )
        hidden.append(planned)
    encoding = replace(job.encoding, hidden=tuple(hidden))
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "encoding": encoding.to_dict(),
        "provenance": identity,
        "provenance_sha256": job.identity,
    }
    return replace(job, encoding=encoding, codecs=codecs, block_metadata=metadata)


def _calibrate_layer(job: Job, layer: int) -> HiddenCodec:
    """Run the teacher over blocks spread over the corpus and fit the codec of one layer."""
    assert job.teacher is not None
    split = job.corpus.split("train")
    wanted = min(job.config.calibration_sequences, int(split.block_sequences.sum()))
    # At least two blocks, evenly spaced: no single source stands for all.
    count = min(split.num_blocks, max(2, -(-wanted // int(split.block_sequences.max()))))
    chosen = np.arange(count) * split.num_blocks // count
    parts: list[torch.Tensor] = []
    sequences = 0
    for block in chosen.tolist():
        placed = placed_block(job, 0, block)
        states = hidden_states(
            job.teacher,
            placed,
            job.encoding,
            (layer,),
            job.config.batch_tokens,
            placed.hidden_rows,
        )
        parts.append(states[0])
        sequences += len(placed.lengths)
    _say(f"calibrating the codec of layer {layer} on {sequences} sequences")
    head = job.teacher.head if layer == job.teacher.num_layers else None
    return calibrate(
        torch.cat(parts).clone(),
        head,
        job.config.temperatures or (1.0,),
        job.config.hidden_quality,
        job.config.row_chunk,
    )


def _say(text: str) -> None:
    print(f"teacher cache: {text}", file=sys.stderr, flush=True)
