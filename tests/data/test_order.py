"""Each sequence once per epoch, in an order that any worker can find again."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import EpochOrder, group_by_length, permutation

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=15)


def sequences(order, window):
    """(block, row) of a window, in the order in which they are read."""
    stored = [
        (part.block, row) for part in order.parts(window) for row in range(part.start, part.stop)
    ]
    return [stored[i] for i in order.shuffle(window)]


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, window=st.integers(1, 50), seed=st.integers(0, 2**32), epoch=st.integers(0, 99))
def test_every_sequence_exactly_once(sizes, window, seed, epoch):
    order = EpochOrder(np.array(sizes, dtype=np.uint32), seed, epoch, window)
    found = [sequences(order, w) for w in range(order.num_windows)]
    everything = [(b, row) for b, size in enumerate(sizes) for row in range(size)]
    assert sorted(sum(found, [])) == everything
    assert [len(f) for f in found[:-1]] == [window] * (order.num_windows - 1)
    assert 1 <= len(found[-1]) <= window
    # A window found alone, without those before it, is the same.
    again = EpochOrder(np.array(sizes), seed, epoch, window)
    assert sequences(again, order.num_windows - 1) == found[-1]


def test_epochs_and_seeds_differ():
    sizes = np.full(20, 10)
    seen = {
        tuple(sequences(EpochOrder(sizes, seed, epoch, 40), 0))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(seen) == 9
    one_block = {tuple(sequences(EpochOrder([12], 0, epoch, 12), 0)) for epoch in range(5)}
    assert len(one_block) == 5


def test_windows_mix_blocks_and_blocks_are_shuffled_globally():
    order = EpochOrder(np.full(64, 8), 0, 0, 64)
    first = sequences(order, 0)
    blocks = [b for b, _ in first]
    assert len(set(blocks)) == 8
    assert blocks != sorted(blocks)
    assert max(blocks) - min(blocks) > 20  # not eight neighbours of the corpus


def test_permutation_known_answer():
    """A resumed run on another machine must find the same order."""
    assert permutation(8, 1, 2, 3).tolist() == KNOWN
    assert sorted(permutation(1000, 0, 0, 0)) == list(range(1000))


KNOWN = [0, 3, 1, 6, 2, 7, 4, 5]


def test_permutation_is_uniform():
    firsts = np.bincount([permutation(5, s, 0, 1)[0] for s in range(5000)], minlength=5)
    assert (np.abs(firsts - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5).all()


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=0, max_size=40),
    batch=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_group_by_length(lengths, batch, seed):
    sizes = np.array(lengths, dtype=np.int64)
    order = permutation(len(sizes), seed, 0, 0)
    grouped = group_by_length(sizes, order, batch)
    assert sorted(grouped) == list(range(len(sizes)))
    if len(set(lengths)) <= 1:
        assert np.array_equal(grouped, order)
    full = len(sizes) // batch * batch
    padded = sum(batch * sizes[grouped[i : i + batch]].max() for i in range(0, full, batch))
    best = np.sort(sizes)[:full]
    assert padded == sum(batch * best[i : i + batch].max() for i in range(0, full, batch))


def test_grouped_batches_come_in_random_order():
    lengths = np.repeat(np.arange(10), 8)
    widths = [
        tuple(lengths[group_by_length(lengths, permutation(80, seed, 0, 0), 8)[::8]])
        for seed in range(20)
    ]
    assert len(set(widths)) == 20
    assert all(w != tuple(range(10)) for w in widths)
