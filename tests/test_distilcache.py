"""The Python API: caches as arrays, the teacher's words."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import distilcache
from distilcache import UserError, build_student, open_cache
from distilcache.data.cache.cache import Cache
from tests.command_line import SRC, environment

EXACT = {"hidden_dtype": "float32", "logits_dtype": "float32", "temperatures": (2.0,)}


@pytest.fixture(scope="module")
def cache(small_cache):
    return open_cache(small_cache(rounds=2))


@pytest.fixture(scope="module")
def exact(small_cache):
    return open_cache(small_cache(**EXACT))


@torch.no_grad()
def said_by(teacher: Path, block, temperature: float) -> torch.Tensor:
    """What the teacher itself says at the block's positions, by Hugging Face alone."""
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    logits = model(input_ids=block.input_ids, attention_mask=block.attention_mask).logits
    sequence, position = block.positions.T
    return (logits[sequence, position] / temperature).log_softmax(-1)


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, distilcache; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert Path(distilcache.__file__).resolve() == SRC / "distilcache" / "__init__.py"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = distilcache.no_such_name


def test_totals_and_provenance_are_those_of_the_manifest(cache):
    manifest = Cache.open(cache.path).manifest
    assert cache.totals == manifest.totals
    assert cache.provenance["identity"] == manifest.provenance["identity"]
    assert (len(cache), cache.rounds) == (manifest.totals["blocks"], 2)
    assert f"{manifest.totals['tokens']:,} tokens" in repr(cache)


