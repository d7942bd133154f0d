"""The cache format: what a block holds and what its columns mean.

A block is an Arrow record batch of one row. Each column is a ``large_list`` with a flat child
array, so columns may have different lengths without padding, and a reader takes a view of each.

Columns (of a whole block: B sequences, T tokens, M masked positions, N logit positions, H
hidden-state positions; K stored logits, R draws, S temperatures, D units, G code planes):

========================  =================  ====================================================
``lengths``               uint16 [B]         tokens per sequence
``input_ids``             uint16/32 [T]      token ids with masks applied
``masked_counts``         uint16 [B]         masked positions per sequence
``masked_positions``      uint16 [M]         position within its sequence, ascending
``labels``                uint16/32 [M]      original token id at each masked position
``logit_position_counts``   uint16 [B]       logit positions per sequence (``masked+P`` only)
``logit_positions``         uint16 [N]       position within its sequence (``masked+P`` only)
``hidden_position_counts``  uint16 [B]       the same for hidden states
``hidden_positions``        uint16 [H]
``logit_lengths``         uint16 [N]         K_n, stored logits per position (top_p below 1 only)
``logit_ids``             uint16/32 [sum K]  ids of the largest logits, largest first
``logit_values``          f16/f32/u8 [sum K] their logits, or codes: base - scale * code
``logit_base``            float16 [N]        largest logit (uint8 only)
``logit_scale``           float16 [N]        logits per code step (uint8 only)
``log_odds``              f16/f32 [N*S]      log(mass of the stored tokens / mass of all others)
``tail_ids``              uint16/32 [N*R]    draws from the tokens that are not stored
``residual_ids``          uint16/32 [N*R]    signed draws from (true - replayed), positive first
``residual_mass``         float16 [N]        mass of the positive part
``hidden_<l>``            f16/f32 [H*D]      raw hidden states of layer l
``hidden_<l>``            uint8 [G*H]        packed codes of layer l, plane-major
``relation_<l>``          f16/f32 [T*D]      what the queries of layer l read, raw
``relation_<l>``          uint8 [G*T]        the same as packed codes, plane-major
========================  =================  ====================================================
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from distilcache.data.cache.ipc import READ_ERRORS, read_only_batch
from distilcache.data.errors import UserError, reason_of

SCHEMA_VERSION = 2
METADATA_KEY = b"distilcache"
ZSTD_LEVEL = 1
"""Quantised planes are entropy-bound: higher levels cost time and gain under 1 %."""
MAX_BLOCK_BYTES = 1 << 32
"""Limit for a block before compression: larger ones are not written, and not decompressed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenEncoding:
    """How the hidden states of one layer are stored."""

    layer: int
    """Index into the model's hidden states: 0 the embeddings, n the n-th layer."""
    width: int
    """Units D."""
    dtype: str
    """``float32``, ``float16`` or ``coded``."""
    planes: int = 0
    """Coded: G, byte planes of packed codes."""
    codec_sha256: str = ""
    """Coded: sha256 of the codec's parameter file in the cache."""

    @property
    def column(self) -> str:
        """Name of the column of this layer."""
        return f"hidden_{self.layer}"

    @property
    def codec_name(self) -> str:
        """Name of the parameter file of its codec, in the teacher's folder."""
        return f"hidden_codec_{self.layer}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class RelationEncoding(HiddenEncoding):
    """How the states at all tokens are stored that a layer's queries, keys and values read.

    ``layer`` is that layer: 1 the first, n the last. It reads hidden state ``layer - 1``, normed
    where the family norms it first.
    """

    tensors: Mapping[str, str] = field(default_factory=dict)
    """The layer's maps: role (see ``distilcache.data.codecs.relation_spec``) to tensor name in the
    teacher's checkpoint."""

    @property
    def column(self) -> str:
        """Name of the column."""
        return f"relation_{self.layer}"

    @property
    def codec_name(self) -> str:
        """Name of the parameter file of its codec, in the teacher's folder."""
        return f"relation_codec_{self.layer}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """Everything that a reader needs to interpret the blocks of a cache."""

    vocab_size: int
    max_length: int
    pad_id: int
    mask_only: bool = False
    hidden_positions: str = "masked"
    """Policy of the positions with hidden states, see ``distilcache.data.masks.positions``."""
    logit_positions: str = "masked"
    """Policy of the positions with logits."""
    temperatures: tuple[float, ...] = ()
    """Temperatures other than 1; S = 1 + their number."""
    top_k: int = 0
    """Largest logits stored per position."""
    top_p: float = 1.0
    """Below 1: fewer, if fewer have this much mass at the highest temperature."""
    logits_dtype: str = "float16"
    tail_samples: int = 0
    """Draws per position from the tokens that are not stored, at ``sample_temperature``."""
    residual_samples: int = 0
    """Signed draws per position from the error of the replay, at ``sample_temperature``."""
    hidden: tuple[HiddenEncoding, ...] = ()
    num_layers: int = 0
    """Layers of the teacher; the LM head reads the last hidden state."""
    relation: RelationEncoding | None = None
    """What relations are replayed from; None: not stored."""

    @property
    def states(self) -> tuple[HiddenEncoding, ...]:
        """All states that are stored: hidden states, and those of relations."""
        return (*self.hidden, self.relation) if self.relation else self.hidden

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """Type of token ids on disk: uint16 if the vocabulary fits."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def stores_logits(self) -> bool:
        """Whether blocks hold logit columns."""
        return self.top_k > 0 or self.tail_samples > 0 or self.residual_samples > 0

    @property
    def signals(self) -> tuple[str, ...]:
        """What the teacher's distribution can be read from, as values of ``train.signal``.

        The one that is read by default is the first.
        """
        if self.mask_only:
            return ()
        replays = self.hidden_layer() is not None
        held = {
            "replay+topk": replays and self.top_k > 0,
            "replay": replays,
            "replay+residual": replays and self.residual_samples > 0,
            "sparse": self.top_k > 0 or self.tail_samples > 0,
        }
        return tuple(name for name, there in held.items() if there)

    @property
    def best_signal(self) -> str | None:
        """The signal that is read by default; None: blocks hold none."""
        return next(iter(self.signals), None)

    @property
    def sample_temperature(self) -> float:
        """Temperature at which ``tail_ids`` and ``residual_ids`` are drawn."""
        return self.temperatures[0] if self.temperatures else 1.0

    def hidden_layer(self, layer: int = -1) -> HiddenEncoding | None:
        """The encoding of one layer's hidden states (-1: the last); None: not stored."""
        wanted = self.num_layers if layer == -1 else layer
        return next((h for h in self.hidden if h.layer == wanted), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without ``relation``, as before that field, where it is None."""
        values = asdict(self)
        if self.relation is None:
            del values["relation"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Encoding":
        """Inverse of ``to_dict``."""
        hidden = tuple(HiddenEncoding(**h) for h in values["hidden"])
        temperatures = tuple(float(t) for t in values["temperatures"])
        relation = values.get("relation")
        return cls(
            **{
                **values,
                "hidden": hidden,
                "temperatures": temperatures,
                "relation": None if relation is None else RelationEncoding(**relation),
            }
        )


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
