"""Sparse logits against dense float64 formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilcache.data.codecs import draws
from distilcache.data.codecs.logits import topk_log_probs
from distilcache.data.codecs.sparsify import GROUP, join, largest, sparsify
from tests.data.codecs.logits_support import FIELDS, INFINITY, V, logits


def outside(values, found) -> torch.Tensor:
    """Which tokens are not stored, bool [N, V], by a plain loop over the first N positions."""
    result = torch.ones(values.shape, dtype=torch.bool)
    for row, ids, length in zip(result, found.ids, found.lengths, strict=False):
        row[ids[:length]] = False
    return result


def dense(values, found, temperature):
    """Log head and log tail mass in float64, each sum over its own terms."""
    scaled, rest = values.double() / temperature, outside(values, found)
    total = scaled.logsumexp(-1)
    head = scaled.masked_fill(rest, -INFINITY).logsumexp(-1)
    tail = scaled.masked_fill(~rest, -INFINITY).logsumexp(-1)
    return head - total, tail - total


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    k=st.integers(0, V),
    scale=st.floats(0.01, 12.0),
    temperatures=st.lists(st.floats(0.5, 8.0), max_size=2),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    seed=st.integers(0, 1000),
)
def test_equal_to_the_dense_softmax(rows, k, scale, temperatures, top_p, seed):
    values = logits(rows, seed, scale)
    held = (1.0, *temperatures)
    found = sparsify(values, k, held, top_p=top_p)
    expected, ids = values.sort(-1, descending=True)
    beyond = torch.arange(k) >= found.lengths[:, None]
    assert found.lengths.dtype == found.ids.dtype == torch.int64
    assert torch.equal(found.values, expected[:, :k].masked_fill(beyond, -INFINITY))
    assert torch.equal(found.ids, ids[:, :k].masked_fill(beyond, 0))
    assert found.log_odds.shape == (rows, len(held))
    assert found.tail_ids is None
    for column, temperature in enumerate(held):
        head, tail = dense(values, found, temperature)
        odds = found.log_odds[:, column]
        if k == 0:
            assert odds.isneginf().all()
            continue
        known = tail > -80  # below, float32 terms may underflow: see the test of the limit
        torch.testing.assert_close(odds.double()[known], (head - tail)[known], rtol=1e-6, atol=1e-5)
        assert odds[tail.isneginf()].isposinf().all()
        log_p, log_tail = topk_log_probs(found.values, odds, temperature)
        torch.testing.assert_close(log_tail.double()[known], tail[known], rtol=1e-6, atol=1e-5)
        p = (values.double() / temperature).softmax(-1).gather(-1, found.ids)
        torch.testing.assert_close(
            log_p.exp().double(), p.masked_fill(beyond, 0), rtol=1e-4, atol=1e-6
        )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    k=st.integers(1, V),
    scale=st.floats(0.1, 8.0),
    temperatures=st.lists(st.sampled_from([0.5, 2.0, 4.0]), max_size=2, unique=True),
    top_p=st.floats(0.0, 0.999),
    seed=st.integers(0, 1000),
)
def test_lengths_are_the_shortest_that_reach_top_p(rows, k, scale, temperatures, top_p, seed):
    values = logits(rows, seed, scale)
    found = sparsify(values, k, (1.0, *temperatures), top_p=top_p)
    masses = (values.double() / max(1.0, *temperatures, 1.0)).softmax(-1).sort(-1, descending=True)
    for row, length in zip(masses.values.tolist(), found.lengths.tolist(), strict=True):
        expected, mass = 0, 0.0
        near = False  # to a tie, which rounding decides
        for p in row[:k]:
            expected, mass = expected + 1, mass + p
            near |= expected == length and abs(mass - top_p) < 1e-6
            if mass >= top_p:
                break
        assert length == expected or near


def test_top_p_of_one_keeps_all_however_small():
    values = torch.zeros(2, V)
    values[:, 3] = 200.0
    assert sparsify(values, 5, (1.0,)).lengths.tolist() == [5, 5]
    assert sparsify(values, 5, (1.0,), top_p=0.999).lengths.tolist() == [1, 1]


def test_a_mass_that_just_reaches_top_p_is_enough():
    """Of four equal tokens two are half of the mass, exactly."""
    found = sparsify(torch.zeros(1, 4), 4, (1.0,), top_p=0.5)
    assert found.lengths.tolist() == [2]


def test_more_rows_than_one_pass(monkeypatch):
    monkeypatch.setattr(draws, "CPU_NUMBERS", 8 * V)
    rows = 2 * 8 + 3
    values, u = logits(rows), torch.rand(rows, generator=torch.Generator().manual_seed(0))
    settings = {"top_p": 0.9, "tail_samples": 3, "sample_temperature": 2.0}
    whole = sparsify(values, 5, (1.0, 2.0), uniforms_N=u, **settings)
    parts = join(
        [
            sparsify(v, 5, (1.0, 2.0), uniforms_N=w, **settings)
            for v, w in zip(values.split(1), u.split(1), strict=True)
        ]
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [5 * GROUP, 40 * GROUP, 40 * GROUP + 7])
@pytest.mark.parametrize("count", [0, 1, 8])
@pytest.mark.parametrize("rows", [0, 6])
def test_the_largest_are_those_of_topk(rows, count, size):
    """Of distinct values; of ties it may be any of the equal ones."""
    values = logits(rows, vocab=size)
    expected, ids = values.topk(count, dim=-1)
    found = largest(values, count)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], ids)
    rounded = values.bfloat16().float()
    found = largest(rounded, count)
    assert torch.equal(found[0], rounded.topk(count, dim=-1).values)
    assert torch.equal(found[0], rounded.gather(-1, found[1]))
    assert all(len(set(row)) == count for row in found[1].tolist())


@pytest.mark.parametrize("temperatures", [(2.0, 4.0), (0.5,), (3.0, 1.5), (2.0, 1.0)])
def test_squares_are_as_good_as_exponentials(temperatures):
    values = logits(20, scale=8.0, vocab=3000)
    found = sparsify(values, 8, (1.0, *temperatures))
    for column, temperature in enumerate((1.0, *temperatures)):
        head, tail = dense(values, found, temperature)
        odds = found.log_odds[:, column].double()
        torch.testing.assert_close(odds, head - tail, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 80.0])
def test_tail_of_a_peaked_distribution_is_accurate(gap):
    """1 - sum p has no digit left from a gap of 21 on; the tail keeps 6."""
    values = torch.zeros(1, V)
    values[0, 3] = gap
    found = sparsify(values, 1, (1.0, 2.0))
    for column, temperature in enumerate((1.0, 2.0)):
        log_p, log_tail = topk_log_probs(found.values, found.log_odds[:, column], temperature)
        mass = (V - 1) * math.exp(-gap / temperature)
        assert log_tail.item() == pytest.approx(math.log(mass) - math.log1p(mass), rel=1e-6)
        if gap >= 40 and temperature == 1:
            assert abs(float(1 - log_p.exp().sum()) / mass - 1) > 0.1


def test_a_tail_below_float32_is_nothing():
    values = torch.zeros(1, V)
    values[0, 3] = 200.0
    found = sparsify(values, 1, (1.0, 4.0))
    assert found.log_odds[0, 0] == INFINITY
    assert found.log_odds[0, 1].item() == pytest.approx(50 - math.log(V - 1), rel=1e-6)


def test_low_precision_logits_are_summed_in_float32():
    values = logits(4).bfloat16()
    found, expected = sparsify(values, 7, (1.0,)), sparsify(values.float(), 7, (1.0,))
    assert found.values.dtype == found.log_odds.dtype == torch.float32
    assert torch.equal(found.log_odds, expected.log_odds)


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(0, V - 1),
    samples=st.integers(1, 20),
    temperature=st.sampled_from([1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 1000),
)
def test_tail_draws_stand_for_the_tail(k, samples, temperature, top_p, seed):
    """Their mean over all uniforms is the distribution outside the head, each time summing to 1."""
    grid = 1000
    values = logits(1, seed, 2.0)
    found = sparsify(
        values.expand(grid, V),
        k,
        (1.0, 2.0),
        top_p=top_p,
        tail_samples=samples,
        sample_temperature=temperature,
        uniforms_N=(torch.arange(grid) + 0.5) / grid,
    )
    assert found.tail_ids.shape == (grid, samples)
    assert found.tail_ids.dtype == torch.int64
    counts = torch.zeros(grid, V).scatter_add_(1, found.tail_ids, torch.ones(grid, samples))
    rest = outside(values, found)
    assert (counts[:, ~rest[0]] == 0).all()
    assert (counts.sum(-1) == samples).all()
    p = (values.double() / temperature).softmax(-1)
    expected = samples * p.masked_fill(~rest, 0) / p[rest].sum()
    # One grid step at each end of a token's share.
    torch.testing.assert_close(counts.mean(0).double(), expected[0], rtol=0, atol=1.01 / grid)
    column = (1.0, 2.0).index(temperature)
    log_p, log_tail = topk_log_probs(found.values, found.log_odds[:, column], temperature)
    target = log_tail.exp()[:, None] / samples * counts
    target.scatter_add_(1, found.ids, log_p.exp())
    torch.testing.assert_close(target.sum(-1), torch.ones(grid), rtol=0, atol=2e-6)
    torch.testing.assert_close(target.mean(0).double(), p[0], rtol=0, atol=2e-3)


def test_draws_without_a_tail_are_valid_ids():
    found = sparsify(logits(3), V, (1.0,), tail_samples=4, uniforms_N=torch.rand(3))
    assert found.tail_ids.shape == (3, 4)
    assert ((found.tail_ids >= 0) & (found.tail_ids < V)).all()
