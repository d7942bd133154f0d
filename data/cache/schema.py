"""The cache format: what a block holds and what its columns mean.

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

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

SCHEMA_VERSION = 2


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
