"""Masking: which tokens are selected, and what replaces them (recipe section ``[masking]``)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distilcache.data.errors import require, require_choice

BEGINS, GOES_ON, ALONE, ENDS = range(4)
"""A token begins a word; goes on with the one before it, unless that is one of the next two; is a
word that nothing goes on with; goes on, and is the last of its word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingConfig:
    """How tokens are selected and replaced."""

    policy: str = "uniform"
    """``uniform``, or ``smoothed``: weight max(count, 1)^-smoothing per token id."""
    unit: str = "token"
    """What is selected: each ``token`` by itself, or every token of a ``word``."""
    probability: float = 0.15
    """Fraction of the ordinary tokens of a sequence that is selected."""
    mask: float = 0.8
    """Fraction of the selected tokens that is replaced by the mask token."""
    random: float = 0.1
    """Fraction of the selected tokens that is replaced by a random token; the rest is kept."""
    smoothing: float = 0.7
    """Exponent of the ``smoothed`` policy (XLM, DistilBERT)."""
    seed: int = 0
    """Seed of the masking."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_choice("masking", self, policy=("uniform", "smoothed"), unit=("token", "word"))
        require(
            self.unit == "token" or self.policy == "uniform",
            f"masking: policy must be 'uniform' where unit is 'word', got {self.policy!r}; pass "
            "--set masking.policy=uniform",
        )
        require(
            0 < self.probability < 1,
            f"masking: probability must be between 0 and 1, got {self.probability}",
        )
        require(
            self.mask >= 0 and self.random >= 0 and self.mask + self.random <= 1,
            "masking: mask and random must be 0 or more and sum to at most 1, got "
            f"{self.mask} and {self.random}",
        )
        require(0 <= self.seed < 2**63, f"masking: seed must be in [0, 2^63), got {self.seed}")


@dataclass(frozen=True, slots=True)
class MaskedBlock:
    """One masked block as flat columns."""

    input_ids: np.ndarray
    """Token ids with masks applied, [T], the type of the input ids."""
    masked_counts: np.ndarray
    """Selected positions per sequence, uint16 [B]."""
    masked_positions: np.ndarray
    """Position within its sequence of each selected token, ascending, uint16 [M]."""
    labels: np.ndarray
    """Original id of each selected token, [M], the type of the input ids."""


def mask_block(
    ids: np.ndarray,
    lengths: np.ndarray,
    *,
    config: MaskingConfig,
    round_index: int,
    block_index: int,
    special_ids: Sequence[int],
    mask_id: int,
    vocab_size: int,
    token_counts: np.ndarray | None = None,
    continues: np.ndarray | None = None,
) -> MaskedBlock:
    """Mask one block: a pure function of (seed, round, block).

    Of the n ordinary tokens of a sequence, max(1, round(probability * n)) are drawn without
    replacement, with equal weights or weights ``max(count, 1)^-smoothing`` (Efraimidis and
    Spirakis 2006: the smallest Exp(1)/w keys). Each drawn token becomes the mask token, a random
    ordinary id, or stays (BERT, arXiv:1810.04805, section 3.1). With ``unit="word"`` whole words
    are drawn in the order of the keys of their first tokens, until a further one would bring the
    number of their tokens further from that number; at least one. A word that is more than half of
    its sequence is no unit: its tokens are drawn by themselves.

    Only raw Philox words are used, which are the same in every version of numpy, so the same
    arguments give the same bits on every machine.

    Args:
        ids: Flat token ids of the block, [T].
        lengths: Tokens per sequence, [B], summing to T.
        config: Policy and fractions.
        round_index: Number of the masking of the whole corpus, below 2^16.
        block_index: Number of the block in its corpus, below 2^48.
        special_ids: Ids that are never selected and never inserted.
        mask_id: Id of the mask token.
        vocab_size: Number of ids V.
        token_counts: Occurrences per id in the corpus, [V]; needed by ``smoothed``.
        continues: ``BEGINS``, ``GOES_ON``, ``ALONE`` or ``ENDS`` of each id, [V]; needed by
            ``word``.
    """
    key = np.array([config.seed, (round_index << 48) | block_index], dtype=np.uint64)
    words_2T = np.random.Philox(key=key).random_raw(2 * len(ids)).reshape(2, len(ids))
    ordinary_V = np.ones(vocab_size, bool)
    ordinary_V[np.asarray(special_ids, dtype=np.int64)] = False
    weights = _token_weights(config, ordinary_V, token_counts)[ids]
    goes_on = None
    if config.unit == "word":
        if continues is None:
            raise ValueError("whole-word masking needs to know which ids go on with a word")
        goes_on = _goes_on(continues[ids], weights > 0, lengths)
    chosen, counts = _select(words_2T[0], weights, lengths, config.probability, goes_on)
    starts = np.cumsum(lengths) - lengths
    return MaskedBlock(
        input_ids=_replaced(ids, chosen, words_2T, config, mask_id, ordinary_V),
        masked_counts=counts.astype(np.uint16),
        masked_positions=(chosen - np.repeat(starts, counts)).astype(np.uint16),
        labels=ids[chosen],
    )


def _replaced(
    ids: np.ndarray,
    chosen: np.ndarray,
    words_2T: np.ndarray,
    config: MaskingConfig,
    mask_id: int,
    ordinary_V: np.ndarray,
) -> np.ndarray:
    """The ids with the mask token or a random ordinary one at most of the chosen places, [T]."""
    fate = _unit(words_2T[1])[chosen]
    replaced = ids.copy()
    replaced[chosen[fate < config.mask]] = mask_id
    swapped = chosen[(fate >= config.mask) & (fate < config.mask + config.random)]
    ordinary_ids = np.flatnonzero(ordinary_V)
    # The low bits of a word are nearly independent of the rank of its selection key.
    draw = (words_2T[0][swapped] & np.uint64(0xFFFFFFFF)) * np.uint64(len(ordinary_ids))
    replaced[swapped] = ordinary_ids[(draw >> np.uint64(32)).astype(np.int64)]
    return replaced


def joined(places: np.ndarray, ordinary: np.ndarray) -> np.ndarray:
    """Tokens of the same word as the token before them, bool [T].

    ``places`` says how each token may stand, ``ordinary`` that it is no special one.
    """
    found: np.ndarray = ((places == GOES_ON) | (places == ENDS)) & ordinary
    found[1:] &= ordinary[:-1] & (places[:-1] != ALONE) & (places[:-1] != ENDS)
    return found


def _goes_on(places: np.ndarray, ordinary: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens that are drawn with the token before them, bool [T]; see :func:`joined`."""
    found = joined(places, ordinary)
    found[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
    word_T = np.cumsum(~found) - 1
    sequence_T = np.repeat(np.arange(len(lengths)), lengths)
    whole_T = np.bincount(sequence_T, weights=ordinary)[sequence_T]
    found &= 2 * np.bincount(word_T)[word_T] <= whole_T
    return found


def _select(
    words: np.ndarray,
    weights: np.ndarray,
    lengths: np.ndarray,
    probability: float,
    goes_on: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted draw without replacement in every sequence at once.

    Args:
        words: One random word per token, [T].
        weights: One weight per token, 0: never drawn, [T].
        lengths: Tokens per sequence, [B].
        probability: Fraction of the ordinary tokens that is drawn.
        goes_on: Tokens that are drawn where the one before them is, bool [T]; None: none.

    Returns:
        Flat indices of the drawn tokens, ascending, [M], and their number per sequence, [B].
    """
    present_BL = np.arange(lengths.max(initial=0)) < lengths[:, None]
    keys_BL = np.full(present_BL.shape, np.inf)
    eligible_BL = np.zeros(present_BL.shape, bool)
    eligible_BL[present_BL] = weights > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        keys_BL[present_BL] = -np.log1p(-_unit(words)) / weights
    ordinary = eligible_BL.sum(1)
    wanted = wanted_counts(probability, ordinary)
    if goes_on is not None:
        eligible_BL[present_BL] &= ~goes_on
    keys_BL[~eligible_BL] = np.inf
    # Row by row, which is five times faster than one sort of all tokens; stable, so that equal
    # keys have the same order on every machine.
    order_BL = keys_BL.argsort(1, kind="stable")
    drawn_BL = np.zeros(present_BL.shape, bool)
    if goes_on is None:
        first_BL = np.arange(present_BL.shape[1]) < wanted[:, None]
        np.put_along_axis(drawn_BL, order_BL, first_BL, 1)
        return np.flatnonzero(drawn_BL[present_BL]), wanted
    word_T = np.cumsum(~goes_on) - 1
    size_BL = np.zeros(present_BL.shape, np.int64)
    size_BL[present_BL] = np.bincount(word_T)[word_T]
    size_BL[~eligible_BL] = 0
    size_BL = np.take_along_axis(size_BL, order_BL, 1)
    # The middle of a word that is drawn lies within the wanted number of tokens.
    first_BL = (2 * size_BL.cumsum(1) - size_BL <= 2 * wanted[:, None]) & (size_BL > 0)
    first_BL[:, :1] |= size_BL[:, :1] > 0
    np.put_along_axis(drawn_BL, order_BL, first_BL, 1)
    chosen = np.flatnonzero(drawn_BL[present_BL][~goes_on][word_T])
    sequence_T = np.repeat(np.arange(len(lengths)), lengths)
    return chosen, np.bincount(sequence_T[chosen], minlength=len(lengths))


def wanted_counts(probability: float, ordinary: np.ndarray) -> np.ndarray:
    """How many tokens are to be drawn of so many ordinary ones, per sequence: int64 [B]."""
    rounded = np.floor(probability * ordinary + 0.5).astype(np.int64)
    found: np.ndarray = np.minimum(np.maximum(rounded, 1), ordinary)
    return found


def _unit(words: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) from the top 53 bits of each word."""
    top: np.ndarray = (words >> np.uint64(11)).astype(np.float64)
    return top * 2.0**-53


def _token_weights(
    config: MaskingConfig, ordinary_V: np.ndarray, token_counts: np.ndarray | None
) -> np.ndarray:
    """How likely each id is drawn, float64 [V]; 0: never."""
    if config.policy == "smoothed":
        if token_counts is None or len(token_counts) != len(ordinary_V):
            raise ValueError("smoothed masking needs the corpus's count of every token id")
        weights = np.maximum(token_counts, 1).astype(np.float64) ** -config.smoothing
    else:
        weights = np.ones(len(ordinary_V))
    weights[~ordinary_V] = 0.0
    return np.asarray(weights)
