"""The sampled vocabulary: what is drawn, that its sums are unbiased, and training over it."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distilcache.data.cache.cache import Cache
from distilcache.data.distribution import Distribution
from distilcache.stages.student_train import ranks, vocabulary
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.losses import (
    kl_full,
    masked_cross_entropy,
    over_sample,
)
from distilcache.stages.student_train.ranks import Ranks
from distilcache.stages.student_train.signals import count_positions
from distilcache.stages.student_train.vocabulary import (
    SampledVocabulary,
    TiedRows,
    sampled_vocabulary,
)
from tests.stages.student_train.model_support import VOCABULARY, make, same_over_a_sample
from tests.stages.student_train.trainer_support import cache, metrics, run, same, stopped_at  # noqa: F401

# ruff: noqa: F811
V, SIZE = 500, 120


@pytest.fixture
def small(monkeypatch):
    """Half of the tests' vocabulary of 72 tokens at each step."""
    monkeypatch.setattr(vocabulary, "LEAST", 24)
    return {"vocabulary_fraction": 0.5}


def weights(seed=0):
    """Of tokens whose frequencies differ by a factor of thousands, as those of texts do."""
    generator = np.random.default_rng(seed)
    return generator.permutation(1.0 / np.arange(1, V + 1) ** 1.3)


def batch(*named):
    return {"labels": torch.tensor(named), "logit_ids": torch.tensor([[3, 4]])}


def test_a_sample_holds_the_named_tokens_and_has_the_size_that_was_asked_for():
    draw = SampledVocabulary(weights(), SIZE, seed=5)
    found = [batch(7, 499), batch(0)]
    assert draw.apply(found, step=9) == SIZE
    ids, log_weight = found[0]["vocabulary"], found[0]["log_weight"]
    assert len(ids) == len(log_weight) == SIZE
    assert torch.equal(ids, ids.unique())  # ascending, each once
    assert ids[found[0]["labels"]].tolist() == [7, 499]
    assert ids[found[1]["labels"]].tolist() == [0]
    assert ids[found[0]["logit_ids"]].tolist() == [[3, 4]]
    assert (log_weight >= 0).all()
    for columns in found:
        for name in ("labels", "logit_ids"):
            assert (log_weight[columns[name]] == 0).all()
    assert torch.equal(found[1]["vocabulary"], ids)


def test_a_sample_is_a_function_of_seed_step_and_batch():
    def ids(seed=5, step=9, named=(7, 499)):
        found = batch(*named)
        SampledVocabulary(weights(), SIZE, seed).apply([found], step)
        return found["vocabulary"].tolist()

    assert ids() == ids()
    assert ids() != ids(seed=6)
    assert ids() != ids(step=10)
    assert ids() != ids(named=(7, 8, 9, 10, 499))


def test_all_ranks_draw_the_same_sample(monkeypatch):
    """Two ranks, here threads, with different batches; real gloo."""

    def all_reduce(tensor, op, group):
        options = dist.AllreduceOptions()
        options.reduceOp = op
        group.allreduce([tensor], options).wait()

    def draw(rank):
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        found = batch((7, 499)[rank])
        SampledVocabulary(weights(), SIZE, seed=5).apply([found], 9, Ranks(rank, 2, group))
        return found["vocabulary"], found["labels"]

    monkeypatch.setattr(ranks.dist, "all_reduce", all_reduce)
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        (ids, mine), (same_ids, theirs) = pool.map(draw, range(2))
    assert torch.equal(ids, same_ids)
    assert [ids[mine].item(), ids[theirs].item()] == [7, 499]


@pytest.mark.parametrize(("named", "size"), [(60, 120), (61, 180), (121, 240), (430, 500)])
def test_a_sample_grows_where_the_batches_name_more_than_half_of_it(named, size):
    draw = SampledVocabulary(weights(), SIZE, seed=0)
    found = {"labels": torch.arange(named)}
    assert draw.apply([found], 0) == size
    if size == V:  # the whole vocabulary: nothing is rewritten
        assert "vocabulary" not in found
        assert torch.equal(found["labels"], torch.arange(named))
    else:
        assert len(found["vocabulary"]) == size


def counts_of_draws(draw, pi, steps):
    """How often each token is drawn, [V]."""
    counts = np.zeros(V)
    for step in steps:
        ids = vocabulary._drawn(pi, draw._places(step))
        assert len(ids) == SIZE
        assert (np.diff(ids) > 0).all()
        counts[ids] += 1
    return counts


