"""Draws whose mean over all uniforms is the distribution itself, and nothing of weight zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilcache.data.codecs import draws
from distilcache.data.codecs.draws import residual_draws, systematic

V = 23
ROWS = 8
"""Of one pass in these tests."""
GRID = 1000
MIDPOINTS = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
"""A mean over them is that over all u to within 1/GRID for each end of a step function."""


@pytest.fixture(autouse=True)
def _short_passes(monkeypatch):
    monkeypatch.setattr(draws, "CPU_NUMBERS", ROWS * V)


def weights(rows, seed, zeros=0.4) -> torch.Tensor:
    """Positive weights over five decades with zeros among them, the last token's included."""
    generator = torch.Generator().manual_seed(seed)
    values = (5 * torch.randn(rows, V, generator=generator)).exp()
    values[torch.rand(rows, V, generator=generator) < zeros] = 0
    values[:, 0], values[:, -1] = 1.0, 0.0
    return values


def counts(ids, vocab=V) -> torch.Tensor:
    return torch.zeros(len(ids), vocab).scatter_add_(1, ids, torch.ones(ids.shape))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 6),
    samples=st.integers(1, 40),
    double=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_each_draw_is_the_quantile_of_its_point(rows, samples, double, seed):
    w = weights(rows, seed)
    w = w.double() if double else w
    kept = w.clone()
    u = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    ids = systematic(w, samples, u)
    assert torch.equal(w, kept)
    assert ids.shape == (rows, samples)
    assert ids.dtype == torch.int64
    assert (ids.diff(dim=-1) >= 0).all()
    assert (w.gather(-1, ids) > 0).all()
    p = w.double() / w.double().sum(-1, keepdim=True)
    points = (torch.arange(samples) + u.double()[:, None]) / samples
    ends = p.cumsum(-1).gather(-1, ids)
    starts = ends - p.gather(-1, ids)
    assert (points >= starts - 1e-12).all()
    assert (points <= ends + 1e-12).all()
    # Between the whole numbers next to R p: the variance that independent draws have is gone.
    assert ((counts(ids) - samples * p).abs() < 1 + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_the_mean_over_all_uniforms_is_the_distribution(samples, seed):
    w = weights(1, seed)
    mean = counts(systematic(w.expand(GRID, V), samples, MIDPOINTS)).mean(0)
    torch.testing.assert_close(mean, samples * (w / w.sum())[0], rtol=0, atol=1.01 / GRID)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24, 1 - 2.0**-53, 1.0])
@pytest.mark.parametrize("scale", [1e-42, 1.0, 1e30])
def test_the_ends_of_the_distribution(u, scale):
    """Zeros before and after the only two tokens; weights may be subnormal."""
    w = torch.zeros(2, V)
    w[:, 5], w[:, 9] = scale, 2 * scale
    ids = systematic(w, 9, torch.tensor([u, u], dtype=torch.float64))
    assert set(ids.reshape(-1).tolist()) == {5, 9}
    assert ids[0, 0] == 5
    assert (ids[:, -1] == 9).all()


def test_large_vocabularies_in_float32_do_not_lose_small_tokens():
    """A float32 running sum of 2^24 ones and more would stand still."""
    vocab = (1 << 24) + 64
    ids = systematic(torch.ones(1, vocab), 4, torch.tensor([0.5]))
    expected = (torch.arange(4) + 0.5) / 4 * vocab
    assert ((ids[0] - expected).abs() <= 1).all()


