"""Which of the stored signals the losses of a run read, and whether the cache has them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from distilcache.data.cache.schema import Encoding
from distilcache.data.errors import require
from distilcache.stages.models.families import Shape
from distilcache.stages.student_train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Signals:
    """Which of the teacher's signals the losses of a run read."""

    ce: str | None
    """``train.signal``; None: neither L_ce nor L_mse."""
    cos: bool
    temperature_column: int = 0
    """Column of the cache's ``log_odds`` that holds T, where stored logits are read."""
    topk: bool = False
    """Stored logits correct the replay."""
    tail_draws: bool = False
    """Sparse: the tail is its draws, not one bucket."""
    trimmed: bool = False
    """The teacher's distribution is the one over the ids that the student has."""
    rel: bool = False
    """Whether the teacher's relations are read."""

    @property
    def replays(self) -> bool:
        """Whether the teacher's distribution comes from its hidden states and LM head."""
        return self.ce is not None and self.ce != "sparse"

    @property
    def hidden(self) -> bool:
        """Whether stored hidden states are read."""
        return self.cos or self.replays


def required_signals(encoding: Encoding, train: TrainConfig, *, trimmed: bool = False) -> Signals:
    """Match the losses of a run with what the cache holds.

    Stored logits need T among the cache's temperatures: the probability of all stored tokens is
    known only at those. Draws were made at ``encoding.sample_temperature``: residual draws need
    that temperature, and at another one ``sparse`` treats the tail as one bucket.

    Of a student with fewer ids than its teacher the mass of the stored tokens is not known, as
    tokens that are not stored have been dropped as well; their logits are. So it needs a replay.

    Args:
        encoding: Of the cache.
        train: Weights of the losses, signal and temperature.
        trimmed: Whether the student has fewer ids than its teacher.

    Raises:
        UserError: A loss with a weight above 0 needs a signal that is not stored.
    """
    ce = train.signal if train.alpha_ce + train.alpha_mse > 0 else None
    cos = train.alpha_cos > 0
    if not train.has_teacher:
        return Signals(None, False)
    require(
        not encoding.mask_only,
        "train: alpha_ce, alpha_cos, alpha_mse and alpha_rel must be 0 on a mask-only cache, got "
        f"{train.alpha_ce:g}, {train.alpha_cos:g}, {train.alpha_mse:g} and {train.alpha_rel:g}; "
        "make a cache with a teacher",
    )
    signals = Signals(ce, cos, rel=train.alpha_rel > 0)
    require(
        train.alpha_rel == 0 or encoding.relation is not None,
        f"train: alpha_rel must be 0 where the cache has no relations, got {train.alpha_rel:g}; "
        "make the cache with cache.relation_layer=-1",
    )
    _check_hidden(encoding, train, signals)
    if trimmed and ce is not None:
        require(
            ce in ("replay", "replay+topk"),
            "train: signal must be 'replay+topk' or 'replay' where student.vocabulary drops ids, "
            f"got {ce!r}, whose mass of the ids that are left is not known; use --set "
            "train.signal=replay+topk, or leave student.vocabulary out",
        )
        _check_logits(encoding, train, ce == "replay+topk")
        return replace(signals, topk=ce == "replay+topk", trimmed=True)
    if ce is None or ce == "replay":
        return signals
    if ce == "replay+residual":
        _check_residual(encoding, train)
        if encoding.top_k == 0:
            return signals
    return _with_logits(encoding, train, signals)


def relation_heads(train: TrainConfig, teacher: Shape, student: Shape) -> int:
    """Relation heads of L_rel.

    Raises:
        UserError: They do not divide both widths.
    """
    heads = train.relation_heads or teacher.heads
    for whose, shape in (("teacher", teacher), ("student", student)):
        require(
            shape.width % heads == 0,
            f"train: relation_heads must divide the width of the {whose} ({shape.width}), got "
            f"{heads}; use --set train.relation_heads={math.gcd(teacher.width, student.width, 12)}",
        )
    return heads


