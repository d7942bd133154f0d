"""Which positions carry signals: nested, unbiased, and the same on every machine."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilcache.data.errors import UserError
from distilcache.data.masks.positions import (
    drawn_rows,
    extra_fraction,
    flat_rows,
    per_sequence,
    random_units,
    weights_of,
)

MASKED = np.flatnonzero(np.random.default_rng(0).random(4000) < 0.15)
SHARES = (0.02, 0.1, 0.35, 0.8, 0.99)


@pytest.mark.parametrize(
    ("policy", "share"), [("masked", 0.0), ("all", 1.0), ("masked+0.1", 0.1), ("masked+1e-3", 1e-3)]
)
def test_share_of_a_policy(policy, share):
    assert extra_fraction(policy) == share


@pytest.mark.parametrize(
    "policy",
    ["", "some", "masked+", "masked+0", "masked+1", "masked+1.5", "masked+-0.1", "masked+nan",
     "masked+inf", "masked+x", "0.1", "all+0.1", "MASKED", "masked+0.1+0.1"],
)  # fmt: skip
def test_what_is_no_policy_is_named(policy):
    with pytest.raises(UserError, match="cache: positions must be .*; for example") as error:
        extra_fraction(policy)
    assert repr(policy) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block", range(4))
def test_draws_hold_all_masked_positions_and_nest(block):
    units = random_units(7, 1, block, "positions", 4000)
    previous = drawn_rows("masked", MASKED, units)
    assert np.array_equal(previous, MASKED)
    for share in SHARES:
        rows = drawn_rows(f"masked+{share}", MASKED, units)
        assert (np.diff(rows) > 0).all()
        assert np.isin(previous, rows).all()
        others = 4000 - len(MASKED)
        spread = math.sqrt(others * share * (1 - share))
        assert abs(len(rows) - len(MASKED) - others * share) < 5 * spread
        previous = rows
    everything = drawn_rows("all", MASKED, units)
    assert np.array_equal(everything, np.arange(4000))
    assert np.isin(previous, everything).all()


@pytest.mark.parametrize("policy", ["masked+0.1", "masked+0.5"])
def test_a_weighted_sum_estimates_the_sum_over_all_positions(policy):
    """Horvitz and Thompson: the weights' own sum, and that of any values, over many blocks."""
    share, blocks = extra_fraction(policy), 400
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    sums, counts = [], []
    for block in range(blocks):
        rows = drawn_rows(policy, MASKED, random_units(3, 0, block, "positions", 4000))
        weights = weights_of(policy, rows, MASKED)
        assert weights.dtype == np.float32
        is_masked = np.isin(rows, MASKED)
        assert (weights[is_masked] == 1).all()
        assert (weights[~is_masked] == np.float32(1 / share)).all()
        counts.append(weights.sum(dtype=np.float64))
        sums.append((weights * values[rows]).sum(dtype=np.float64))
    others = np.setdiff1d(np.arange(4000), MASKED)
    per_token = (1 - share) / share / blocks
    assert abs(np.mean(counts) - 4000) < 4 * math.sqrt(len(others) * per_token)
    spread = math.sqrt((values[others] ** 2).sum() * per_token)
    assert abs(np.mean(sums) - values.sum()) < 4 * spread


def test_policies_without_draws_have_no_weights():
    assert weights_of("masked", MASKED, MASKED) is None
    assert weights_of("all", np.arange(4000), MASKED) is None


@st.composite
def block_rows(draw):
    lengths = np.array(draw(st.lists(st.integers(0, 9), min_size=1, max_size=12)), np.uint16)
    total = int(lengths.sum())
    rows = draw(st.sets(st.integers(0, total - 1))) if total else set()
    return lengths, np.array(sorted(rows), np.int64)


@settings(max_examples=300, deadline=None)
@given(case=block_rows())
def test_positions_within_sequences_and_within_the_block(case):
    lengths, rows = case
    counts, positions = per_sequence(lengths, rows)
    assert (counts.dtype, positions.dtype) == (np.uint16, np.uint16)
    assert np.array_equal(flat_rows(lengths, counts, positions), rows)
    # The same by hand.
    start, wanted_counts, wanted = 0, [], []
    for length in lengths.tolist():
        own = [r - start for r in rows.tolist() if start <= r < start + length]
        wanted_counts.append(len(own))
        wanted += own
        start += length
    assert counts.tolist() == wanted_counts
    assert positions.tolist() == wanted


def test_the_longest_sequences_and_blocks_do_not_overflow():
    lengths = np.full(3, 65535, np.uint16)
    rows = np.array([0, 65534, 65535, 196604])
    counts, positions = per_sequence(lengths, rows)
    assert (counts.tolist(), positions.tolist()) == ([2, 1, 1], [0, 65534, 0, 65534])
    assert np.array_equal(flat_rows(lengths, counts, positions), rows)


GOLDEN = {
    (0, 0, 0, "positions"): [
        8477700700139396, 4687722314112957, 6367980695722872, 8214124561053738,
    ],
    (5, 2, 9, "tail"): [4653097673321002, 8043835284382000, 3511451191286558, 4626603822368413],
    (5, 2, 9, "residual"): [
        4538733840865651, 5002104503126629, 8819731562525796, 3316014422330215,
    ],
}  # fmt: skip


@pytest.mark.parametrize("arguments", GOLDEN)
def test_known_answer(arguments):
    """A cache made today and its rounds added next year draw from the same words."""
    found = random_units(*arguments, 4) * 2**53
    assert found.astype(np.int64).tolist() == GOLDEN[arguments]


def test_words_are_those_of_philox_written_out():
    """Philox 4x64-10 (Salmon et al., SC11) in plain Python, from its published constants."""
    mask = (1 << 64) - 1

    def block(counter, key):
        a, b, c, d = counter
        k0, k1 = key
        for _ in range(10):
            x, y = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
            a, b, c, d = (y >> 64) ^ b ^ k0, y & mask, (x >> 64) ^ d ^ k1, x & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        return [a, b, c, d]

    for stream, number in (("positions", 0), ("tail", 1), ("residual", 2)):
        key = (5 | 1 << 63, 2 << 48 | 9)
        words = [w for i in (1, 2) for w in block((i, 0, 0, number), key)]
        found = random_units(5, 2, 9, stream, 8)
        assert found.tolist() == [(w >> 11) * 2.0**-53 for w in words]
        assert ((found >= 0) & (found < 1)).all()


def test_words_depend_on_every_argument_and_not_on_their_number():
    base = (3, 1, 2, "positions")
    first = random_units(*base, 1000)
    assert np.array_equal(random_units(*base, 10), first[:10])
    assert len(random_units(*base, 0)) == 0
    others = [(4, 1, 2, "positions"), (3, 2, 2, "positions"), (3, 1, 3, "positions"),
              (3, 1, 2, "tail"), (3, 1, 2, "residual")]  # fmt: skip
    for arguments in others:
        assert not np.isin(random_units(*arguments, 1000), first).any()


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1])
def test_words_are_not_those_of_masking(seed):
    """The draw of further positions must not know which tokens were selected."""
    masking = np.random.Philox(key=np.array([seed, 1 << 48 | 2], np.uint64)).random_raw(4000)
    units = (masking >> np.uint64(11)).astype(np.float64) * 2.0**-53
    for stream in ("positions", "tail", "residual"):
        found = random_units(seed, 1, 2, stream, 4000)
        assert not np.isin(found, units).any()
        assert abs(np.corrcoef(found, units)[0, 1]) < 0.1
