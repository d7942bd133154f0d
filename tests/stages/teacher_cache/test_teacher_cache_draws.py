"""Tokens that stage one draws: where they lie, what they correct, and the same in every build."""

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.joined import corrected_log_probs
from distilcache.data.codecs.logits import topk_log_probs, unpack
from distilcache.stages.teacher_cache.sparse import logit_signals
from distilcache.stages.teacher_cache.teacher import load_teacher
from tests.stages.teacher_cache.teacher_cache_support import (
    DRAWN,
    V,
    expected_signals,
    replayed_logits,
    rows_of,
)


def test_draws_lie_where_they_should(small_cache, small_teacher):
    """Tail draws outside the stored tokens; residual draws where the difference has their sign,
    each number of times within one of its expectation, with the mass of the live difference."""
    cache = Cache.open(small_cache(**DRAWN))
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    bias = cache.teacher.hidden_codec(3).bias_at(2.0)
    for number in range(0, cache.num_blocks, 2):
        block = cache.read_block(number)
        logits, _ = expected_signals(model, block, "masked+0.3", ())
        stored = unpack(block, 8, 2)
        p = (logits / 2).softmax(-1)
        replayed = ((replayed_logits(cache, block) + bias) / 2).double().softmax(-1)
        for n, kept in enumerate(stored.lengths):
            head = stored.ids[n, :kept].astype(np.int64)
            drawn = stored.tail_ids[n].astype(np.int64)
            assert not np.isin(drawn, head).any()
            assert (np.diff(drawn) >= 0).all()
            tail = p[n].clone()
            tail[head] = 0
            expected = 6 * tail / tail.sum()
            assert (np.abs(np.bincount(drawn, minlength=V) - expected.numpy()) < 1 + 1e-3).all()
            # Head-corrected: stored values on the head, replay's shares on the rest.
            q = replayed[n].clone()
            q[head] = 0
            outside = torch.from_numpy(np.array(-stored.log_odds[n, 1], np.float64)).sigmoid()
            q *= outside / q.sum()
            values = torch.from_numpy(stored.values[n, :kept]).double()
            q[head] = (values / 2).softmax(0) * (1 - outside)
            difference = (p[n] - q).numpy()
            mass = np.abs(difference).sum() / 2
            assert block["residual_mass"][n] == pytest.approx(mass, rel=2e-3, abs=1e-5)
            halves = block["residual_ids"].reshape(-1, 8)[n].reshape(2, 4).astype(np.int64)
            for sign, half in zip((1, -1), halves, strict=True):
                assert (np.diff(half) >= 0).all()
                expected = 4 * np.maximum(sign * difference, 0) / mass
                found = np.bincount(half, minlength=V)
                assert (np.abs(found - expected) < 1 + 0.02).all()


def test_residual_draws_correct_the_replay_on_average(small_cache, small_teacher):
    """The mean over many positions of what the draws add is the mean of what replay lacks."""
    cache = Cache.open(small_cache(**DRAWN))
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    wanted, drawn, count = torch.zeros(V).double(), torch.zeros(V).double(), 0
    bias = cache.teacher.hidden_codec(3).bias_at(2.0)
    for number in range(cache.num_blocks):
        block = cache.read_block(number)
        logits, _ = expected_signals(model, block, "masked+0.3", ())
        stored = unpack(block, 8, 2)
        log_p, log_tail = topk_log_probs(
            torch.from_numpy(stored.values), torch.from_numpy(stored.log_odds[:, 1]), 2.0
        )
        ids = torch.from_numpy(stored.ids.astype(np.int64))
        q = corrected_log_probs((replayed_logits(cache, block) + bias) / 2, ids, log_p, log_tail)
        wanted += ((logits / 2).softmax(-1) - q.double().exp()).sum(0)
        mass = torch.from_numpy(block["residual_mass"].astype(np.float64))
        halves = torch.from_numpy(block["residual_ids"].astype(np.int64)).reshape(-1, 2, 4)
        for sign, half in ((1, 0), (-1, 1)):
            share = (sign * mass / 4)[:, None].expand(-1, 4)
            drawn.scatter_add_(0, halves[:, half].flatten(), share.flatten())
        count += len(mass)
    # Each of some 5,000 draws moves its token by about 1e-2 / 4.
    assert float((drawn - wanted).abs().max()) < 0.25 * float(wanted.abs().max()) + 0.25


def test_residual_draws_are_of_float32_logits(small_cache, small_teacher):
    """Whatever type the teacher runs in: rounded to bfloat16, small differences would be noise."""
    cache = Cache.open(small_cache(**DRAWN))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=generator)
    tail, residual = (torch.rand(40, *shape, generator=generator) for shape in ((), (2,)))
    full, short = (
        logit_signals(
            load_teacher(str(small_teacher), torch.device("cpu"), dtype),
            hidden, cache.encoding, cache.teacher.hidden_codec(3), tail, residual, row_chunk=16,
        )
        for dtype in (torch.float32, torch.bfloat16)
    )  # fmt: skip
    assert {"residual_ids", "residual_mass"} <= full.keys() == short.keys()
    for name, values in full.items():
        assert torch.equal(short[name], values), name


def test_draws_are_the_same_in_every_build(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    first = small_cache(**DRAWN)
    second = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **DRAWN, row_chunk=2048)
    assert tree(first) == tree(second)


def test_rounds_with_draws_are_added_as_if_made_at_once(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    whole = small_cache(**DRAWN, rounds=2)
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **DRAWN)
    build_cache_in(out, small_corpus(), small_teacher, **DRAWN, rounds=2)
    assert tree(out) == tree(whole)


def test_rounds_and_blocks_have_draws_of_their_own(small_cache):
    """The same words would make the same errors again and again."""
    cache = Cache.open(small_cache(**DRAWN, rounds=2))
    blocks = len(cache.round_range(0))
    drawn, free = [], []
    for number in range(2 * blocks):
        block = cache.read_block(number)
        tokens = np.arange(len(block["input_ids"]))
        drawn.append(np.isin(tokens, rows_of(block, "masked+0.3", "hidden")))
        free.append(~np.isin(tokens, rows_of(block, "masked", "hidden")))

    def agreement(first, second):
        """Of two blocks' draws, at tokens that neither masks: 0.58 where they are independent."""
        size = min(len(drawn[first]), len(drawn[second]))
        both = free[first][:size] & free[second][:size]
        return (drawn[first][:size] == drawn[second][:size])[both].mean()

    rounds = [agreement(n, n + blocks) for n in range(blocks)]
    neighbours = [agreement(n, n + 1) for n in range(blocks - 1)]
    for found in (rounds, neighbours):
        assert abs(np.mean(found) - 0.58) < 0.08
