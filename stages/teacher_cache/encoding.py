"""The encoding and the codecs of a cache, which are fixed before its first shard."""

import os
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from distilcache.data.cache.frames import decode_block
from distilcache.data.cache.schema import SCHEMA_VERSION, Encoding, HiddenEncoding
from distilcache.data.cache.teacher_files import codec_path
from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import (
    open_plain,
    sha256_file,
    sha256_json,
    sync_folder,
    temporary_of,
)
from distilcache.stages.teacher_cache.calibration_runs import codec_of_layer, codec_of_relations
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.ensemble import AnyTeacher
from distilcache.stages.teacher_cache.layout import encoding_of
from distilcache.stages.teacher_cache.task import Job, Plan
from distilcache.stages.teacher_cache.teacher import saved_names

AnyStates = TypeVar("AnyStates", bound=HiddenEncoding)


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


def with_codecs(plan: Plan, identity: Mapping[str, object]) -> Job:
    """Load or calibrate the codecs, and fix the metadata of every block."""
    provenance = sha256_json(identity)
    codecs = {
        stored.column: _codec(plan, stored, provenance)
        for stored in plan.encoding.states
        if stored.dtype == "coded"
    }
    hidden = tuple(_with_codec(plan, stored, codecs) for stored in plan.encoding.hidden)
    relation = plan.encoding.relation
    if relation is not None:
        assert plan.teacher is not None
        assert plan.teacher.relation is not None
        (teacher,) = plan.teacher.members
        names = saved_names(teacher, plan.teacher.relation.tensors, plan.out / "teacher")
        relation = replace(_with_codec(plan, relation, codecs), tensors=names)
    encoding = replace(plan.encoding, hidden=hidden, relation=relation)
    return Job(
        out=plan.out,
        corpus=plan.corpus,
        masking=plan.masking,
        config=plan.config,
        encoding=encoding,
        teacher=plan.teacher,
        codecs=codecs,
        identity=provenance,
        block_metadata={
            "schema_version": SCHEMA_VERSION,
            "encoding": encoding.to_dict(),
            "provenance": identity,
            "provenance_sha256": provenance,
        },
    )


def _codec(plan: Plan, stored: HiddenEncoding, provenance: str) -> HiddenCodec:
    """The codec of stored states from its file, which is made where there is none."""
    path = codec_path(plan.out, stored)
    known = _known_codec(plan.out, stored, provenance)
    if not path.exists():
        relation = stored is plan.encoding.relation
        made = codec_of_relations(plan) if relation else codec_of_layer(plan, stored.layer)
        _publish(made, path, known)
    found = sha256_file(path)
    require(
        known in (None, found),
        f"cache: {path} must be the codec that the shards were written with (sha256 "
        f"{str(known)[:16]}), got {found[:16]}; delete it and repeat the command, which "
        "calibrates it again",
    )
    return _on_device(HiddenCodec.load(path), plan)


def _with_codec(plan: Plan, stored: AnyStates, codecs: Mapping[str, HiddenCodec]) -> AnyStates:
    """The encoding of states, with what their codec says."""
    if stored.column not in codecs:
        return stored
    return replace(
        stored,
        planes=codecs[stored.column].packing.planes,
        codec_sha256=sha256_file(codec_path(plan.out, stored)),
    )


def _known_codec(cache: Path, stored: HiddenEncoding, provenance: str) -> str | None:
    """Hash of the codec that finished shards were written with; None where there are none."""
    for marker in sorted(cache.glob("shards/r*/shard-*.json")):
        try:
            with open_plain(marker.with_suffix(".tar")) as raw, tarfile.open(fileobj=raw) as tar:
                member = tar.next()
                file = tar.extractfile(member) if member is not None else None
                frame = file.read() if file is not None else b""
            metadata = decode_block(frame)[1]
            encoding = Encoding.from_dict(metadata["encoding"])
            if metadata["provenance_sha256"] != provenance:
                continue  # of another cache: it will be made anew
        except (OSError, tarfile.TarError, KeyError, TypeError, UserError):
            continue  # damaged: try the next; `verify` names this one
        hashes = {state.column: state.codec_sha256 for state in encoding.states}
        return hashes.get(stored.column)
    return None


def _publish(codec: HiddenCodec, path: Path, known: str | None) -> None:
    """Write the codec, unless another process has done so: all shards must use the same one.

    Raises:
        UserError: Calibration gave another codec than the one of the shards that are there.
    """
    own = temporary_of(path)
    try:
        codec.save(own)
        if known is not None and sha256_file(own) != known:
            raise UserError(
                f"cache: {path} must be the codec that the shards were written with (sha256 "
                f"{known[:16]}), got {sha256_file(own)[:16]} from a calibration by this version on "
                "this machine; restore the file from a copy, or make the cache anew in another "
                "folder"
            )
        try:
            os.link(own, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                own.replace(path)
        sync_folder(path.parent)
    finally:
        own.unlink(missing_ok=True)


def _on_device(codec: HiddenCodec, plan: Plan) -> HiddenCodec:
    """A codec whose matrices lie on the teacher's device, once for all blocks."""
    assert plan.teacher is not None
    names = ("mean", "analysis", "synthesis", "prediction", "offsets")
    matrices = {name: getattr(codec, name) for name in names}
    moved = {n: m.to(plan.teacher.device) for n, m in matrices.items() if m is not None}
    return replace(codec, **moved)