def test_every_token_is_drawn_with_its_probability():
    draw = SampledVocabulary(weights(), SIZE, seed=0)
    named = np.zeros(V, dtype=np.uint8)
    named[[3, 4, 499]] = 1
    pi = draw._inclusion(named, SIZE)
    assert pi.sum() == pytest.approx(SIZE)
    assert (pi[[3, 4, 499]] == 1).all()
    assert 0 < pi.min() < 0.05
    assert pi.max() == 1
    # In proportion to the weights, where they are not cut at 1.
    drawn = pi < 1
    assert np.ptp(pi[drawn] / weights()[drawn]) < 1e-9 * (pi[drawn] / weights()[drawn]).max()
    often = counts_of_draws(draw, pi, range(40_000)) / 40_000
    by_chance = np.sqrt(pi * (1 - pi) / 40_000)
    assert (abs(often - pi) <= 4 * by_chance).all()
    assert abs((often / pi)[drawn].mean() - 1) < 1e-3


def test_the_steps_at_which_a_token_is_drawn_are_spread_evenly():
    draw = SampledVocabulary(weights(), SIZE, seed=0)
    pi = draw._inclusion(np.zeros(V, dtype=np.uint8), SIZE)
    steps = 40
    off = counts_of_draws(draw, pi, range(steps)) - steps * pi
    by_chance = (steps * pi * (1 - pi)).mean()
    assert np.square(off).mean() < by_chance / 2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_gradient_over_many_draws_is_that_of_the_whole_vocabulary(temperature):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, V, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(5, V, generator=generator, dtype=torch.float64)
    labels = torch.tensor([1, 7, 7, 250, 499])
    mean = (teacher / temperature).softmax(-1).mean(0).numpy()

    def by_logits(loss):
        return torch.autograd.grad(loss, student)[0].flatten()

    whole = by_logits(
        kl_full(student, teacher, temperature) + masked_cross_entropy(student, labels)
    )
    draw = SampledVocabulary(0.9 * mean + 0.1 / V, 250, seed=1)
    found = []
    for step in range(400):
        columns = {"labels": labels}
        draw.apply([columns], step)
        sample = columns["vocabulary"], columns["log_weight"].double()
        loss = kl_full(
            over_sample(student, *sample, temperature),
            over_sample(teacher, *sample, temperature),
            temperature,
        )
        at_1 = over_sample(student, *sample, 1.0)
        found.append(by_logits(loss + masked_cross_entropy(at_1, columns["labels"])))
    draws = torch.stack(found)
    error = (draws.mean(0) - whole).norm()
    standard_error = draws.std(0).norm() / len(draws) ** 0.5
    single = (draws - whole).norm(dim=1).mean()
    assert error < 1.5 * standard_error
    assert error < 0.1 * single  # So it would show if weights were left out.
    assert single < whole.norm()


SIGNALS = {
    "replay": {},
    "replay+topk": {},
    "replay+residual": {"residual_samples": 4},
    "sparse": {"tail_samples": 4},
}


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_step_over_a_sample_is_the_step_over_all_tokens_with_weights(small, tiny_cache, signal):
    """Tokens outside the sample have weight 0: losses and gradients of all parameters agree."""
    folder = tiny_cache(hidden_dtype="float32", top_k=4, **SIGNALS[signal])
    alpha = 0.0 if signal == "sparse" else 0.1
    model, batches = make(folder, batch_size=2, signal=signal, alpha_mse=alpha, **small)
    assert model.vocabulary is not None
    assert model._tied is not None
    same_over_a_sample(model, batches)


def test_rows_of_a_tied_decoder_add_their_gradient_to_the_embedding():
    weight = torch.nn.Parameter(torch.randn(9, 3))
    tied, ids, inputs = TiedRows(weight), torch.tensor([1, 4, 8]), torch.tensor([4, 4, 2])
    factor = torch.randn(3, 3)
    found = []
    for rows in (tied.rows, lambda ids: weight.index_select(0, ids)):
        weight.grad = None
        for _ in range(2):  # two micro-batches
            (weight[inputs].square() @ rows(ids).T * factor).sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_gradients_of_rows_are_added_in_either_order():
    weight = torch.nn.Parameter(torch.randn(9, 3))
    tied = TiedRows(weight)
    for embedding_first in (True, False):
        weight.grad = None
        if embedding_first:
            later = weight[[2, 1]].sum()
            (3 * tied.rows(torch.tensor([1, 4])).sum() + later).backward()
        else:
            earlier = 3 * tied.rows(torch.tensor([1, 4])).sum()
            (weight[[2, 1]].sum() + earlier).backward()
        expected = torch.zeros(9, 3)
        expected[[1, 2, 4]] = torch.tensor([4.0, 1.0, 3.0])[:, None]
        assert torch.equal(weight.grad, expected)


