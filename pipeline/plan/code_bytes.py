"""Bytes of the codes of hidden states, as measured with a well-trained teacher of width 384."""

from collections.abc import Mapping

import numpy as np

Range = tuple[float, float]
"""Low and high."""

CODE_BYTES = {2.5e-4: 161.0, 5e-4: 139.0, 1e-3: 116.8, 2e-3: 93.0, 4e-3: 74.0, 8e-3: 57.0}
"""Bytes of codes per position at width 384, by quality in nats at the worst temperature: 1e-3 from
blocks of 512 sequences, the others by their distance to it (docs/benchmarks.md, fidelity)."""
CODE_WIDTH = 384
RELATION_BYTES = {0.005: 109.4, 0.01: 86.3, 0.02: 62.4, 0.04: 41.0, 0.08: 22.9}
"""Bytes of a relation layer's codes per token at width 384, by quality in nats, in blocks of
``RELATION_TOKENS`` (docs/benchmarks.md, relations)."""
RELATION_TOKENS = 512 * 128
WIDTH_EXPONENTS = (0.678, 1.0)
"""Codes grow with the width to these powers: 1.6 to 2 times from 384 to 768."""
CODE_POSITIONS = 512 * 19
"""Positions of the blocks that CODE_BYTES were measured on."""
TABLE_BYTES = 23.0
"""What a byte plane of codes takes in each block for its own tables, however few positions it has
(20 to 37 for 76 to 9,728 positions)."""
PLANES = 2.4
"""Byte planes per byte of codes of a position, at most one per coordinate: 275 for 115 bytes."""


def code_bytes(
    width: int, quality: float, positions: float = CODE_POSITIONS, *, last: bool = True
) -> Range:
    """Bytes of codes per position.

    Args:
        width: D.
        quality: Nats for the last layer; of inner layers the relative squared error.
        positions: Of a block.
        last: Whether the LM head reads the layer.
    """
    if not last:
        # Gaussian coordinates of one variance take log2(1 / q) / 2 bits each; of unequal ones less.
        bound = width * max(0.0, float(np.log2(1 / quality))) / 16
        return 0.5 * bound, 1.1 * bound
    return _measured(CODE_BYTES, CODE_POSITIONS, width, quality, positions)


def relation_bytes(width: int, quality: float, tokens: float) -> Range:
    """Bytes of a relation layer's codes per token.

    Args:
        width: D.
        quality: Nats of relation KL.
        tokens: Tokens of a block.
    """
    return _measured(RELATION_BYTES, RELATION_TOKENS, width, quality, tokens)


def _measured(
    table: Mapping[float, float], there: float, width: int, quality: float, positions: float
) -> Range:
    """Bytes of codes per position, from what was measured in blocks of ``there`` positions."""
    known = np.log2(list(table))
    at = float(np.log2(quality))
    found = float(np.interp(at, known, list(table.values())))
    if at < known[0]:  # a halved error costs each coordinate half a bit at most
        found += (known[0] - at) * CODE_WIDTH / 16
    low, high = sorted(found * (width / CODE_WIDTH) ** power for power in WIDTH_EXPONENTS)
    more = 1 / positions - 1 / there
    return _with_tables(low, width, more), _with_tables(high, width, more)


def _with_tables(codes: float, width: int, blocks: float) -> float:
    """Bytes of codes per position, with tables of so many more blocks per position."""
    return codes + TABLE_BYTES * min(width, PLANES * codes) * blocks
