"""Packing of sparse logits: within its named bounds, head and tail one distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilcache.data.codecs.logits import pack, topk_log_probs, unpack
from distilcache.data.codecs.sparsify import LogitSignals, sparsify
from distilcache.data.errors import UserError
from tests.data.codecs.logits_support import FIELDS, INFINITY, V, logits

UINT16 = np.dtype(np.uint16)


def flat(columns) -> dict[str, np.ndarray]:
    """As the cache format holds them."""
    return {name: column.reshape(-1) for name, column in columns.items()}


def stored(signals, k, dtype="float32", adaptive=False):
    """Packed and read back, the columns flat as on disk; in their own shapes they say the same."""
    shaped = pack(signals, UINT16, dtype, adaptive)
    columns = flat(shaped)
    found, again = (unpack(c, k, signals.log_odds.shape[1]) for c in (columns, shaped))
    for name in FIELDS:
        assert np.array_equal(getattr(found, name), getattr(again, name))
    return columns, found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    k=st.integers(0, V),
    scale=st.floats(0.001, 30.0),
    dtype=st.sampled_from(["float16", "float32", "uint8"]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 1000),
)
def test_head_and_tail_sum_to_one_after_storing(rows, k, scale, dtype, top_p, seed):
    signals = sparsify(logits(rows, seed, scale), k, (1.0, 2.0), top_p=top_p)
    _, found = stored(signals, k, dtype, top_p < 1)
    values, odds = torch.from_numpy(found.values), torch.from_numpy(found.log_odds)
    for column, temperature in enumerate((1.0, 2.0)):
        log_p, log_tail = topk_log_probs(values, odds[:, column], temperature)
        assert not log_p.isnan().any()
        assert torch.equal(log_p.isneginf(), values.isneginf())
        whole = log_p.exp().sum(-1) + log_tail.exp()
        torch.testing.assert_close(whole, torch.ones(rows), rtol=0, atol=5e-7)


def test_rows_without_a_head_are_all_tail():
    values = torch.tensor([[1.0, 0.0], [-INFINITY, -INFINITY], [-INFINITY, -INFINITY]])
    odds = torch.tensor([0.0, 3.0, -INFINITY])
    log_p, log_tail = topk_log_probs(values, odds, 2.0)
    assert log_p[1:].isneginf().all()
    assert log_tail.tolist() == [pytest.approx(-math.log(2)), 0.0, 0.0]
    log_p, log_tail = topk_log_probs(torch.zeros(2, 0), torch.full((2,), -INFINITY), 1.0)
    assert log_p.shape == (2, 0)
    assert log_tail.tolist() == [0.0, 0.0]


def example(tail=True) -> LogitSignals:
    """Two positions with two and one token."""
    return LogitSignals(
        lengths=torch.tensor([2, 1]),
        ids=torch.tensor([[7, 258], [3, 0]]),
        values=torch.tensor([[2.0, -0.5], [1.25, -INFINITY]]),
        log_odds=torch.tensor([[0.5, -1.0], [INFINITY, 2.0]]),
        tail_ids=torch.tensor([[1, 9], [4, 4]]) if tail else None,
    )


KNOWN = {
    "float16": {
        "logit_lengths": "0200 0100",
        "logit_ids": "0700 0201 0300",
        "logit_values": "0040 00b8 003d",
        "log_odds": "0038 00bc 007c 0040",
        "tail_ids": "0100 0900 0400 0400",
    },
    "float32": {
        "logit_lengths": "0200 0100",
        "logit_ids": "0700 0201 0300",
        "logit_values": "00000040 000000bf 0000a03f",
        "log_odds": "0000003f 000080bf 0000807f 00000040",
        "tail_ids": "0100 0900 0400 0400",
    },
    # Scales: 0x2106 is one step above 2.5 / 255, 0x0043 one above the least span, 0.001 / 255.
    "uint8": {
        "logit_lengths": "0200 0100",
        "logit_ids": "0700 0201 0300",
        "logit_values": "00 ff 00",
        "logit_base": "0040 003d",
        "logit_scale": "0621 4300",
        "log_odds": "0038 00bc 007c 0040",
        "tail_ids": "0100 0900 0400 0400",
    },
}


@pytest.mark.parametrize("dtype", KNOWN)
def test_known_bytes(dtype):
    columns = pack(example(), UINT16, dtype, adaptive=True)
    assert {name: column.tobytes().hex() for name, column in columns.items()} == {
        name: text.replace(" ", "") for name, text in KNOWN[dtype].items()
    }
    found = unpack(flat(columns), 2, 2)
    assert found.lengths.tolist() == [2, 1]
    assert found.ids.tolist() == [[7, 258], [3, 0]]
    assert found.tail_ids.tolist() == [[1, 9], [4, 4]]
    assert found.log_odds.tolist() == [[0.5, -1.0], [INFINITY, 2.0]]
    assert found.values[1].tolist() == [1.25, -INFINITY]
    assert found.values[0].tolist() == [2.0, pytest.approx(-0.5, abs=0.005)]


def test_fixed_lengths_are_read_as_views():
    signals = sparsify(logits(3), 2, (1.0,), tail_samples=2, uniforms_N=torch.rand(3))
    columns, found = stored(signals, 2)
    assert list(columns) == ["logit_ids", "logit_values", "log_odds", "tail_ids"]
    for name, column in (("ids", "logit_ids"), ("values", "logit_values"), ("log_odds",) * 2):
        assert np.shares_memory(getattr(found, name), columns[column])
    for name in FIELDS:
        assert np.array_equal(getattr(found, name), getattr(signals, name).numpy())


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    k=st.integers(1, V),
    scale=st.floats(0.001, 30.0),
    shift=st.floats(-60, 60),
    dtype=st.sampled_from(["float16", "float32", "uint8"]),
    top_p=st.sampled_from([1.0, 0.95, 0.5]),
    seed=st.integers(0, 1000),
)
def test_packed_values_stay_within_their_bounds(rows, k, scale, shift, dtype, top_p, seed):
    signals = sparsify(logits(rows, seed, scale) + shift, k, (1.0, 2.0), top_p=top_p)
    columns, found = stored(signals, k, dtype, top_p < 1)
    assert columns["logit_ids"].dtype == np.uint16
    assert columns["logit_values"].dtype == np.dtype(dtype)
    assert len(columns["logit_ids"]) == len(columns["logit_values"]) == signals.lengths.sum()
    assert ("logit_lengths" in columns) == (top_p < 1)
    assert ("logit_base" in columns) == ("logit_scale" in columns) == (dtype == "uint8")
    assert np.array_equal(found.ids, signals.ids.numpy())
    assert np.array_equal(found.lengths, signals.lengths.numpy())
    values = signals.values.numpy()
    present = np.isfinite(values)
    assert found.values.shape == values.shape
    assert found.values.dtype == found.log_odds.dtype == np.float32
    assert (found.values[~present] == -np.inf).all()
    values = np.where(present, values, 0.0)
    error = np.abs(np.where(present, found.values, 0.0).astype(np.float64) - values)
    if dtype == "float32":
        assert (error == 0).all()
    elif dtype == "float16":
        assert (error <= np.abs(values) * 2.0**-11 + 2.0**-25).all()
    else:
        base = np.abs(values[:, :1]) * 2.0**-11 + 2.0**-24
        smallest = values[np.arange(rows), found.lengths - 1][:, None]
        span = np.maximum(values[:, :1] - smallest + base, 1e-3)
        step = span / 255 * (1 + 2.0**-9) + 2.0**-23
        scales = columns["logit_scale"].astype(np.float64)[:, None]
        assert (scales <= step).all()
        assert (error <= scales / 2 + base + 1e-6).all()
    odds = signals.log_odds.numpy()
    assert np.array_equal(
        found.log_odds, odds if dtype == "float32" else odds.astype(np.float16).astype(np.float32)
    )


@pytest.mark.parametrize("span", [1e-3, 1.37e-3, 4e-3, 0.1, 3.3, 20.0])
def test_the_smallest_logit_fits_into_uint8(span):
    """The scale is rounded up: subnormal float16 steps are coarse, and clipping would add to it."""
    values = torch.linspace(0, -span, V)[None]
    columns, found = stored(sparsify(values, V, (1.0,)), V, "uint8")
    scale = columns["logit_scale"].astype(np.float64)
    assert (255 * scale >= span).all()
    assert (np.abs(found.values - values.numpy()) <= 0.5 * scale[:, None] * (1 + 1e-5)).all()


def test_large_vocabularies_keep_their_ids():
    signals = sparsify(logits(2, vocab=70_000), 70_000, (1.0,))
    ids = pack(signals, np.dtype(np.uint32), "float32", False)["logit_ids"]
    assert ids.dtype == np.uint32
    assert (np.sort(ids, -1) == np.arange(70_000)).all()


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_no_rows(dtype, k, adaptive):
    signals = sparsify(logits(0), k, (1.0, 2.0), top_p=0.9 if adaptive else 1.0)
    assert signals.ids.shape == (0, k)
    _, found = stored(signals, k, dtype, adaptive)
    assert found.ids.shape == found.values.shape == (0, k)
    assert found.log_odds.shape == (0, 2)


def test_no_head():
    signals = sparsify(logits(3), 0, (1.0, 2.0), tail_samples=2, uniforms_N=torch.rand(3))
    columns, found = stored(signals, 0, "float16")
    assert list(columns) == ["log_odds", "tail_ids"]
    assert (columns["log_odds"] == -np.inf).all()
    assert found.ids.shape == found.values.shape == (3, 0)
    assert found.lengths.tolist() == [0, 0, 0]
    assert np.array_equal(found.tail_ids, signals.tail_ids.numpy())


@pytest.mark.parametrize(
    "change",
    [
        {"logit_lengths": [3, 0]},
        {"logit_lengths": [1, 1]},
        {"logit_lengths": [2]},
        {"logit_lengths": [2, 1, 0]},
        {"logit_ids": [7]},
        {"logit_values": [7]},
        {"logit_base": [1.0]},
        {"logit_scale": [1.0, 1.0, 1.0]},
        {"log_odds": [1.0]},
        {"log_odds": [1.0] * 6},
        {"tail_ids": [1, 2, 3]},
        {"logit_ids": None},
        {"log_odds": None},
    ],
    ids=str,
)
def test_columns_that_contradict_each_other(change):
    columns = flat(pack(example(), UINT16, "uint8", adaptive=True))
    assert unpack(columns, 2, 2).lengths.tolist() == [2, 1]
    for name, values in change.items():
        if values is None:
            del columns[name]
        else:
            columns[name] = np.array(values, columns[name].dtype)
    with pytest.raises(UserError, match=r"cache: logit columns must fit each other, got: "):
        unpack(columns, 2, 2)


@pytest.mark.parametrize("name", ["logit_ids", "logit_values", "log_odds"])
def test_fixed_columns_that_end_early(name):
    columns = flat(pack(sparsify(logits(4), 3, (1.0, 2.0)), UINT16, "float16", False))
    for cut in (1, 3, 6):
        damaged = {**columns, name: columns[name][:-cut]}
        with pytest.raises(UserError, match="must fit"):
            unpack(damaged, 3, 2)
