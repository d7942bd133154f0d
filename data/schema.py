"""The cache format's single point of truth: what a block holds and what its columns mean.

A block is an Arrow record batch of ONE row. Every column is a ``large_list`` whose child array is
flat: columns of different natural length (sequences B, tokens T, masked positions M, signal
positions N, N x K stored logits, D x N code planes) lie side by side without padding, and a
reader takes a view of each.

Columns (M and N count the whole block; N = M where positions are ``masked``, N = T for ``all``):

========================  =================  ====================================================
``lengths``               uint16 [B]         tokens per sequence
``input_ids``             uint16/32 [T]      token ids with masks applied
``masked_counts``         uint16 [B]         masked positions per sequence
``masked_positions``      uint16 [M]         position within its sequence, ascending
``labels``                uint16/32 [M]      original token id at each masked position
``logit_ids``             uint16/32 [N*K]    ids of the K largest logits, largest first
``logit_values``          f16/f32/u8 [N*K]   their logits, or codes: base - scale * code
``logit_base``            float16 [N]        largest logit (uint8 only)
``logit_scale``           float16 [N]        logits per code step (uint8 only)
``logsumexp``             float32 [N*S]      at T = 1 and each listed temperature
``log_tail``              float32 [N*S]      log of the softened mass outside the K ids
``hidden_<l>``            f16/f32 [N*D]      raw hidden states of layer l
``hidden_<l>_wide``       int16 [Dw*N]       leading code planes, plane-major
``hidden_<l>_narrow``     int8 [(D-Dw)*N]    remaining code planes, plane-major
========================  =================  ====================================================
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from data.errors import UserError

SCHEMA_VERSION = 1
METADATA_KEY = b"distilcache"
ZSTD_LEVEL = 1
"""Quantised planes are entropy-bound: higher levels cost time and gain under 1 %."""
MAX_BLOCK_BYTES = 1 << 32
"""Refuse to inflate more than this for one block (damaged or hostile frame headers)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenEncoding:
    """How the hidden states of one layer are stored."""

    layer: int
    """Index into the model's hidden states: 0 the embeddings, n the last layer."""
    width: int
    """Units D."""
    dtype: str
    """``float32``, ``float16`` or ``coded``."""
    wide_planes: int = 0
    """Coded: leading planes stored as int16; the rest is int8."""
    codec_sha256: str = ""
    """Coded: hash of the codec's parameter file in the cache."""

    @property
    def column(self) -> str:
        """Name (coded: prefix) of the columns of this layer."""
        return f"hidden_{self.layer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """Everything that is needed to interpret a block of this cache."""

    vocab_size: int
    max_length: int
    pad_id: int
    mask_only: bool = False
    positions: str = "masked"
    """Positions that carry signals: ``masked`` or ``all``."""
    temperatures: tuple[float, ...] = ()
    """Temperatures besides 1; S = 1 + their number."""
    top_k: int = 0
    logits_dtype: str = "float16"
    hidden: tuple[HiddenEncoding, ...] = ()
    num_layers: int = 0
    """Layers of the teacher; its last hidden state is the one the LM head reads."""

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """Type of token ids on disk: uint16 where the vocabulary fits."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def hidden_layer(self, layer: int = -1) -> HiddenEncoding | None:
        """The encoding of one layer's hidden states (-1: the last), None where not stored."""
        wanted = self.num_layers if layer == -1 else layer
        return next((h for h in self.hidden if h.layer == wanted), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Encoding":
        """Inverse of :meth:`to_dict`."""
        hidden = tuple(HiddenEncoding(**h) for h in values["hidden"])
        temperatures = tuple(float(t) for t in values["temperatures"])
        return cls(**{**values, "hidden": hidden, "temperatures": temperatures})


def encode_block(columns: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    """Serialise flat columns as one Arrow IPC stream in one zstd frame with content checksum.

    Args:
        columns: Name to array; arrays are flattened in C order.
        metadata: JSON values stored in the Arrow schema under ``distilcache``.
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
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(
        memoryview(sink.getvalue())
    )


def decode_block(frame: bytes | memoryview) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Inverse of :func:`encode_block`: read-only views of the columns, and the metadata.

    Raises:
        UserError: The frame is damaged (its checksum, its length or the Arrow stream within).
    """
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= MAX_BLOCK_BYTES:
            raise ValueError(f"frame declares {size} bytes")
        if not zstandard.get_frame_parameters(frame).has_checksum:
            raise ValueError("frame has no content checksum")
        raw = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        with pa.ipc.open_stream(pa.py_buffer(raw)) as stream:
            batch = stream.read_next_batch()
        batch.validate(full=True)
        columns = {
            name: column.values.to_numpy(zero_copy_only=True)
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        metadata = json.loads((batch.schema.metadata or {})[METADATA_KEY])
        version = metadata["schema_version"]
    except (
        zstandard.ZstdError,
        pa.ArrowException,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        StopIteration,
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cache: block must be one intact zstd frame, got: {reason}") from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"cache: schema_version must be {SCHEMA_VERSION}, got {version!r}; use the version of "
            "distilcache that wrote it"
        )
    return columns, metadata
