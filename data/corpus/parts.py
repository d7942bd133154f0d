"""One part of a corpus: sequences as an Arrow IPC file, one record batch per block.

Shapes: ``B`` sequences, ``T`` tokens, ``V`` vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilcache.data.corpus.packing import Packed
from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import hash_of


def arrow_file(schema: Any, batches: list[Any]) -> bytes:
    """Record batches as the bytes of an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def encode_part(packed: Packed, block_sequences: int) -> tuple[bytes, int]:
    """Sequences as the bytes of one part, and its number of blocks; the last may hold fewer."""
    kind = pa.list_(pa.from_numpy_dtype(packed.ids.dtype))
    schema = pa.schema([pa.field("ids", kind, nullable=False)])
    ends = np.concatenate([[0], np.cumsum(packed.lengths)])
    batches = []
    for first in range(0, len(packed.lengths), block_sequences):
        bounds = ends[first : first + block_sequences + 1]
        ids = pa.array(packed.ids[bounds[0] : bounds[-1]])
        offsets = pa.array((bounds - bounds[0]).astype(np.int32))
        column = pa.ListArray.from_arrays(offsets, ids, type=kind)
        batches.append(pa.record_batch([column], schema=schema))
    return arrow_file(schema, batches), len(batches)


def check_part(part: Path, sha256: str) -> None:
    """Compare the hash of a part, since Arrow files have no checksums.

    Raises:
        UserError: It is damaged or missing, or cannot be read.
    """
    try:
        found = hash_of(part)
    except OSError as error:
        raise UserError(
            f"corpus: part {part} must be readable, got: {error.strerror or error}; repeat the "
            "command once that is mended"
        ) from None
    require(
        found == sha256,
        f"corpus: part {part} must have sha256 {sha256[:16]}, got {found[:16]}: it is damaged; "
        "delete the corpus folder and run distilcache corpus",
    )


def count_tokens(part: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    """Tokens per id in one part, int64 [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    with pa.ipc.open_file(pa.memory_map(str(part))) as reader:
        for index in range(reader.num_record_batches):
            column: Any = reader.get_batch(index).column(0)
            counts += np.bincount(column.flatten().to_numpy(), minlength=vocab_size)
    return counts


def encode_counts(counts: npt.NDArray[np.int64]) -> bytes:
    """Tokens per id, int64 [V], as the bytes of an Arrow IPC file with column ``count``."""
    batch = pa.record_batch([pa.array(counts)], names=["count"])
    return arrow_file(batch.schema, [batch])
