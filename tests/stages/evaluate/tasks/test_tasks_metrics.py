"""Metrics against the libraries' definitions and answers known beforehand; losses; spans."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from distilcache.data.errors import UserError
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, SCORE, SPAN, TASKS
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.metrics import majority, measure, normal, word_f1
from distilcache.stages.evaluate.tasks.spans import (
    LONGEST_ANSWER,
    Windows,
    best_answers,
    cut_contexts,
)
from distilcache.stages.evaluate.tasks.summary import summarise
from distilcache.stages.evaluate.tasks.task_losses import hard_loss, hide_padding, soft_loss
from distilcache.stages.evaluate.tasks.values import Answers

NO_MASK = torch.empty(0)
"""For losses that have no padding."""


def test_classification_against_counts():
    # As many right as wrong answers of each class would hide whose F1 it is.
    labels, said = [1, 1, 1, 0, 0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    hit, missed, false, right = 3, 1, 2, 4
    found = measure(TASKS["mrpc"], np.array(said), labels)
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["f1"] == pytest.approx(2 * hit / (2 * hit + missed + false))
    matthews = (hit * right - missed * false) / math.sqrt(5 * 4 * 6 * 5)
    found = measure(TASKS["cola"], np.array(said), labels)
    assert found == {"matthews": pytest.approx(matthews)}


def test_correlations_against_numpy():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=50)
    said = labels + rng.normal(size=50)
    found = measure(TASKS["stsb"], said, labels.tolist())
    assert found["pearson"] == pytest.approx(np.corrcoef(said, labels)[0, 1])
    ranks = [np.argsort(np.argsort(x)) for x in (said, labels)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert measure(TASKS["stsb"], np.ones(50), labels) == {"pearson": 0.0, "spearman": 0.0}


def test_answers_as_the_published_script_scores_them():
    # normal() and word_f1() follow the definitions of Rajpurkar et al. 2016.
    assert normal("The  Eiffel-Tower, a tower!") == "eiffeltower tower"
    assert word_f1("the cat sat", "cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert word_f1("dog", "cat") == 0
    labels = [Answers(("Ada Lovelace", "Lovelace"), (0, 4)), Answers(("1815",), (0,))]
    found = measure(TASKS["squad"], ["lovelace.", "in 1815"], labels)
    assert found["exact_match"] == pytest.approx(0.5)
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_majority():
    found = majority(TASKS["sst2"], [0, 0, 1], [0, 1, 1, 1])
    assert found == {"accuracy": 0.25}
    assert majority(TASKS["cola"], [0, 1, 1], [0, 1]) == {"matthews": 0.0}
    assert majority(TASKS["stsb"], [1.0], [2.0]) == {"pearson": 0.0, "spearman": 0.0}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.5, 8))
def test_soft_loss_is_the_kl_of_softened_distributions(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    p = torch.softmax(teacher / temperature, -1)
    q = torch.softmax(student / temperature, -1)
    wanted = temperature**2 * (p * (p / q).log()).sum(-1)
    found = soft_loss(CLASSES, student, teacher, temperature, NO_MASK)
    # The rounding of float32 is multiplied by T^2.
    room = 1e-5 * max(1.0, temperature**2 / 8)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-4, abs=room)
    assert soft_loss(CLASSES, teacher, teacher, temperature, NO_MASK).abs().max() < 1e-6


def test_losses_of_scores_and_spans():
    logits = torch.tensor([[1.0], [3.0]])
    assert hard_loss(SCORE, logits, torch.tensor([2.0, 3.0])).tolist() == [1, 0]
    assert soft_loss(SCORE, logits, logits + 2, 9.0, NO_MASK).tolist() == [4, 4]
    spans, mask = torch.randn(3, 2, 5), torch.ones(3, 5)
    mask[0, 3:] = 0
    hidden = hide_padding(spans, mask)
    labels = torch.tensor([[1, 2], [0, 4], [3, 3]])
    picked = torch.log_softmax(hidden, -1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(hard_loss(SPAN, hidden, labels), -picked.mean(1))
    # Padding has no part: other values there change nothing.
    other = torch.randn(3, 2, 5)
    changed = other.clone()
    changed[0, :, 3:] = 77
    first = soft_loss(SPAN, hidden, other, 2.0, mask)
    assert torch.isfinite(first).all()
    torch.testing.assert_close(soft_loss(SPAN, hidden, changed, 2.0, mask), first)


def test_the_best_span_is_that_of_an_exhaustive_search():
    rng = random.Random(0)
    context = " ".join(f"w{i}" for i in range(40))
    places = np.full((50, 2), -1, np.int32)
    at = 0
    for i, word in enumerate(context.split()):
        places[4 + i] = at, at + len(word)
        at += len(word) + 1
    for _ in range(20):
        logits = np.array([[rng.gauss(0, 1) for _ in range(50)] for _ in range(2)], np.float32)
        spans = [
            (logits[0, i] + logits[1, j], i, j)
            for i in range(4, 44)
            for j in range(i, min(i + LONGEST_ANSWER, 44))
        ]
        _, i, j = max(spans)
        pieces = Windows(np.array([0]), [places])
        found = best_answers(logits[None], pieces, [context])
        assert found == [" ".join(f"w{k - 4}" for k in range(i, j + 1))]


def test_an_answer_has_thirty_tokens_at_most():
    context = " ".join(["w"] * 40)
    places = np.array([[2 * i, 2 * i + 1] for i in range(40)], np.int32)
    logits = np.full((1, 2, 40), -9.0, np.float32)
    logits[0, 0, 0], logits[0, 1, 29], logits[0, 1, 30] = 5, 1, 2
    found = best_answers(logits, Windows(np.array([0]), [places]), [context])
    assert found == [" ".join(["w"] * 30)]


def test_windows_cover_the_whole_context(small_tokenizer):
    context = " ".join(f"amber {i}" for i in range(40))
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    split = Split((["cedar delta"], [context]), [Answers(("amber 0",), (0,))])
    seen = {
        at
        for places in cut_contexts(split, tokenizer, 24).windows.offsets
        for begin, end in places
        for at in range(begin, end)
    }
    # Versions of tokenizers before 0.23.3 stop soon after the first window.
    assert seen >= {at for at, letter in enumerate(context) if letter != " "}


def row(model, task, seed, score, **more):
    base = {"model": model, "role": "student", "distilled": False, "seconds": 1.0}
    return {**base, "task": task, "seed": seed, "score": score, "metrics": {"m": score}, **more}


def test_medians_macro_and_retention():
    results = [
        row("teacher", task, seed, score, role="teacher")
        for task, scores in {"rte": (0.6, 0.7, 0.5), "sst2": (0.9, 0.8, 0.9)}.items()
        for seed, score in enumerate(scores)
    ]
    results += [
        row("s", task, seed, score)
        for task, scores in {"rte": (0.5, 0.6, 0.57), "sst2": (0.8, 0.85, 0.81)}.items()
        for seed, score in enumerate(scores)
    ]
    speed = {"teacher": {"role": "teacher"}, "s": {"role": "student"}}
    facts = {"rte": {}, "sst2": {}}
    found = summarise(results, speed, tasks=facts, settings={}, machine={})
    teacher, student = found["models"]
    assert teacher["tasks"]["rte"]["score"] == 0.6
    assert teacher["macro"] == pytest.approx(0.75)
    assert student["macro"] == pytest.approx((0.57 + 0.81) / 2)
    assert student["retention"] == pytest.approx(0.69 / 0.75)
    assert student["tasks"]["rte"]["retention"] == pytest.approx(0.57 / 0.6)
    assert student["macro_low"] == pytest.approx(0.65)
    assert student["macro_high"] == pytest.approx(0.725)
    assert student["retention_high"] == pytest.approx(0.725 / 0.75)
    assert teacher["retention"] == 1
    alone = summarise(results[6:], speed, tasks=facts, settings={}, machine={})
    assert alone["models"][0]["retention"] is None


def test_the_macro_score_is_the_mean_of_the_medians():
    scores = {"rte": (0.2, 0.5, 0.9), "sst2": (0.1, 0.9, 0.2)}
    results = [
        {"model": "s", "distilled": False, "task": task, "seed": seed, "score": score,
         "metrics": {}, "seconds": 1.0}
        for task, found in scores.items() for seed, score in enumerate(found)
    ]  # fmt: skip
    facts = {task: {} for task in scores}
    found = summarise(results, {"s": {"role": "student"}}, tasks=facts, settings={}, machine={})
    (model,) = found["models"]
    # The means of the seeds are 0.15, 0.7 and 0.55.
    assert model["macro"] == pytest.approx((0.5 + 0.2) / 2)
    assert (model["macro_low"], model["macro_high"]) == pytest.approx((0.15, 0.7))


@pytest.mark.parametrize(
    ("field", "value"),
    [("names", ()), ("names", ("sst",)), ("names", ("rte", "rte")), ("seeds", ()), ("lr", 0.0),
     ("seeds", (1, 1)), ("seeds", (-1,)), ("limit", -1), ("batch_size", 0), ("max_length", 4),
     ("warmup", 1.5), ("distil_alpha", -0.1), ("distil_temperature", 0.0)],
)  # fmt: skip
def test_settings_out_of_range(field, value):
    with pytest.raises(UserError, match=f"tasks: {field} must") as caught:
        TasksConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_a_task_of_nearly_that_name():
    with pytest.raises(UserError, match="did you mean 'sst2'"):
        TasksConfig(names=("SST-2",))