def _check_hidden(encoding: Encoding, train: TrainConfig, signals: Signals) -> None:
    has_hidden = encoding.hidden_layer() is not None
    stored = ", ".join(str(h.layer) for h in encoding.hidden) or "none"
    require(
        has_hidden or signals.ce is None or encoding.stores_logits,
        "train: alpha_ce and alpha_mse must be 0 where the cache has neither hidden states of the "
        f"last layer nor logits, got {train.alpha_ce:g} and {train.alpha_mse:g}; make the cache "
        "with cache.top_k=8",
    )
    require(
        has_hidden or not signals.replays,
        "train: signal must be 'sparse' where the cache has no hidden states of the last layer, "
        f"got {train.signal!r} (stored layers: {stored}); make the cache with "
        "cache.hidden_dtype=coded cache.hidden_layers=-1, or use --set train.signal=sparse "
        "--set train.alpha_cos=0",
    )
    require(
        has_hidden or not signals.cos,
        "train: alpha_cos must be 0 where the cache has no hidden states of the last layer, got "
        f"{train.alpha_cos:g} (stored layers: {stored}); make the cache with "
        "cache.hidden_dtype=coded cache.hidden_layers=-1",
    )


def _check_residual(encoding: Encoding, train: TrainConfig) -> None:
    require(
        encoding.residual_samples > 0,
        "train: signal must be 'replay+topk' or 'replay' where the cache has no residual draws, "
        "got 'replay+residual' (residual_samples = 0); make the cache with "
        "cache.residual_samples=32",
    )
    require(
        train.temperature == encoding.sample_temperature,
        "train: temperature must be the one of the cache's draws with signal 'replay+residual' "
        f"({encoding.sample_temperature:g}), got {train.temperature:g}; make the cache with "
        f"cache.temperatures={train.temperature:g} or use --set train.signal=replay+topk",
    )


def _check_logits(encoding: Encoding, train: TrainConfig, needed: bool) -> None:
    require(
        encoding.top_k > 0 or not needed,
        "train: signal must be 'replay' where the cache has no logits, "
        f"got {train.signal!r} (top_k = 0); use --set train.signal=replay or make the cache with "
        "cache.top_k=8",
    )


def _with_logits(encoding: Encoding, train: TrainConfig, signals: Signals) -> Signals:
    sparse = train.signal == "sparse"
    drawn = sparse and encoding.tail_samples > 0
    draws = drawn and train.temperature == encoding.sample_temperature
    stored = (1.0, *encoding.temperatures)
    _check_logits(encoding, train, not drawn)
    require(
        encoding.top_k > 0 or draws,
        "train: temperature must be the one of the cache's draws where it has nothing else "
        f"(top_k = 0; {encoding.sample_temperature:g}), got {train.temperature:g}; make the cache "
        f"with cache.temperatures={train.temperature:g} or cache.top_k=8",
    )
    require(
        train.temperature in stored,
        "train: temperature must be one that the cache holds with signal "
        f"{train.signal!r} ({', '.join(f'{t:g}' for t in stored)}), got {train.temperature:g}; "
        f"make the cache with cache.temperatures={train.temperature:g} or use "
        "--set train.signal=replay",
    )
    column = stored.index(train.temperature)
    return replace(signals, temperature_column=column, topk=not sparse, tail_draws=draws)


def count_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch, without its padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def count_positions(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """The divisor of each loss term's sum over a batch that is still on the CPU.

    It is the number of the term's positions. Where they carry importance weights the sum
    estimates the one over all positions, so the divisor is the number of tokens: the teacher's,
    where a student with fewer ids has cut some into pieces.
    """
    tokens = int(batch["their_tokens"]) if "their_tokens" in batch else count_tokens(batch)
    ce = tokens if "ce_weight" in batch else len(batch.get("ce_index", ()))
    cos = tokens if "hidden_weight" in batch else len(batch.get("hidden_index", ()))
    rel = len(batch["relation_index"]) if "relation_index" in batch else tokens
    return {"ce": ce, "mlm": len(batch["labels"]), "cos": cos, "mse": ce, "rel": rel}
