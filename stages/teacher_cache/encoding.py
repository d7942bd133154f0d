"""The encoding and the codecs of a cache, which are fixed before its first shard."""

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
from tqdm import tqdm

from distilcache.data.cache.cache import codec_path
from distilcache.data.cache.schema import SCHEMA_VERSION, Encoding, decode_block
from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import open_plain, sha256_file, sha256_json, sync_folder
from distilcache.stages.teacher_cache.calibrate import calibrate
from distilcache.stages.teacher_cache.columns import check_finite, hidden_states
from distilcache.stages.teacher_cache.config import CacheConfig, work_sizes
from distilcache.stages.teacher_cache.ensemble import AnyTeacher
from distilcache.stages.teacher_cache.layout import encoding_of
from distilcache.stages.teacher_cache.task import Job, Plan, prepare_block


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
    codecs: dict[int, HiddenCodec] = {}
    hidden = []
    for planned in plan.encoding.hidden:
        if planned.dtype == "coded":
            path = codec_path(plan.out, planned.layer)
            known = _known_codec(plan.out, planned.layer, provenance)
            if not path.exists():
                _publish(_calibrate_layer(plan, planned.layer), path, known)
            found = sha256_file(path)
            require(
                known in (None, found),
                f"cache: {path} must be the codec that the shards were written with (sha256 "
                f"{str(known)[:16]}), got {found[:16]}; delete it and repeat the command, which "
                "calibrates it again",
            )
            codec = codecs[planned.layer] = _on_device(HiddenCodec.load(path), plan)
            planned = replace(planned, planes=codec.packing.planes, codec_sha256=found)
        hidden.append(planned)
    encoding = replace(plan.encoding, hidden=tuple(hidden))
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


def _known_codec(cache: Path, layer: int, provenance: str) -> str | None:
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
        hidden = encoding.hidden_layer(layer)
        return hidden.codec_sha256 if hidden is not None else None
    return None


def _publish(codec: HiddenCodec, path: Path, known: str | None) -> None:
    """Write the codec, unless another process has done so: all shards must use the same one.

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
        sync_folder(path.parent)
    finally:
        own.unlink(missing_ok=True)


def _on_device(codec: HiddenCodec, plan: Plan) -> HiddenCodec:
    """A codec whose matrices lie on the teacher's device, once for all blocks."""
    assert plan.teacher is not None
    matrices = {name: getattr(codec, name) for name in ("mean", "analysis", "synthesis")}
    return replace(codec, **{n: m.to(plan.teacher.device) for n, m in matrices.items()})


def _calibrate_layer(plan: Plan, layer: int) -> HiddenCodec:
    """Run the teacher over blocks spread over the corpus and fit the codec of one layer."""
    assert plan.teacher is not None
    (teacher,) = plan.teacher.members  # of several averaged teachers no hidden states are stored
    split = plan.corpus.split("train")
    wanted = min(plan.config.calibration_sequences, int(split.block_sequences.sum()))
    # At least two blocks, evenly spaced: one source may not be like the others.
    count = min(split.num_blocks, max(2, -(-wanted // int(split.block_sequences.max()))))
    chosen = np.arange(count) * split.num_blocks // count
    others = np.setdiff1d(np.arange(split.num_blocks), chosen)
    parts: list[torch.Tensor] = []
    for tried, block in enumerate([*chosen.tolist(), *others.tolist()]):
        if tried >= count and any(map(len, parts)):
            break  # go on only where these blocks have no masked positions
        inputs = prepare_block(plan, 0, block).inputs
        assert inputs is not None
        states = hidden_states(teacher, inputs, (layer,))[0]
        wanted_rows = slice(None) if inputs.hidden_index is None else inputs.hidden_index
        parts.append(states[wanted_rows])
    hidden_ND = torch.cat(parts)
    check_finite(bool(hidden_ND.isfinite().all()), layer)
    sequences = int(split.block_sequences[chosen].sum())
    say(f"calibrating the codec of layer {layer} on {sequences} sequences")
    # No rate: the teacher's, which is shown next, is another.
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with _one_thread(), tqdm(total=1.0, desc="calibrating", bar_format=form, disable=None) as bar:
        return calibrate(
            hidden_ND,
            teacher.lm_head if layer == teacher.num_layers else None,
            plan.config.temperatures or (1.0,),
            plan.config.hidden_quality,
            # Not the recipe's row_chunk: the order of a sum depends on it.
            work_sizes(teacher.device.type)[1],
            progress=bar.update,
        )


def say(text: str) -> None:
    """Print a line for people."""
    print(f"teacher cache: {text}", file=sys.stderr, flush=True)