def test_small_vocabularies_and_the_fraction_1_take_all_tokens(tiny_cache):
    cache = Cache.open(tiny_cache())
    assert sampled_vocabulary(cache, VOCABULARY, TrainConfig()) is None
    assert sampled_vocabulary(cache, 8191, TrainConfig()) is None
    assert sampled_vocabulary(cache, 30_522, TrainConfig(vocabulary_fraction=1.0)) is None


def test_without_logits_there_is_no_vocabulary_to_sample(small, tiny_cache):
    states_alone = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 1.0}
    train = TrainConfig(**small, **states_alone)
    assert sampled_vocabulary(Cache.open(tiny_cache()), VOCABULARY, train) is None


@pytest.mark.parametrize("stored", [{}, {"hidden_dtype": "none", "top_k": 4}, {"mask_only": True}])
def test_likely_tokens_are_drawn_more_often(small, tiny_cache, stored):
    cache = Cache.open(tiny_cache(**stored))
    made = sampled_vocabulary(cache, VOCABULARY, TrainConfig(**small))
    counts = np.bincount(cache.read_block(0)["input_ids"], minlength=VOCABULARY)
    assert made.size == VOCABULARY // 2
    assert (made._weights_V > 0).all()
    if stored:
        usual, rare = counts.argmax(), counts.argmin()
        assert made._weights_V[usual] > made._weights_V[rare]
    assert made._weights_V.sum() == pytest.approx(1.0)


def test_the_teachers_mean_takes_a_few_positions_at_a_time(tiny_cache, monkeypatch):
    """Of all at once the logits would be gigabytes."""
    found, replayed = [], Distribution.replayed

    def kept(self, hidden):
        found.append(replayed(self, hidden))
        return found[-1]

    monkeypatch.setattr(Distribution, "replayed", kept)
    monkeypatch.setattr(vocabulary, "AT_ONCE", 10, raising=False)
    cache = Cache.open(tiny_cache())
    mean = vocabulary._mean_distribution(cache, VOCABULARY, 2.0)
    logits = torch.cat(found).double().numpy()
    assert len(logits) == len(cache.read_block(0)["labels"])
    assert max(map(len, found)) == 10 < len(logits)
    powers = [np.exp(logits / t) for t in (1.0, 2.0)]
    wanted = np.mean([power / power.sum(1, keepdims=True) for power in powers], (0, 1))
    np.testing.assert_allclose(mean, wanted, rtol=1e-5)


def test_an_interrupted_run_draws_the_samples_of_an_uninterrupted_one(
    small, cache, tmp_path, monkeypatch
):
    few = {**small, "steps": 7, "signal": "replay", "batch_size": 2, "accumulation": 1}
    run(cache, tmp_path / "whole", **few)
    with stopped_at(5, monkeypatch):
        run(cache, tmp_path / "cut", **few)
    run(cache, tmp_path / "cut", **few)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert metrics(tmp_path / "whole")[-1]["vocabulary"] == VOCABULARY // 2
    everything = {**few, "vocabulary_fraction": 1.0}
    run(cache, tmp_path / "all", **everything)
    assert not same(tmp_path / "whole", tmp_path / "all")
    assert "vocabulary" not in metrics(tmp_path / "all")[-1]


def test_frozen_embeddings_are_left_alone(tiny_cache, monkeypatch):
    monkeypatch.setattr(vocabulary, "LEAST", 16)
    model, data = make(tiny_cache(), vocabulary_fraction=0.5)
    words = model.student.get_input_embeddings().weight.requires_grad_(False)
    batch = dict(data[0])
    model.vocabulary.apply([batch], 0)
    assert "vocabulary" in batch
    loss, _ = model(batch, count_positions(batch))
    loss.backward()
    assert words.grad is None
