"""Masking is a pure function with the shares, weights and limits that it names."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilcache.data.errors import UserError
from distilcache.data.masks.masking import ALONE, BEGINS, ENDS, GOES_ON, MaskingConfig, mask_block
from tests.command_line import ROOT, SRC

SPECIAL = (0, 1, 2, 3, 4)
MASK = 4
V = 200


def block(lengths, seed=0, dtype=np.uint16):
    """Sequences [CLS] ... [SEP] of random ordinary ids, flat."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, V, int(np.sum(lengths))).astype(dtype)
    ends = np.cumsum(lengths)
    ids[ends - 1] = 3
    ids[ends - np.asarray(lengths)] = 2
    return ids, np.asarray(lengths, dtype=np.int64)


def masked(ids, lengths, round_index=0, block_index=0, counts=None, continues=None, **config):
    return mask_block(
        ids,
        lengths,
        config=MaskingConfig(**config),
        round_index=round_index,
        block_index=block_index,
        special_ids=SPECIAL,
        mask_id=MASK,
        vocab_size=V,
        token_counts=counts,
        continues=continues,
    )


def flat_rows(result, lengths):
    starts = np.cumsum(lengths) - lengths
    return np.repeat(starts, result.masked_counts) + result.masked_positions


def digest(result):
    parts = (result.input_ids, result.masked_counts, result.masked_positions, result.labels)
    return hashlib.sha256(b"|".join(p.tobytes() for p in parts)).hexdigest()


def test_known_answer():
    """These bits are in every cache that was ever written: they must never change."""
    ids = np.array([2, 10, 11, 12, 13, 14, 15, 3, 2, 20, 21, 3], dtype=np.uint16)
    lengths = np.array([8, 4])
    result = masked(ids, lengths, round_index=1, block_index=7, probability=0.5, seed=42)
    assert result.masked_counts.tolist() == KNOWN["counts"]
    assert result.masked_positions.tolist() == KNOWN["positions"]
    assert result.labels.tolist() == KNOWN["labels"]
    assert result.input_ids.tolist() == KNOWN["input_ids"]
    counts = np.arange(V)
    smoothed = masked(
        ids, lengths, probability=0.5, seed=42, policy="smoothed", counts=counts, random=0.2
    )
    assert smoothed.masked_positions.tolist() == KNOWN["smoothed"]
    many = (np.arange(2450) * 7 % 195 + 5).astype(np.uint16)
    assert digest(masked(many, np.array([50, 3, 128, 64] * 10))) == KNOWN["digest"]


KNOWN = {
    "counts": [3, 1],
    "positions": [2, 4, 5, 2],
    "labels": [11, 13, 14, 21],
    "input_ids": [2, 10, 4, 12, 4, 4, 15, 3, 2, 20, 4, 3],
    "smoothed": [1, 4, 6, 2],
    "digest": "35cca90fabaa793ca09c120faceefa595340ed531a3f5228b5226f75b1a79726",
}


def test_equal_to_a_slow_reference():
    """Selection and replacement written once more, token by token, from the documented stream."""
    lengths = [12, 3, 30, 2, 9]
    ids, sizes = block(lengths, seed=3)
    counts = np.random.default_rng(1).integers(0, 1000, V)
    for policy in ("uniform", "smoothed"):
        seed, rnd, number = 9, 2, 5
        key = np.array([seed, (rnd << 48) | number], dtype=np.uint64)
        words = [int(w) for w in np.random.Philox(key=key).random_raw(2 * len(ids))]
        unit = [(w >> 11) * 2.0**-53 for w in words]
        ordinary = [i for i in range(V) if i not in SPECIAL]
        expected, start = ids.tolist(), 0
        for length in lengths:
            rows = [r for r in range(start, start + length) if ids[r] not in SPECIAL]
            weight = {
                r: max(int(counts[ids[r]]), 1) ** -0.7 if policy == "smoothed" else 1.0
                for r in rows
            }
            rank = sorted(rows, key=lambda r: -np.log1p(-unit[r]) / weight[r])  # noqa: B023
            for r in rank[: min(len(rows), max(1, int(0.15 * len(rows) + 0.5)))]:
                fate = unit[len(ids) + r]
                if fate < 0.8:
                    expected[r] = MASK
                elif fate < 0.9:
                    expected[r] = ordinary[(words[r] % 2**32) * len(ordinary) >> 32]
            start += length
        result = masked(ids, sizes, rnd, number, seed=seed, policy=policy, counts=counts)
        assert result.input_ids.tolist() == expected


PLACES = np.where(np.arange(V) % 3 == 0, GOES_ON, np.where(np.arange(V) % 10 == 7, ALONE, BEGINS))
"""A third of the ids, the special one 3 among them, go on with the word before them."""
BY_ENDS = np.where(np.arange(V) % 3 == 0, ENDS, np.where(np.arange(V) % 10 == 7, ALONE, GOES_ON))
"""A third of the ids are the last of their words."""


