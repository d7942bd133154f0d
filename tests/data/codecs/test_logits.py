"""Sparse logits against dense float64 formulas; packing within its named bounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.codecs.logits import CPU_ROWS, pack, sparsify, unpack_values

V = 57


def logits(rows, seed=0, scale=4.0, vocab=V) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def dense(values, ids, temperature):
    """Logsumexp and log tail in float64, the tail summed over the tokens that are not stored."""
    scaled = values.double() / temperature
    total = scaled.logsumexp(-1)
    rest = scaled.scatter(-1, ids, float("-inf")).logsumexp(-1)
    return total, rest - total


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    k=st.integers(1, V),
    scale=st.floats(0.01, 12.0),
    temperatures=st.lists(st.floats(0.5, 8.0), max_size=2),
    seed=st.integers(0, 1000),
)
def test_equal_to_the_dense_softmax(rows, k, scale, temperatures, seed):
    values = logits(rows, seed, scale)
    held = (1.0, *temperatures)
    found = sparsify(values, k, held)
    expected, ids = values.sort(-1, descending=True)
    assert torch.equal(found.values, expected[:, :k])
    assert torch.equal(values.gather(-1, found.ids), found.values)
    assert found.logsumexp.shape == found.log_tail.shape == (rows, len(held))
    for column, temperature in enumerate(held):
        total, tail = dense(values, found.ids, temperature)
        torch.testing.assert_close(found.logsumexp[:, column].double(), total, rtol=1e-6, atol=2e-6)
        if k == V:
            assert found.log_tail[:, column].isneginf().all()
        else:
            known = tail > -80  # below, float32 terms may underflow: see the test of the limit
            torch.testing.assert_close(
                found.log_tail[:, column].double()[known], tail[known], rtol=1e-6, atol=1e-5
            )
        p = (found.values.double() / temperature - found.logsumexp[:, column, None].double()).exp()
        whole = p.sum(-1) + found.log_tail[:, column].double().exp()
        torch.testing.assert_close(whole, torch.ones(rows).double(), rtol=1e-5, atol=1e-5)


def test_more_rows_than_one_pass():
    values = logits(2 * CPU_ROWS + 3)
    whole, parts = (
        sparsify(values, 5, (1.0, 2.0)),
        [sparsify(v, 5, (1.0, 2.0)) for v in values.split(1)],
    )
    for name in ("ids", "values", "logsumexp", "log_tail"):
        joined = torch.cat([getattr(p, name) for p in parts])
        torch.testing.assert_close(getattr(whole, name), joined, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 80.0])
def test_tail_of_a_peaked_distribution_is_accurate(gap):
    """1 - sum p has no digit left from a gap of 17 on; the tail keeps 6."""
    values = torch.zeros(1, V)
    values[0, 3] = gap
    found = sparsify(values, 1, (1.0, 2.0))
    head = found.values - found.logsumexp[:, :1]
    for column, temperature in enumerate((1.0, 2.0)):
        mass = (V - 1) * math.exp(-gap / temperature)
        expected = math.log(mass) - math.log1p(mass)
        assert found.log_tail[0, column].item() == pytest.approx(expected, rel=1e-6)
    if gap >= 20:
        naive = float(1 - head.exp().sum())
        assert abs(naive / ((V - 1) * math.exp(-gap)) - 1) > 0.1


def test_a_tail_below_float32_is_nothing():
    values = torch.zeros(1, V)
    values[0, 3] = 200.0
    found = sparsify(values, 1, (1.0, 4.0))
    assert found.log_tail[0, 0] == -math.inf
    assert found.log_tail[0, 1].item() == pytest.approx(math.log(V - 1) - 50, rel=1e-6)
    assert found.logsumexp[0].tolist() == [200.0, 50.0]


def test_low_precision_logits_are_summed_in_float32():
    values = logits(4).bfloat16()
    found, expected = sparsify(values, 7, (1.0,)), sparsify(values.float(), 7, (1.0,))
    assert found.values.dtype == found.logsumexp.dtype == torch.float32
    assert torch.equal(found.logsumexp, expected.logsumexp)


def test_no_rows():
    found = sparsify(logits(0), 3, (1.0, 2.0))
    assert found.ids.shape == (0, 3)
    assert pack(found, np.dtype(np.uint16), "uint8")["logit_values"].shape == (0, 3)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    k=st.integers(1, V),
    scale=st.floats(0.001, 30.0),
    shift=st.floats(-60, 60),
    dtype=st.sampled_from(["float16", "float32", "uint8"]),
    seed=st.integers(0, 1000),
)
def test_packed_values_stay_within_their_bounds(rows, k, scale, shift, dtype, seed):
    signals = sparsify(logits(rows, seed, scale) + shift, k, (1.0, 2.0))
    columns = pack(signals, np.dtype(np.uint16), dtype)
    assert columns["logit_ids"].dtype == np.uint16
    assert columns["logit_values"].dtype == np.dtype(dtype)
    assert np.array_equal(columns["logit_ids"], signals.ids.numpy())
    found = unpack_values({n: c.reshape(-1) for n, c in columns.items()}, k)
    values = signals.values.numpy()
    assert found.shape == values.shape
    assert found.dtype == np.float32
    error = np.abs(found.astype(np.float64) - values)
    if dtype == "float32":
        assert (error == 0).all()
        assert "logit_base" not in columns
    elif dtype == "float16":
        assert (error <= np.abs(values) * 2.0**-11 + 2.0**-25).all()
    else:
        base = np.abs(values[:, :1]) * 2.0**-11 + 2.0**-24
        span = np.maximum(values[:, :1] - values[:, -1:] + base, 1e-3)
        step = span / 255 * (1 + 2.0**-9) + 2.0**-23
        assert (error <= step / 2 + base + 1e-6).all()
    for name in ("logsumexp", "log_tail"):
        assert np.array_equal(columns[name], getattr(signals, name).numpy())
        assert columns[name].dtype == np.float32


@pytest.mark.parametrize("span", [1e-3, 1.37e-3, 4e-3, 0.1, 3.3, 20.0])
def test_the_smallest_logit_fits_into_uint8(span):
    """The scale is rounded up: subnormal float16 steps are coarse, and clipping would add to it."""
    values = torch.linspace(0, -span, V)[None]
    columns = pack(sparsify(values, V, (1.0,)), np.dtype(np.uint16), "uint8")
    scale = columns["logit_scale"].astype(np.float64)
    assert (255 * scale >= span).all()
    found = unpack_values({n: c.reshape(-1) for n, c in columns.items()}, V)
    assert (np.abs(found - values.numpy()) <= 0.5 * scale[:, None] * (1 + 1e-5)).all()


def test_large_vocabularies_keep_their_ids():
    signals = sparsify(logits(2, vocab=70_000), 70_000, (1.0,))
    ids = pack(signals, np.dtype(np.uint32), "float32")["logit_ids"]
    assert ids.dtype == np.uint32
    assert (np.sort(ids, -1) == np.arange(70_000)).all()