def test_blocks_of_a_round_come_in_order(cache):
    numbers = [block.number for block in cache.blocks(round=1)]
    assert numbers == list(range(len(cache) // 2, len(cache)))
    assert [b.round for b in cache] == [0] * (len(cache) // 2) + [1] * (len(cache) // 2)
    assert sum(len(block) for block in cache) == cache.totals["sequences"]
    assert cache.block(-1).number == len(cache) - 1


@pytest.mark.parametrize("packing", ["blocks", "lines"])
def test_arrays_are_the_stored_columns_padded(small_cache, packing):
    opened = open_cache(small_cache(corpus={"packing": packing}))
    for number in range(len(opened)):
        stored = opened.cache.read_block(number)
        block = opened.block(number, as_="numpy")
        there = block.attention_mask > 0
        assert (there.sum(1) == stored["lengths"]).all()
        assert (block.input_ids[there] == stored["input_ids"]).all()
        assert (block.input_ids[~there] == opened.encoding.pad_id).all()
        masked = block.labels != -100
        assert (block.labels[masked] == stored["labels"]).all()
        assert (masked.sum(1) == stored["masked_counts"]).all()
        assert (np.argwhere(masked) == block.positions).all()


def test_numpy_and_torch_hold_the_same(cache):
    ours, theirs = cache.block(0), cache.block(0, as_="numpy")
    assert ours.keys() == theirs.keys()
    for name in ours.keys():  # noqa: SIM118
        assert isinstance(ours[name], torch.Tensor)
        assert isinstance(theirs[name], np.ndarray)
        assert np.array_equal(ours[name].numpy(), theirs[name])
    assert np.array_equal(ours.teacher_log_probs(2.0).numpy(), theirs.teacher_log_probs(2.0))
    assert isinstance(theirs.hidden_states(), np.ndarray)


def test_layers_are_named_as_in_the_recipe(cache, small_cache):
    """-1 is the last, in a recipe's ``hidden_layers`` and wherever Python asks for a layer."""
    block, last = cache.block(0), cache.encoding.num_layers
    assert cache.decoders[-1] is cache.decoders[last]
    assert torch.equal(cache.decoders[-1](block), block.hidden_states(-1))
    assert torch.equal(block.hidden_states(last), block.hidden_states())
    inner = open_cache(small_cache(hidden_layers=(1,), top_k=4))
    assert inner.decoders.keys() == {1}
    with pytest.raises(UserError, match=r"hidden_layers must hold layer -1, got \[1\]"):
        inner.block(0).hidden_states()


def test_text_is_what_the_tokenizer_reads(cache, small_teacher):
    tokenizer = AutoTokenizer.from_pretrained(small_teacher)
    block = cache.block(0)
    ids = block.input_ids[1].clone()
    assert tokenizer.mask_token in block.text(1)
    masked = block.labels[1] != -100
    ids[masked] = block.labels[1][masked]
    assert block.text(1, original=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_log_probs_are_the_teachers_own(exact, small_teacher, temperature):
    block = exact.block(0)
    own = said_by(small_teacher, block, temperature)
    torch.testing.assert_close(block.teacher_log_probs(temperature), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("top_k", [0, 8])
def test_coded_log_probs_are_near_the_teachers(small_cache, small_teacher, top_k, temperature):
    block = open_cache(small_cache(top_k=top_k)).block(0)
    own, replayed = said_by(small_teacher, block, temperature), block.teacher_log_probs(temperature)
    torch.testing.assert_close(replayed.exp().sum(-1), torch.ones(len(own)), atol=1e-4, rtol=0)
    kl = (own.exp() * (own - replayed)).sum(-1).mean()
    assert 0 < kl < 5e-3


@pytest.mark.parametrize("positions", ["all", "masked+0.3"])
def test_other_positions(small_cache, small_teacher, positions):
    settings = {**EXACT, "positions": positions, "logit_positions": "masked"}
    block = open_cache(small_cache(corpus={"packing": "lines"}, **settings)).block(0)
    assert len(block.positions) > len(block["labels"])
    own = said_by(small_teacher, block, 2.0)
    torch.testing.assert_close(block.teacher_log_probs(2.0), own, atol=1e-4, rtol=1e-4)


def test_rows_choose_some(cache):
    block = cache.block(0)
    every = block.teacher_log_probs(2.0)
    torch.testing.assert_close(block.teacher_log_probs(2.0, slice(3, 7)), every[3:7])
    torch.testing.assert_close(block.teacher_log_probs(2.0, [5, 1]), every[[5, 1]])
    assert block.top_tokens(rows=slice(2)) == block.top_tokens()[:2]


def test_top_tokens_name_the_likeliest(exact, small_teacher):
    block = exact.block(0)
    tokenizer = AutoTokenizer.from_pretrained(small_teacher)
    own = said_by(small_teacher, block, 1.0).exp().topk(3)
    for found, ids, shares in zip(block.top_tokens(3), own.indices, own.values, strict=True):
        assert [token for token, _ in found] == tokenizer.convert_ids_to_tokens(ids.tolist())
        assert [share for _, share in found] == pytest.approx(shares.tolist(), abs=1e-4)


def test_more_tokens_than_there_are_give_all(exact):
    row = exact.block(0).top_tokens(exact.encoding.vocab_size + 1, rows=slice(1))[0]
    assert len({token for token, _ in row}) == exact.encoding.vocab_size
    assert sum(share for _, share in row) == pytest.approx(1, abs=1e-4)


def test_a_cache_of_stored_logits_alone(small_cache, small_teacher):
    settings = {"hidden_dtype": "none", "logits_dtype": "float32", "temperatures": (2.0,)}
    block = open_cache(small_cache(**settings)).block(0)
    own = said_by(small_teacher, block, 2.0).exp().topk(2)
    found = block.top_tokens(2, temperature=2.0)
    shares = [[share for _, share in row] for row in found]
    np.testing.assert_allclose(shares, own.values.numpy(), atol=2e-3)
    with pytest.raises(UserError, match="top_tokens"):
        block.teacher_log_probs()
    with pytest.raises(UserError, match="1, 2"):
        block.top_tokens(temperature=3.0)


def test_a_cache_of_masks_alone(small_cache):
    block = open_cache(small_cache(mask_only=True)).block(0)
    assert (block.labels != -100).any()
    for call in (block.teacher_log_probs, block.top_tokens, lambda: block.positions):
        with pytest.raises(UserError, match="must hold a teacher's predictions"):
            call()


def test_batches_hold_every_sequence_once(cache):
    batches = cache.batches(batch_size=8, seed=3)
    found = sum(len(batches[k]["input_ids"]) for k in range(len(batches)))
    assert found == cache.totals["sequences"] // cache.rounds
    assert "logit_ids" in batches[0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: c.block(99_999), "block must be below"),
        (lambda c: c.block(0, as_="jax"), "'torch' or 'numpy', got 'jax'"),
        (lambda c: c.blocks(round=7), "round must be below 2, got 7"),
        (lambda c: c.block(0).teacher_log_probs(0), "temperature must be above 0"),
        (
            lambda c: c.block(0).top_tokens(temperature=0),
            "cache: temperature must be above 0, got 0",
        ),
        (lambda c: c.block(0).top_tokens(temperature=-1.0), "temperature must be above 0"),
        (lambda c: c.block(0).top_tokens(0), "cache: k must be at least 1, got 0"),
        (lambda c: c.batches(batch_size=0), "train: batch_size must be at least 1, got 0"),
        (lambda c: c.batches(window_blocks=0), "train: window_blocks must be at least 1, got 0"),
        (lambda c: c.batches(streams=-1), "train: streams must be at least 0, got -1"),
        (lambda c: c.batches(seed=-1), "train: seed must be at least 0, got -1"),
        (lambda c: build_student(c, (1, 32)), r"size must be text such as '6x768', got \(1, 32\)"),
        (lambda c: build_student(c.path, "1x32"), "cache must be a cache from open_cache, got"),
        (lambda c: build_student(c, "1x32", inti="random"), "did you mean 'init'"),
        (lambda c: open_cache(c.path / "nowhere"), "teacher-cache first"),
    ],
)
def test_bad_calls_are_one_line(cache, call, words):
    with pytest.raises(UserError, match=words) as error:
        call(cache)
    assert "\n" not in str(error.value)
