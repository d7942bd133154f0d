"""Joined distributions against dense float64 formulas, with padding that collides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilcache.data.codecs.draws import residual_draws
from distilcache.data.codecs.joined import corrected_log_probs, substituted_logits
from distilcache.data.codecs.logits import topk_log_probs
from distilcache.data.codecs.sparsify import sparsify

V = 19


def rows(count, k, seed, scale=3.0, error=0.3):
    """True logits, replayed logits, and stored heads of 0 to K tokens with padding."""
    generator = torch.Generator().manual_seed(seed)
    true = scale * torch.randn(count, V, generator=generator)
    true[: (count + 1) // 2, 0] = 3 * scale + 1  # token 0 is stored: padding collides with it
    replayed = true + error * torch.randn(count, V, generator=generator)
    values, ids = true.topk(k, dim=-1)
    lengths = torch.randint(0, k + 1, (count,), generator=generator)
    present = torch.arange(k) < lengths[:, None]
    return (
        true,
        replayed,
        ids.masked_fill(~present, 0),
        values.masked_fill(~present, float("-inf")),
        lengths,
    )


def odds_of(true, ids, lengths, temperature) -> torch.Tensor:
    """Log odds of the stored tokens in float64, row by row."""
    result = []
    for row, stored, length in zip(true.double() / temperature, ids, lengths, strict=True):
        head = torch.zeros(V, dtype=torch.bool)
        head[stored[:length]] = True
        result.append(row[head].logsumexp(0) - row[~head].logsumexp(0))
    return torch.stack(result)


def dense(true, replayed, ids, lengths, temperature) -> torch.Tensor:
    """The joined distribution, one row after the other."""
    result = []
    for row, other, stored, length in zip(
        true.double() / temperature, replayed.double() / temperature, ids, lengths, strict=True
    ):
        head = torch.zeros(V, dtype=torch.bool)
        head[stored[:length]] = True
        p = row.softmax(0)
        joined = torch.where(head, 0.0, other.exp())
        joined *= p[~head].sum() / joined.sum().clamp(min=1e-300)
        joined[head] = p[head]
        result.append(joined)
    return torch.stack(result)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 7),
    k=st.integers(0, V),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 10_000),
    double=st.booleans(),
)
def test_equal_to_the_dense_formula(count, k, temperature, seed, double):
    true, replayed, ids, values, lengths = rows(count, k, seed)
    odds = odds_of(true, ids, lengths, temperature)
    log_p, log_tail = topk_log_probs(values.double(), odds, temperature)
    if not double:
        log_p, log_tail = log_p.float(), log_tail.float()
    scaled = (replayed / temperature).to(log_p.dtype)
    found = corrected_log_probs(scaled, ids, log_p, log_tail)
    assert found is scaled
    assert found.isfinite().all()
    expected = dense(true, replayed, ids, lengths, temperature)
    torch.testing.assert_close(found.exp().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones_like(found[:, 0]))
    # Stored tokens keep their log probability to the last bit.
    for row, stored, log_probs, length in zip(found, ids, log_p, lengths, strict=True):
        assert torch.equal(row[stored[:length]], log_probs[:length])


def test_rows_of_padding_are_plain_replay():
    _, replayed, ids, values, _ = rows(4, 5, 0)
    ids.zero_()
    values.fill_(float("-inf"))
    log_p, log_tail = topk_log_probs(values, torch.randn(4), 2.0)
    found = corrected_log_probs(replayed / 2, ids, log_p, log_tail)
    assert torch.equal(found, (replayed / 2).log_softmax(-1))


def test_all_tokens_stored():
    """K = V: replay does not matter, and the log of no tail at all makes no nan."""
    true, replayed, *_ = rows(4, 1, 1)
    values, ids = true.topk(V, dim=-1)
    log_p, log_tail = topk_log_probs(values, torch.full((4,), float("inf")), 1.0)
    assert log_tail.isneginf().all()
    found = corrected_log_probs(100 * replayed, ids, log_p, log_tail)
    torch.testing.assert_close(found, true.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_a_tail_of_no_mass_is_nothing_in_sums():
    """Head alone: finite logs elsewhere, so that p (log p - log q) is 0 there."""
    _, replayed, ids, values, _ = rows(4, 3, 2)
    values = torch.zeros_like(values)
    ids = torch.arange(3).expand(4, 3)
    log_p, log_tail = topk_log_probs(values, torch.full((4,), float("inf")), 1.0)
    found = corrected_log_probs(replayed, ids, log_p, log_tail)
    assert found.isfinite().all()
    assert (found[:, 3:].exp() == 0).all()
    assert ((found.exp() * found)[:, 3:] == 0).all()


def test_perfect_replay_leaves_no_residual():
    """The corrected replay of exact hidden states is the truth, up to the rounding of odds."""
    true, *_ = rows(6, 1, 3)
    signals = sparsify(true, 4, (1.0, 2.0))
    log_p, log_tail = topk_log_probs(signals.values, signals.log_odds[:, 1], 2.0)
    replayed = corrected_log_probs(true / 2, signals.ids, log_p, log_tail)
    log_true = (true / 2).log_softmax(-1)
    torch.testing.assert_close(replayed, log_true, rtol=1e-5, atol=1e-5)
    _, mass = residual_draws(log_true, replayed, 4, torch.rand(6, 2))
    assert (mass < 1e-6).all()
    _, none = residual_draws(replayed, replayed.clone(), 4, torch.rand(6, 2))
    assert (none == 0).all()


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 7), k=st.integers(0, V), seed=st.integers(0, 10_000))
def test_stored_logits_take_the_place_of_replayed_ones(count, k, seed):
    _, replayed, ids, values, lengths = rows(count, k, seed)
    expected = replayed.clone()
    for row, stored, logits, length in zip(expected, ids, values, lengths, strict=True):
        row[stored[:length]] = logits[:length]
    logits = replayed.clone()
    found = substituted_logits(logits, ids, values)
    assert found is logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("function", ["corrected", "substituted"])
def test_no_rows(function):
    empty = torch.zeros(0, V), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)
    if function == "corrected":
        assert corrected_log_probs(*empty, torch.zeros(0)).shape == (0, V)
    else:
        assert substituted_logits(*empty).shape == (0, V)
