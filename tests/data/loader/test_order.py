"""Each sequence once per epoch, in an order that any worker and any rank can find again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilcache.data.errors import UserError
from distilcache.data.loader import order as order_module
from distilcache.data.loader.order import (
    EpochOrder,
    Layout,
    choose_streams,
    group_by_length,
    interleave,
    permutation,
)

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=15)
STREAMS = (1, 2, 3, 4, 8)


def make(sizes, seed=0, epoch=0, *, streams=1, batch=4, window=40):
    sizes = np.array(sizes, dtype=np.uint32)
    return EpochOrder(sizes, seed, epoch, Layout(int(sizes.sum()), batch, streams, window))


def sequences(order, window, stream=0):
    """(block, row) of a stream's window, in the order in which they are read."""
    parts = order.slices(window, stream)
    stored = [(part.block, row) for part in parts for row in range(part.start, part.stop)]
    return [stored[i] for i in order.shuffle(window, stream)]


def rank_batches(order, lengths, rank=0, world=1):
    """The batches of one rank, as (block, row), read window by window as the loader does."""
    layout, found = order.layout, []
    mine = range(rank, layout.streams, world)
    for window in range(layout.windows):
        stored, rows = [], []
        for stream in mine:
            parts = order.slices(window, stream)
            held = [(part.block, row) for part in parts for row in range(part.start, part.stop)]
            sizes = np.array([lengths[s] for s in held])
            batch_order = order.batch_order(window)
            shuffled = order.shuffle(window, stream)
            grouped = group_by_length(sizes, shuffled, layout.per_stream, batch_order)
            rows.append(len(stored) + grouped.astype(np.int64))
            stored += held
        steps, share = layout.steps_in(window), layout.per_stream * len(mine)
        taken = [stored[i] for i in interleave(rows, layout.per_stream, steps)]
        ends = [*(share * i for i in range(steps)), len(taken)]
        found += [taken[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return found


CASES = {
    "sizes": SIZES,
    "share": st.integers(1, 5),
    "window": st.integers(1, 50),
    "seed": st.integers(0, 2**32),
    "epoch": st.integers(0, 99),
    "alike": st.booleans(),
}


@pytest.mark.parametrize("streams", STREAMS)
@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_global_batches_are_the_same_on_any_number_of_ranks(
    streams, sizes, share, window, seed, epoch, alike
):
    if sum(sizes) < streams:
        return
    order = make(sizes, seed, epoch, streams=streams, batch=streams * share, window=window)
    everything = [(b, row) for b, size in enumerate(sizes) for row in range(size)]
    lengths = {s: 7 if alike else hash(s) % 9 for s in everything}
    alone = rank_batches(order, lengths)
    assert sorted(sum(alone, [])) == everything  # each sequence exactly once
    assert len(alone) == order.layout.steps
    assert all(len(batch) == streams * share for batch in alone[:-1])
    assert streams <= len(alone[-1]) < streams * (share + 1)
    for world in (w for w in range(2, streams + 1) if streams % w == 0):
        again = make(sizes, seed, epoch, streams=streams, batch=streams * share, window=window)
        by_rank = [rank_batches(again, lengths, rank, world) for rank in range(world)]
        assert {len(batches) for batches in by_rank} == {len(alone)}
        assert all(batch for batches in by_rank for batch in batches)
        joined = [sorted(sum(parts, [])) for parts in zip(*by_rank, strict=True)]
        assert joined == [sorted(batch) for batch in alone]


@pytest.mark.parametrize("streams", [1, 4])
def test_ranks_read_only_their_own_blocks(streams):
    order = make([8] * 64, streams=streams, batch=8, window=64)
    blocks = [
        {p.block for w in range(order.layout.windows) for p in order.slices(w, s)}
        for s in range(streams)
    ]
    assert sum(map(len, blocks)) == len(set.union(*blocks)) == 64  # 8 divides the streams here


def test_parts_of_a_batch_have_like_lengths():
    rng = np.random.default_rng(0)
    sizes = [32] * 32
    lengths = {(b, r): int(rng.integers(5, 128)) for b in range(32) for r in range(32)}
    batches = rank_batches(make(sizes, streams=8, batch=32, window=512), lengths)
    spread = np.mean([max(w) - min(w) for w in ([lengths[s] for s in b] for b in batches)])
    assert spread < 30  # some 115 without grouping
    widths = [max(lengths[s] for s in batch) for batch in batches]
    assert widths != sorted(widths)


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, window=st.integers(1, 50), seed=st.integers(0, 2**32), epoch=st.integers(0, 99))
def test_a_window_found_alone_is_the_same(sizes, window, seed, epoch):
    order = make(sizes, seed, epoch, window=window)
    found = [sequences(order, w) for w in range(order.layout.windows)]
    again = make(sizes, seed, epoch, window=window)
    assert sequences(again, order.layout.windows - 1) == found[-1]


def test_groups_of_blocks_join_without_a_seam(monkeypatch):
    sizes = np.random.default_rng(0).integers(1, 9, 200)
    whole = make(sizes, streams=2, batch=6, window=100)
    monkeypatch.setattr(order_module, "GROUP", 7)
    cut = make(sizes, streams=2, batch=6, window=100)
    for window in range(whole.layout.windows):
        for stream in range(2):
            assert cut.slices(window, stream) == whole.slices(window, stream)


def test_epochs_and_seeds_differ():
    sizes = np.full(20, 10)
    seen = {
        tuple(sequences(make(sizes, seed, epoch), 0)) for seed in range(3) for epoch in range(3)
    }
    assert len(seen) == 9
    one_block = {tuple(sequences(make([12], 0, epoch, window=12), 0)) for epoch in range(5)}
    assert len(one_block) == 5


def test_windows_mix_blocks_and_blocks_are_shuffled_globally():
    first = sequences(make(np.full(64, 8), window=64), 0)
    blocks = [b for b, _ in first]
    assert len(set(blocks)) == 8
    assert blocks != sorted(blocks)
    assert max(blocks) - min(blocks) > 20  # not eight neighbours of the corpus


def test_streams_that_do_not_fit_are_refused():
    assert [choose_streams(0, b, 1000) for b in (32, 12, 6, 7)] == [8, 4, 2, 1]
    assert choose_streams(0, 32, 5) == 4
    assert choose_streams(16, 32, 1000) == 16
    with pytest.raises(UserError, match=r"batch_size must be a multiple of train.streams \(8\)"):
        Layout(100, 12, 8, 40)
    with pytest.raises(UserError, match=r"at most the sequences of the cache \(5\), got 8"):
        Layout(5, 16, 8, 40)


def test_permutation_known_answer():
    """A resumed run on another machine must find the same order."""
    assert permutation(8, 1, 2, 3).tolist() == KNOWN
    assert sorted(permutation(1000, 0, 0, 0)) == list(range(1000))
    assert permutation(0, 0, 0, 0).tolist() == []
    assert permutation(1, 0, 0, 0).tolist() == [0]


KNOWN = [0, 3, 1, 6, 2, 7, 4, 5]


def test_permutation_does_not_depend_on_how_it_is_sorted(monkeypatch):
    whole = permutation(5000, 1, 2, 3)
    words = np.random.Philox(key=np.array([1, 2 << 40 | 3], np.uint64)).random_raw(5000)
    assert np.array_equal(whole, np.argsort(words >> np.uint64(13), kind="stable"))
    for bucket in (4999, 1000, 7):
        monkeypatch.setattr(order_module, "BUCKET", bucket)
        assert np.array_equal(permutation(5000, 1, 2, 3), whole)


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
    grouped = group_by_length(sizes, order, batch, permutation(len(sizes) // batch, seed, 0, 1))
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
        tuple(
            lengths[
                group_by_length(
                    lengths, permutation(80, seed, 0, 0), 8, permutation(10, seed, 0, 1)
                )[::8]
            ]
        )
        for seed in range(20)
    ]
    assert len(set(widths)) == 20
    assert all(w != tuple(range(10)) for w in widths)
