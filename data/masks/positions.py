"""Which positions of a block have signals.

A policy is ``masked`` (the masked positions), ``all`` (every token) or ``masked+P``: the masked
positions, and each other position with probability P and weight 1/P. A sum over ``masked+P`` with
these weights is an unbiased estimate of the sum over all positions (Horvitz and Thompson 1952) at
a fraction of the bytes. The same random word per token is used for every policy, so a policy with a
smaller P draws a subset of the positions.

Shapes: ``B`` sequences, ``T`` tokens, ``M`` masked, ``N`` signal positions of a block.
"""

import numpy as np

from distilcache.data.errors import UserError

PREFIX = "masked+"
STREAMS = {"positions": 0, "tail": 1, "residual": 2}
"""Independent streams of random words of one block."""
_SIGNALS = np.uint64(1) << np.uint64(63)
"""Bit of the key that keeps these words apart from those of masking (seeds below 2^63)."""


def extra_fraction(policy: str) -> float:
    """P of ``masked+P``; 0 for ``masked``, 1 for ``all``.

    Raises:
        UserError: It is not one of the three policies.
    """
    if policy in ("masked", "all"):
        return float(policy == "all")
    try:
        fraction = float(policy.removeprefix(PREFIX)) if policy.startswith(PREFIX) else 0.0
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < 1:
        raise UserError(
            "cache: positions must be 'masked', 'all' or 'masked+P' with P between 0 and 1, got "
            f"{policy!r}; for example masked+0.1"
        )
    return fraction


def random_units(
    seed: int, round_index: int, block_index: int, stream: str, count: int
) -> np.ndarray:
    """Uniform float64 in [0, 1), [count]: a pure function of its arguments (raw Philox words)."""
    key = np.array([np.uint64(seed) | _SIGNALS, (round_index << 48) | block_index], np.uint64)
    counter = np.array([0, 0, 0, STREAMS[stream]], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    units: np.ndarray = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return units


def flat_rows(lengths: np.ndarray, counts: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Flat token index of positions that are counted within their sequences, int64 [N]."""
    ends = np.cumsum(lengths, dtype=np.int64)
    rows: np.ndarray = np.repeat(ends - lengths, counts) + positions
    return rows


def drawn_rows(policy: str, masked: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Flat token index of each signal position of a policy, ascending, int64 [N].

    From that of the masked positions, [M], and one uniform number per token, [T].
    """
    if policy == "masked":
        return masked
    if policy == "all":
        return np.arange(len(units))
    chosen = units < extra_fraction(policy)
    chosen[masked] = True
    return np.flatnonzero(chosen)


def per_sequence(lengths: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat token indices as counts per sequence, uint16 [B], and positions within it, uint16 [N].

    Inverse of :func:`flat_rows`.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    sequence = np.searchsorted(ends, rows, side="right")
    counts = np.bincount(sequence, minlength=len(lengths))
    positions = rows - (ends - lengths)[sequence]
    return counts.astype(np.uint16), positions.astype(np.uint16)


def weights_of(policy: str, rows: np.ndarray, masked: np.ndarray) -> np.ndarray | None:
    """Importance weight of each signal position, float32 [N]; None: all are 1."""
    if policy in ("masked", "all"):
        return None
    weights = np.full(len(rows), 1.0 / extra_fraction(policy), np.float32)
    weights[np.searchsorted(rows, masked)] = 1.0
    return weights
