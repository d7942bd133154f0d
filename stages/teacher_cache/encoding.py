"""What a cache will hold, settled before its first shard: the encoding and the codecs."""

import contextlib
import os
import sys
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from distilcache.data.cache.cache import codec_path
from distilcache.data.cache.schema import SCHEMA_VERSION, Encoding, HiddenEncoding, decode_block
from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import sha256_file
from distilcache.stages.teacher_cache.calibrate import calibrate
from distilcache.stages.teacher_cache.columns import check_finite, hidden_states
from distilcache.stages.teacher_cache.config import CacheConfig, work_sizes
from distilcache.stages.teacher_cache.ensemble import AnyTeacher
from distilcache.stages.teacher_cache.layout import encoding_of
from distilcache.stages.teacher_cache.task import Job, prepare
from distilcache.stages.teacher_cache.teacher import Teacher


def plan_encoding(teacher: AnyTeacher | None, corpus: Corpus, config: CacheConfig) -> Encoding:
    """The encoding before calibration (codec parameters still empty)."""
    manifest = corpus.manifest
    return encoding_of(
        config,
        vocab_size=manifest.vocab_size if teacher is None else teacher.vocab_size,
        max_length=manifest.max_length,
        pad_id=manifest.special_ids["pad"],
        width=0 if teacher is None else teacher.width,
        num_layers=0 if teacher is None else teacher.num_layers,
    )


def with_codecs(job: Job, identity: Mapping[str, object]) -> Job:
    """Load or calibrate the codecs and fix what every block says of itself."""
    codecs: dict[int, HiddenCodec] = {}
    hidden = []
    for planned in job.encoding.hidden:
        if planned.dtype == "coded":
            path, known = codec_path(job.out, planned.layer), _known_codec(job, planned)
            if not path.exists():
                _publish(_calibrate_layer(job, planned.layer), path, known)
            found = sha256_file(path)
            require(
                known in (None, found),
                f"cache: {path} must be the codec that the shards were written with (sha256 "
                f"{str(known)[:16]}), got {found[:16]}; delete it and repeat the command, which "
                "calibrates it again",
            )
            codecs[planned.layer] = _on_device(HiddenCodec.load(path), job)
            planes = codecs[planned.layer].packing.planes
            planned = replace(planned, planes=planes, codec_sha256=found)
        hidden.append(planned)
    encoding = replace(job.encoding, hidden=tuple(hidden))
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "encoding": encoding.to_dict(),
        "provenance": identity,
        "provenance_sha256": job.identity,
    }
    return replace(job, encoding=encoding, codecs=codecs, block_metadata=metadata)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of a calibration on a CPU have an order of their own for every number of threads.

    In one thread, its bytes are the same however many a process has; those of the shards are in
    any case (measured).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _known_codec(job: Job, planned: HiddenEncoding) -> str | None:
    """Hash of the codec that the shards there were written with; None where there are none."""
    for marker in sorted(job.out.glob("shards/r*/shard-*.json")):
        try:
            with tarfile.open(marker.with_suffix(".tar")) as tar:
                member = tar.next()
                file = tar.extractfile(member) if member is not None else None
                frame = file.read() if file is not None else b""
            metadata = decode_block(frame)[1]
            said = Encoding.from_dict(metadata["encoding"])
            if metadata["provenance_sha256"] != job.identity:
                continue  # of another cache: it is made anew
        except (OSError, tarfile.TarError, KeyError, TypeError, UserError):
            continue  # damaged: another shard tells, and `verify` names this one
        hidden = said.hidden_layer(planned.layer)
        return hidden.codec_sha256 if hidden is not None else None
    return None


def _publish(codec: HiddenCodec, path: Path, known: str | None) -> None:
    """Write the codec, unless another process has: all shards must use the same one.

    Raises:
        UserError: Calibration gave another codec than the one of the shards that are there.
    """
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        codec.save(own)
        if known is not None and sha256_file(own) != known:
            raise UserError(
                f"cache: {path} must be the codec that the shards were written with (sha256 "
                f"{known[:16]}), got {sha256_file(own)[:16]} from a calibration on this machine; "
                "restore the file from a copy, or make the cache anew in another folder"
            )
        try:
            os.link(own, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def _on_device(codec: HiddenCodec, job: Job) -> HiddenCodec:
    """Its matrices on the teacher's device, once and not for every block."""
    assert job.teacher is not None
    matrices = {name: getattr(codec, name) for name in ("mean", "analysis", "synthesis")}
    return replace(codec, **{n: m.to(job.teacher.device) for n, m in matrices.items()})


def _calibrate_layer(job: Job, layer: int) -> HiddenCodec:
    """Run the teacher over blocks spread over the corpus and fit the codec of one layer."""
    assert isinstance(job.teacher, Teacher), "of an ensemble no hidden states are stored"
    split = job.corpus.split("train")
    wanted = min(job.config.calibration_sequences, int(split.block_sequences.sum()))
    # At least two blocks, evenly spaced: no single source stands for all.
    count = min(split.num_blocks, max(2, -(-wanted // int(split.block_sequences.max()))))
    chosen = np.arange(count) * split.num_blocks // count
    others = np.setdiff1d(np.arange(split.num_blocks), chosen)
    parts: list[torch.Tensor] = []
    for tried, block in enumerate([*chosen.tolist(), *others.tolist()]):
        if tried >= count and any(map(len, parts)):
            break  # further blocks serve where all of these were unknown tokens
        inputs = prepare(job, 0, block).inputs
        assert inputs is not None
        states = hidden_states(job.teacher, inputs, (layer,))[0]
        wanted_rows = slice(None) if inputs.hidden_index is None else inputs.hidden_index
        parts.append(states[wanted_rows])
    hidden_ND = torch.cat(parts)
    remedy = "try --set dtype=float32, or check the checkpoint"
    check_finite(bool(hidden_ND.isfinite().all()), layer, remedy)
    sequences = int(split.block_sequences[chosen].sum())
    say(f"calibrating the codec of layer {layer} on {sequences} sequences")
    with _one_thread():
        return calibrate(
            hidden_ND,
            job.teacher.head if layer == job.teacher.num_layers else None,
            job.config.temperatures or (1.0,),
            job.config.hidden_quality,
            # Not the recipe's row_chunk: sums have another order of terms in other chunks.
            work_sizes(job.teacher.device.type)[1],
        )


def say(text: str) -> None:
    """One line for whoever watches."""
    print(f"teacher cache: {text}", file=sys.stderr, flush=True)