def whole_words(ids, lengths, places=PLACES):
    """Rows of each word, sequence by sequence."""
    start = 0
    for length in lengths:
        words = []
        for r in range(start, start + length):
            if ids[r] in SPECIAL:
                continue
            goes_on = places[ids[r]] in (GOES_ON, ENDS) and words and words[-1][-1] == r - 1
            if goes_on and places[ids[r - 1]] not in (ALONE, ENDS):
                words[-1].append(r)
            else:
                words.append([r])
        half = sum(map(len, words)) / 2
        yield [part for word in words for part in ([word] if len(word) <= half else zip(word))]
        start += length


@pytest.mark.parametrize("places", [PLACES, BY_ENDS, np.where(np.arange(V) % 2, PLACES, BY_ENDS)])
def test_whole_words_equal_a_slow_reference(places):
    lengths = [12, 3, 60, 2, 9, 128]
    ids, sizes = block(lengths, seed=5)
    words = np.random.Philox(key=np.array([9, (2 << 48) | 5], dtype=np.uint64)).random_raw(
        2 * len(ids)
    )
    unit = (words >> np.uint64(11)) * 2.0**-53
    expected, lens = [], []
    for sequence in whole_words(ids, lengths, places):
        wanted = max(1, int(0.15 * sum(map(len, sequence)) + 0.5))
        rows = []
        for word in sorted(sequence, key=lambda w: unit[w[0]]):
            if rows and abs(len(rows) + len(word) - wanted) > abs(len(rows) - wanted):
                break
            rows += word
        expected += sorted(rows)
        lens.append(len(rows))
    result = masked(ids, sizes, 2, 5, seed=9, unit="word", continues=places)
    assert flat_rows(result, sizes).tolist() == expected
    assert result.masked_counts.tolist() == lens
    assert result.labels.tolist() == ids[expected].tolist()
    assert np.array_equal(np.delete(result.input_ids, expected), np.delete(ids, expected))


def test_whole_words_are_as_many_tokens_on_average():
    ids, sizes = block([100] * 400, seed=1)
    result = masked(ids, sizes, unit="word", continues=PLACES)
    rows = set(flat_rows(result, sizes).tolist())
    words = [word for sequence in whole_words(ids, sizes) for word in sequence]
    assert all(len(rows & set(word)) in (0, len(word)) for word in words)
    assert len(rows) / np.isin(ids, SPECIAL, invert=True).sum() == pytest.approx(15 / 98, abs=0.003)
    # Long words are drawn as often as short ones.
    long = [set(word) <= rows for word in words if len(word) > 2]
    assert np.mean(long) == pytest.approx(15 / 98, abs=0.015)
    assert abs((result.input_ids[sorted(rows)] == MASK).mean() - 0.8) < 0.02


def test_a_text_of_one_word_is_masked_in_part():
    ids, sizes = block([40, 4, 3, 100], seed=3)
    ids[np.isin(ids, SPECIAL, invert=True)] = 9
    result = masked(ids, sizes, unit="word", continues=PLACES)
    assert result.masked_counts.tolist() == [6, 1, 1, 15]


def test_words_that_are_all_one_token_are_tokens():
    ids, sizes = block([50, 3, 128, 64], seed=2)
    alone = masked(ids, sizes, unit="word", continues=np.zeros(V))
    assert digest(alone) == digest(masked(ids, sizes))


def test_pure_in_any_order_and_process():
    shapes = [block(list(np.random.default_rng(i).integers(2, 40, 20)), seed=i) for i in range(6)]
    forward = [digest(masked(*s, block_index=i)) for i, s in enumerate(shapes)]
    backward = [digest(masked(*s, block_index=i)) for i, s in reversed(list(enumerate(shapes)))]
    assert forward == backward[::-1]
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from test_masking import *\n"
        "np.random.seed(1)\n"
        "rngs = [np.random.default_rng(i) for i in range(6)]\n"
        "shapes = [block(list(rng.integers(2, 40, 20)), seed=i) for i, rng in enumerate(rngs)]\n"
        "print(json.dumps([digest(masked(*s, block_index=i)) for i, s in enumerate(shapes)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{SRC}:{ROOT}", "PYTHONHASHSEED": "5"},
    )
    assert json.loads(done.stdout) == forward


def test_seed_round_and_block_each_change_the_mask():
    ids, lengths = block([40] * 30)
    base = digest(masked(ids, lengths))
    others = [
        masked(ids, lengths, seed=1),
        masked(ids, lengths, round_index=1),
        masked(ids, lengths, block_index=1),
        masked(ids, lengths, round_index=65535, block_index=2**48 - 1, seed=2**63 - 1),
    ]
    found = {base, *(digest(o) for o in others)}
    assert len(found) == 5


