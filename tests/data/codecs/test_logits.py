"""Sparse logits against dense float64 formulas; packing within its named bounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.codecs.logits import head_log_probs, logsumexp_from, pack, unpack
from data.codecs.sparsify import CPU_ROWS, GROUP, LogitSignals, join, largest, sparsify
from data.errors import UserError

V = 57
INFINITY = float("inf")
FIELDS = ("lengths", "ids", "values", "log_odds", "tail_ids")
UINT16 = np.dtype(np.uint16)


def logits(rows, seed=0, scale=4.0, vocab=V) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def outside(values, found) -> torch.Tensor:
    """Which tokens are not stored, bool [N, V], by a plain loop over the first N positions."""
    result = torch.ones(values.shape, dtype=torch.bool)
    for row, ids, length in zip(result, found.ids, found.lengths, strict=False):
        row[ids[:length]] = False
    return result


def dense(values, found, temperature):
    """Logsumexp, log head and log tail mass in float64, each sum over its own terms."""
    scaled, rest = values.double() / temperature, outside(values, found)
    total = scaled.logsumexp(-1)
    head = scaled.masked_fill(rest, -INFINITY).logsumexp(-1)
    tail = scaled.masked_fill(~rest, -INFINITY).logsumexp(-1)
    return total, head - total, tail - total


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
        total, head, tail = dense(values, found, temperature)
        odds = found.log_odds[:, column]
        if k == 0:
            assert odds.isneginf().all()
            continue
        known = tail > -80  # below, float32 terms may underflow: see the test of the limit
        torch.testing.assert_close(odds.double()[known], (head - tail)[known], rtol=1e-6, atol=1e-5)
        assert odds[tail.isneginf()].isposinf().all()
        again = logsumexp_from(found.values, odds, temperature)
        torch.testing.assert_close(again.double(), total, rtol=1e-6, atol=1e-5)
        log_p, log_tail = head_log_probs(found.values, odds, temperature)
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


def test_more_rows_than_one_pass():
    values, u = logits(2 * CPU_ROWS + 3), torch.rand(2 * CPU_ROWS + 3)
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
        _, head, tail = dense(values, found, temperature)
        odds = found.log_odds[:, column].double()
        torch.testing.assert_close(odds, head - tail, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 80.0])
def test_tail_of_a_peaked_distribution_is_accurate(gap):
    """1 - sum p has no digit left from a gap of 21 on; the tail keeps 6."""
    values = torch.zeros(1, V)
    values[0, 3] = gap
    found = sparsify(values, 1, (1.0, 2.0))
    for column, temperature in enumerate((1.0, 2.0)):
        log_p, log_tail = head_log_probs(found.values, found.log_odds[:, column], temperature)
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
    assert logsumexp_from(found.values, found.log_odds[:, 0], 1.0).tolist() == [200.0]
    assert logsumexp_from(found.values, found.log_odds[:, 1], 4.0).tolist() == [50.0]


def test_low_precision_logits_are_summed_in_float32():
    values = logits(4).bfloat16()
    found, expected = sparsify(values, 7, (1.0,)), sparsify(values.float(), 7, (1.0,))
    assert found.values.dtype == found.log_odds.dtype == torch.float32
    assert torch.equal(found.log_odds, expected.log_odds)


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
        log_p, log_tail = head_log_probs(values, odds[:, column], temperature)
        assert not log_p.isnan().any()
        assert torch.equal(log_p.isneginf(), values.isneginf())
        whole = log_p.exp().sum(-1) + log_tail.exp()
        torch.testing.assert_close(whole, torch.ones(rows), rtol=0, atol=5e-7)


def test_rows_without_a_head_are_all_tail():
    values = torch.tensor([[1.0, 0.0], [-INFINITY, -INFINITY], [-INFINITY, -INFINITY]])
    odds = torch.tensor([0.0, 3.0, -INFINITY])
    log_p, log_tail = head_log_probs(values, odds, 2.0)
    assert log_p[1:].isneginf().all()
    assert log_tail.tolist() == [pytest.approx(-math.log(2)), 0.0, 0.0]
    sums = logsumexp_from(values, odds, 2.0)
    assert sums.isnan().tolist() == [False, True, True]
    log_p, log_tail = head_log_probs(torch.zeros(2, 0), torch.full((2,), -INFINITY), 1.0)
    assert log_p.shape == (2, 0)
    assert log_tail.tolist() == [0.0, 0.0]


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
    log_p, log_tail = head_log_probs(found.values, found.log_odds[:, column], temperature)
    target = log_tail.exp()[:, None] / samples * counts
    target.scatter_add_(1, found.ids, log_p.exp())
    torch.testing.assert_close(target.sum(-1), torch.ones(grid), rtol=0, atol=2e-6)
    torch.testing.assert_close(target.mean(0).double(), p[0], rtol=0, atol=2e-3)


def test_draws_without_a_tail_are_valid_ids():
    found = sparsify(logits(3), V, (1.0,), tail_samples=4, uniforms_N=torch.rand(3))
    assert found.tail_ids.shape == (3, 4)
    assert ((found.tail_ids >= 0) & (found.tail_ids < V)).all()


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