def test_rows_without_mass_give_a_valid_token():
    ids = systematic(torch.zeros(3, V), 4, torch.tensor([0.0, 0.5, 1.0]))
    assert (ids == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_draw_alike():
    """Sums of whole units are exact in any order; the total alone may differ in its last bit."""
    w = weights(64, 3).repeat(1, 500)
    u = torch.rand(64, generator=torch.Generator().manual_seed(3))
    ids = systematic(w.cuda(), 32, u.cuda())
    assert (w.gather(-1, ids.cpu()) > 0).all()
    assert (ids.cpu() == systematic(w, 32, u)).float().mean() > 0.999


@pytest.mark.parametrize(("rows", "samples"), [(0, 3), (2, 0), (2 * ROWS + 3, 3)])
def test_any_number_of_rows_and_draws(rows, samples):
    w, u = weights(rows, 1), torch.rand(rows)
    ids = systematic(w, samples, u)
    assert ids.shape == (rows, samples)
    one_by_one = [systematic(a, samples, b) for a, b in zip(w.split(1), u.split(1), strict=True)]
    assert torch.equal(ids, torch.cat(one_by_one))


def pair(rows, seed, distance) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(rows, V, generator=generator)
    moved = z + distance * torch.randn(rows, V, generator=generator)
    return z.log_softmax(-1), moved.log_softmax(-1)


def corrected(log_q, ids, mass) -> torch.Tensor:
    """``q + mass/h (positive - negative)`` as the docstring has it."""
    half = ids.shape[-1] // 2
    signs = counts(ids[:, :half]) - counts(ids[:, half:])
    return log_q.exp() + mass[:, None] / half * signs


@settings(max_examples=25, deadline=None)
@given(
    half=st.integers(1, 12),
    distance=st.floats(1e-3, 3.0),
    seed=st.integers(0, 10_000),
)
def test_residual_draws_correct_without_bias(half, distance, seed):
    log_p, log_q = pair(1, seed, distance)
    ids, mass = residual_draws(
        log_p.expand(GRID, V),
        log_q.expand(GRID, V),
        2 * half,
        torch.stack([MIDPOINTS, MIDPOINTS.flip(0)], -1),
    )
    assert ids.shape == (GRID, 2 * half)
    assert ids.dtype == torch.int64
    assert mass.dtype == torch.float32
    difference = (log_p.exp() - log_q.exp())[0]
    assert mass[0].item() == pytest.approx(difference.abs().sum().item() / 2, rel=1e-3, abs=1e-7)
    assert (difference[ids[:, :half]] > 0).all()
    assert (difference[ids[:, half:]] < 0).all()
    estimates = corrected(log_q, ids, mass)
    torch.testing.assert_close(estimates.sum(-1), torch.ones(GRID), rtol=0, atol=1e-5)
    # A token's count is off by at most 1/GRID, a draw's weight is mass / half.
    bound = mass[0].item() / half / GRID + 1e-6
    torch.testing.assert_close(estimates.mean(0), log_p[0].exp(), rtol=0, atol=bound)


def test_each_sign_has_its_own_uniform():
    log_p, log_q = pair(ROWS + 5, 1, 0.5)
    u = torch.rand(len(log_p), 2, generator=torch.Generator().manual_seed(1))
    ids, _ = residual_draws(log_p, log_q, 10, u)
    difference = log_p.exp() - log_q.exp()
    assert torch.equal(ids[:, :5], systematic(difference.clamp(min=0), 5, u[:, 0]))
    assert torch.equal(ids[:, 5:], systematic((-difference).clamp(min=0), 5, u[:, 1]))


def test_equal_distributions_leave_nothing():
    log_p, _ = pair(ROWS + 5, 0, 0.0)
    ids, mass = residual_draws(log_p, log_p.clone(), 6, torch.rand(len(log_p), 2))
    assert (mass == 0).all()
    assert ((ids >= 0) & (ids < V)).all()
    assert torch.equal(corrected(log_p, ids, mass), log_p.exp())


def test_masses_of_log_zero_are_no_draws():
    """Tokens that one side rules out, and no nan where both do."""
    log_p = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    log_q = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).log()
    ids, mass = residual_draws(log_p, log_q, 4, torch.tensor([[0.3, 0.7]]))
    assert ids.tolist() == [[1, 1, 2, 2]]
    assert mass.tolist() == [0.5]
