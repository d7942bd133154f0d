"""Which data a run sees, as literal numbers: a run that is resumed elsewhere must see the same.

Every sequence holds its own number, 2 to 24 or 25, as its only token. A change of these numbers
is a change of the order of every run that was begun before it.
"""

import numpy as np
import pytest

from distilcache.data.loader.dataset import CachedBatches

UNEVEN = (3, 5, 4, 2, 6, 3)
"""Sequences per block: 23 in all, five batches of 4 and one of 3."""
EVEN = (3, 5, 4, 2, 6, 4)
"""24: six batches of 4."""
KNOWN = {
    (UNEVEN, "alike"): [
        [[19, 17, 13, 15], [18, 21, 10, 22], [20, 16, 12, 11], [7, 14, 24, 23], [8, 5, 4, 3],
         [9, 6, 2]],
        [[20, 17, 5, 8], [19, 18, 24, 7], [16, 21, 6, 23], [14, 3, 13, 10], [15, 4, 12, 11],
         [2, 22, 9]],
    ],
    (UNEVEN, "by length"): [
        [[16, 17, 11, 22], [18, 19, 12, 13], [20, 21, 15, 10], [5, 6, 2, 23], [7, 8, 3, 24],
         [14, 9, 4]],
        [[18, 19, 23, 24], [21, 17, 7, 8], [20, 16, 5, 6], [22, 3, 12, 13], [15, 2, 10, 11],
         [14, 4, 9]],
    ],
    (EVEN, "alike"): [
        [[19, 17, 13, 15], [18, 21, 10, 22], [20, 16, 12, 11], [7, 14, 24, 4], [8, 5, 23, 3],
         [9, 6, 2, 25]],
        [[20, 17, 25, 7], [19, 18, 24, 6], [16, 21, 5, 23], [14, 3, 12, 9], [15, 4, 11, 10],
         [2, 22, 8, 13]],
    ],
    (EVEN, "by length"): [
        [[16, 17, 11, 22], [18, 19, 12, 13], [20, 21, 15, 10], [5, 6, 25, 2], [7, 8, 23, 3],
         [14, 9, 24, 4]],
        [[18, 19, 23, 24], [21, 17, 6, 7], [20, 16, 25, 5], [14, 4, 13, 9], [22, 3, 12, 8],
         [15, 2, 10, 11]],
    ],
}  # fmt: skip
"""Batches of epochs 0 and 1, seed 7, two streams; half of each batch is of the first stream."""


def numbered(made_up, sizes, alike):
    """A cache in memory; ``alike``: all sequences are of one length."""
    encoding = made_up.encoding(mask_only=True, hidden_dtype="none", top_k=0, temperatures=())
    blocks, first = [], 2
    for size in sizes:
        names = np.arange(first, first + size)
        lengths = np.full(size, 4) if alike else 2 + names % 5
        blocks.append(
            {
                "lengths": lengths.astype(np.uint16),
                "input_ids": np.repeat(names, lengths).astype(encoding.token_dtype),
                "masked_counts": np.zeros(size, np.uint16),
                "masked_positions": np.zeros(0, np.uint16),
                "labels": np.zeros(0, encoding.token_dtype),
            }
        )
        first += size
    return made_up.cache(encoding, blocks)


def batches(made_up, sizes, alike, **ranks):
    """Two epochs of a run with two streams and two windows per epoch."""
    cache = numbered(made_up, sizes, alike)
    settings = {"batch_size": 4, "seed": 7, "window_blocks": 2, "streams": 2, "signal": None}
    data = CachedBatches(cache, **settings, **ranks)
    epochs = range(0, 2 * len(data), len(data))
    return [[data[e + k]["input_ids"][:, 0].tolist() for k in range(len(data))] for e in epochs]


@pytest.mark.parametrize(
    ("sizes", "kind"), KNOWN, ids=["even" if s == EVEN else "uneven" for s, _ in KNOWN]
)
def test_the_batches_of_a_run(made_up, sizes, kind):
    assert batches(made_up, sizes, kind == "alike") == KNOWN[sizes, kind]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_batches_of_a_rank(made_up, rank):
    """Each of two ranks has its half of every batch, and of the last one 2 and 1."""
    wanted = [[batch[2 * rank :][:2] for batch in epoch] for epoch in KNOWN[UNEVEN, "by length"]]
    assert batches(made_up, UNEVEN, False, rank=rank, world=2) == wanted
