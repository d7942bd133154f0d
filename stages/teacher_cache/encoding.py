"""The encoding and the codecs of a cache, which are fixed before its first shard."""

import contextlib
import itertools
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from distilcache.data.cache.frames import decode_block
from distilcache.data.cache.schema import SCHEMA_VERSION, Encoding, HiddenEncoding
from distilcache.data.cache.teacher_files import codec_path
from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.codecs.relations import RelationMaps
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, require
from distilcache.data.progress import Bar
from distilcache.data.storage.files import (
    open_plain,
    sha256_file,
    sha256_json,
    sync_folder,
    temporary_of,
)
from distilcache.stages.models.families import shape_of
from distilcache.stages.teacher_cache.batches import SignalBlock
from distilcache.stages.teacher_cache.calibrate import calibrate
from distilcache.stages.teacher_cache.calibrate_relations import Texts, calibrate_relations
from distilcache.stages.teacher_cache.columns import block_states, check_finite
from distilcache.stages.teacher_cache.config import CacheConfig, work_sizes
from distilcache.stages.teacher_cache.ensemble import AnyTeacher
from distilcache.stages.teacher_cache.layout import encoding_of
from distilcache.stages.teacher_cache.room import in_room
from distilcache.stages.teacher_cache.task import Job, Plan, PreparedBlock, prepare_block
from distilcache.stages.teacher_cache.teacher import saved_names

CALIBRATION_LOGITS = 2**27
"""Logits at a time, half a gigabyte: a GPU would take 4,096 rows of any vocabulary."""
POSITIONS_PER_UNIT = 4
"""Calibration positions per hidden unit: of fewer, a codec fits those and misses others (of 0.4 per
unit, the error at others was three times what was asked for)."""
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
        made = _calibrate_relations(plan) if relation else _calibrate_layer(plan, stored.layer)
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


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Calibrate in one thread: on a CPU the order of a sum depends on the number of threads.

    The bytes of the shards do not (measured).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def _calibration_blocks(
    plan: Plan, positions: Callable[[SignalBlock], int]
) -> Iterator[PreparedBlock]:
    """Masked blocks to calibrate with: some of round 0, spread over the corpus.

    Where these have few ``positions``, its other blocks follow, and then all of them in further
    rounds, even of those that the recipe has not: so the codec is the same for any number of them.
    """
    assert plan.teacher is not None
    split = plan.corpus.split("train")
    wanted = min(plan.config.calibration_sequences, int(split.block_sequences.sum()))
    # At least two blocks, evenly spaced: one source may not be like the others.
    count = min(split.num_blocks, max(2, -(-wanted // int(split.block_sequences.max()))))
    chosen = np.arange(count) * split.num_blocks // count
    others = np.setdiff1d(np.arange(split.num_blocks), chosen)
    found, enough = 0, POSITIONS_PER_UNIT * plan.teacher.width
    for round_index in itertools.count():
        before = found
        for place, block in enumerate((*chosen.tolist(), *others.tolist())):
            if found >= enough and (round_index > 0 or place >= count):
                return
            prepared = prepare_block(plan, round_index, block)
            found += positions(prepared.placed)
            yield prepared
        if found == before:
            return  # nothing to mask


@contextlib.contextmanager
def _calibrating(what: str, sequences: int) -> Iterator[Callable[[float], Any]]:
    """Say that it begins, and show how far it is."""
    say(f"calibrating the codec of {what} on {sequences} sequences")
    # No rate: the teacher's, which is shown next, is another.
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with _one_thread(), Bar(total=1.0, desc="calibrating", bar_format=form) as bar:
        yield bar.update


def _calibrate_layer(plan: Plan, layer: int) -> HiddenCodec:
    """Run the teacher over blocks spread over the corpus and fit the codec of one layer."""
    assert plan.teacher is not None
    (teacher,) = plan.teacher.members  # of several averaged teachers no hidden states are stored
    parts: list[torch.Tensor] = []
    sequences = dict[int, int]()
    config = plan.config
    for prepared in _calibration_blocks(plan, lambda placed: len(placed.hidden_rows)):
        states, config = in_room(
            plan, prepared, config, lambda inputs, _: block_states(teacher, inputs, (layer,))
        )
        assert prepared.inputs is not None
        wanted_rows = prepared.inputs.hidden_index
        parts.append(states.hidden[0][slice(None) if wanted_rows is None else wanted_rows])
        sequences[prepared.block] = len(prepared.placed.lengths)
    hidden_ND = torch.cat(parts)
    check_finite(bool(hidden_ND.isfinite().all()), layer)
    what = f"layer {layer}"
    with _calibrating(what, sum(sequences.values())) as progress:
        return calibrate(
            hidden_ND,
            teacher.lm_head if layer == teacher.num_layers else None,
            plan.config.temperatures or (1.0,),
            plan.config.hidden_quality,
            # Not the recipe's row_chunk: the order of a sum depends on it.
            min(work_sizes(teacher.device.type)[1], CALIBRATION_LOGITS // plan.encoding.vocab_size),
            progress=progress,
            what=what,
        )


def _calibrate_relations(plan: Plan) -> HiddenCodec:
    """Run the teacher over blocks spread over the corpus and fit the codec of its relations."""
    assert plan.teacher is not None
    (teacher,) = plan.teacher.members
    assert teacher.relation is not None
    read: list[torch.Tensor] = []
    embedded: list[torch.Tensor] = []
    sequences = dict[int, int]()
    config = plan.config
    for prepared in _calibration_blocks(plan, lambda placed: int(placed.lengths.sum())):
        states, config = in_room(
            plan, prepared, config, lambda inputs, _: block_states(teacher, inputs, ())
        )
        assert states.read is not None
        assert states.embedded is not None
        lengths = prepared.placed.lengths.astype(np.int64).tolist()
        read += torch.split(states.read, lengths)
        embedded += torch.split(states.embedded, lengths)
        sequences[prepared.block] = len(lengths)
    layer = teacher.relation.layer
    check_finite(all(bool(x.isfinite().all()) for x in read), layer - 1)
    tensors = {role: teacher.model.get_parameter(n) for role, n in teacher.relation.tensors.items()}
    heads = shape_of(teacher.model.config).heads
    what = f"the relations of layer {layer}"
    with _calibrating(what, sum(sequences.values())) as progress:
        return calibrate_relations(
            Texts(read, embedded),
            RelationMaps(tensors),
            heads,
            plan.config.relation_quality,
            progress,
            what,
        )


def say(text: str) -> None:
    """Print a line for people."""
    print(f"teacher cache: {text}", file=sys.stderr, flush=True)