def test_the_input_is_left_alone():
    ids, lengths = block([20] * 10)
    before = ids.copy()
    ids.flags.writeable = False
    masked(ids, lengths)
    assert np.array_equal(ids, before)


def test_shares():
    ids, lengths = block([100] * 2000)
    result = masked(ids, lengths)
    rows = flat_rows(result, lengths)
    assert (result.masked_counts == 15).all()  # round(0.15 * 98)
    new = result.input_ids[rows]
    n = len(rows)
    masks = (new == MASK).mean()
    kept = (new == result.labels).mean()
    # 5 standard deviations; a random token equals the old one once in 195 times.
    for found, share in ((masks, 0.8), (kept, 0.1 + 0.1 / 195), (1 - masks - kept, 0.0995)):
        assert abs(found - share) < 5 * (share * (1 - share) / n) ** 0.5
    swapped = new[(new != MASK) & (new != result.labels)]
    frequencies = np.bincount(swapped, minlength=V)
    assert (frequencies[list(SPECIAL)] == 0).all()
    expected = len(swapped) / (V - len(SPECIAL))
    chi2 = ((frequencies[5:] - expected) ** 2 / expected).sum()
    assert abs(chi2 - 194) < 5 * (2 * 194) ** 0.5
    positions = np.bincount(result.masked_positions, minlength=100)[1:99]
    expected = n / 98
    assert abs(((positions - expected) ** 2 / expected).sum() - 97) < 5 * (2 * 97) ** 0.5


def test_other_shares_are_honoured():
    ids, lengths = block([100] * 500)
    result = masked(ids, lengths, mask=0.0, random=1.0, probability=0.5)
    assert (result.masked_counts == 49).all()
    assert not (result.input_ids == MASK).any()
    kept = masked(ids, lengths, mask=0.0, random=0.0)
    assert np.array_equal(kept.input_ids, ids)
    assert (kept.masked_counts == 15).all()


def test_smoothed_draws_with_the_named_weights():
    """One token per sequence: its id must follow max(count, 1)^-0.7 exactly."""
    counts = np.zeros(V, dtype=np.int64)
    counts[10:16] = [0, 1, 10, 100, 1000, 10000]
    row = np.array([2, 10, 11, 12, 13, 14, 15, 3], dtype=np.uint16)
    n = 40_000
    ids, lengths = np.tile(row, n), np.full(n, len(row))
    result = masked(ids, lengths, policy="smoothed", probability=0.01, counts=counts)
    assert (result.masked_counts == 1).all()
    found = np.bincount(result.labels, minlength=V)[10:16] / n
    weight = np.maximum(counts[10:16], 1.0) ** -0.7
    share = weight / weight.sum()
    assert (np.abs(found - share) < 5 * np.sqrt(share * (1 - share) / n)).all()
    sharper = masked(
        ids, lengths, policy="smoothed", probability=0.01, counts=counts, smoothing=0.0
    )
    even = np.bincount(sharper.labels, minlength=V)[10:16] / n
    assert (np.abs(even - 1 / 6) < 5 * (5 / 36 / n) ** 0.5).all()


def test_smoothed_needs_the_counts():
    ids, lengths = block([20])
    with pytest.raises(ValueError, match="count"):
        masked(ids, lengths, policy="smoothed")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=12),
    probability=st.floats(0.01, 0.99),
    policy=st.sampled_from(["uniform", "smoothed"]),
    seed=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_what_holds_for_every_block(lengths, probability, policy, seed, dtype):
    ids, sizes = block(lengths, seed=seed % 1000, dtype=dtype)
    counts = np.bincount(ids, minlength=V)
    result = masked(ids, sizes, probability=probability, policy=policy, seed=seed, counts=counts)
    rows = flat_rows(result, sizes)
    assert result.input_ids.dtype == result.labels.dtype == dtype
    assert result.masked_counts.dtype == result.masked_positions.dtype == np.uint16
    assert np.array_equal(result.labels, ids[rows])
    assert not np.isin(result.labels, SPECIAL).any()
    assert (np.diff(rows) > 0).all()
    ordinary = np.array([n - 2 for n in lengths])
    wanted = np.maximum(1, np.floor(probability * ordinary + 0.5)).clip(max=ordinary)
    assert np.array_equal(result.masked_counts, wanted)
    assert (result.masked_counts[ordinary > 0] >= 1).all()
    untouched = np.ones(len(ids), dtype=bool)
    untouched[rows] = False
    assert np.array_equal(result.input_ids[untouched], ids[untouched])
    assert (result.masked_positions < np.repeat(sizes, result.masked_counts)).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"policy": "whole"},
        {"probability": 0.0},
        {"probability": 1.0},
        {"mask": 0.9, "random": 0.2},
        {"mask": -0.1},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(UserError, match=f"masking: .*{next(iter(bad))}") as caught:
        MaskingConfig(**bad)
    assert "\n" not in str(caught.value)
