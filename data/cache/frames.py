"""The bytes of a block: an Arrow record batch of one row, in one zstd frame.

Each column is a ``large_list`` with a flat child array, so columns may have different lengths
without padding, and a reader takes a view of each. Which columns there are is in ``schema.py``.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from distilcache.data.cache.ipc import READ_ERRORS, read_only_batch
from distilcache.data.cache.schema import SCHEMA_VERSION
from distilcache.data.errors import UserError, reason_of

METADATA_KEY = b"distilcache"
ZSTD_LEVEL = 1
"""Quantised planes are entropy-bound: higher levels cost time and gain under 1 %."""
MAX_BLOCK_BYTES = 1 << 32
"""Limit for a block before compression: larger ones are not written, and not decompressed."""


def encode_block(
    columns: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    plane_bytes: Mapping[str, int] | None = None,
) -> bytes:
    """Serialise flat columns as one Arrow IPC stream in one zstd frame with content checksum.

    Args:
        columns: Name to array; arrays are flattened in C order.
        metadata: JSON values stored in the Arrow schema under ``distilcache``.
        plane_bytes: Columns of planes, and the bytes of one plane. Each plane gets zstd blocks of
            its own, so that it has its own entropy tables (measured: 8 % fewer bytes). Readers
            see no difference.

    Raises:
        UserError: The block has more than ``MAX_BLOCK_BYTES``.
    """
    fields, arrays = [], []
    for name, values in columns.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays.append(pa.LargeListArray.from_arrays(pa.array([0, len(flat)], pa.int64()), flat))
        fields.append(pa.field(name, arrays[-1].type, nullable=False))
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    schema = pa.schema(fields, metadata={METADATA_KEY: text.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    raw = sink.getvalue()
    if raw.size > MAX_BLOCK_BYTES:
        raise UserError(
            f"cache: block must be at most {MAX_BLOCK_BYTES} bytes before compression, got "
            f"{raw.size}; store less of the teacher, or make the corpus again with a smaller "
            "corpus.block_sequences"
        )
    return _compress(raw, _cuts(raw, plane_bytes or {}))


def _cuts(raw: pa.Buffer, plane_bytes: Mapping[str, int]) -> list[int]:
    """Offsets in the Arrow stream at which a column, or a plane of one, begins."""
    batch = pa.ipc.open_stream(raw).read_next_batch()
    cuts: set[int] = set()
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values = column.values.buffers()[1]
        if values is not None and values.size:
            start = values.address - raw.address
            cuts.update(range(start, start + values.size, plane_bytes.get(name, 0) or values.size))
    return sorted(cuts)


def _compress(raw: pa.Buffer, cuts: list[int]) -> bytes:
    view = memoryview(raw)
    packer = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compressobj(len(view))
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(view)], strict=True):
        parts.append(packer.compress(view[start:stop]))
        parts.append(packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join([*parts, packer.flush()])


def decode_block(
    frame: bytes | memoryview, max_bytes: int = MAX_BLOCK_BYTES
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Inverse of ``encode_block``: read-only views of the columns, and the metadata.

    Args:
        frame: Bytes of the block.
        max_bytes: Refuse to decompress more than this.

    Raises:
        UserError: The frame is damaged (its checksum, its length or the Arrow stream within).
    """
    try:
        batch = read_only_batch(pa.py_buffer(_inflate(frame, max_bytes)), lists=True)
        if batch.num_rows != 1:
            raise ValueError(f"{batch.num_rows} rows")
        batch.validate(full=True)
        columns = {
            name: _flat(column)
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        metadata: dict[str, Any] = json.loads((batch.schema.metadata or {})[METADATA_KEY])
        version = metadata["schema_version"]
    except (zstandard.ZstdError, *READ_ERRORS) as error:
        raise UserError(
            f"cache: block must be one intact zstd frame, got: {reason_of(error)}"
        ) from None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(
            f"cache: schema_version must be {SCHEMA_VERSION}, got {str(version)[:20]}; use the "
            "version of distilcache that wrote it"
        )
    return columns, metadata


def _inflate(frame: bytes | memoryview, max_bytes: int) -> bytes:
    """Content of the one zstd frame, at most the declared and the allowed size."""
    size = zstandard.frame_content_size(frame)
    if not 0 <= size <= min(max_bytes, MAX_BLOCK_BYTES):
        raise ValueError(f"frame declares {size} bytes of at most {max_bytes}")
    if not zstandard.get_frame_parameters(frame).has_checksum:
        raise ValueError("frame has no content checksum")
    return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def _flat(column: Any) -> np.ndarray:
    """Values of a list column, which must have exactly one row."""
    values = column.values
    if column.null_count or column.offsets.to_pylist() != [0, len(values)]:
        raise ValueError("a list that does not span its values")
    flat: np.ndarray = values.to_numpy(zero_copy_only=True)
    return flat
