"""The plain formulas against torch."""

import math

import pytest
import torch
from torch.nn import functional

from distilcache.data.codecs import joined as replay
from distilcache.stages.student_train.losses import (
    corrected_log_probs,
    cosine_distance,
    cross_entropy_sampled,
    kl_full,
    kl_replay,
    kl_sparse,
    masked_cross_entropy,
    squared_error,
)
from distilcache.stages.student_train.targets import SparseTarget
from tests.stages.student_train.losses_support import (
    INFINITY,
    RAGGED,
    K,
    N,
    R,
    V,
    head_loss,
    logits,
    stored,
)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_full_equals_torch(temperature):
    student, teacher = logits(0), logits(1)
    expected = temperature**2 * functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).softmax(-1),
        reduction="sum",
    )
    torch.testing.assert_close(kl_full(student, teacher, temperature), expected)
    assert kl_full(teacher, teacher, temperature).abs() < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, K, V])
def test_kl_sparse_equals_kl_of_merged_distributions(temperature, k):
    student, teacher = logits(0), logits(1)
    head = stored(teacher, temperature, (k,) * N)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    p_head, q_head = p.gather(1, head.ids_NK), q.gather(1, head.ids_NK)
    merged_p = torch.cat([p_head, (1 - p_head.sum(-1, keepdim=True)).clamp(min=0)], -1)
    merged_q = torch.cat([q_head, 1 - q_head.sum(-1, keepdim=True)], -1)
    if k == V:
        merged_p, merged_q = p_head, q_head
    expected = temperature**2 * functional.kl_div(merged_q.log(), merged_p, reduction="sum")
    loss = kl_sparse(student, head.ids_NK, head.log_p_NK, head.log_tail_N, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    full = kl_full(student, teacher, temperature)
    if k == V:
        torch.testing.assert_close(loss, full)
    else:
        assert loss < full


def test_corrected_distribution_is_the_stored_one_where_stored_and_sums_to_one():
    true, replayed = logits(1), logits(1) + 0.3 * logits(2)
    head = stored(true, 2.0, RAGGED)
    log_p = corrected_log_probs(replayed, head.ids_NK, head.log_p_NK, head.log_tail_N, 2.0)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    real = head.log_p_NK > -INFINITY
    torch.testing.assert_close(log_p.gather(1, head.ids_NK)[real], head.log_p_NK[real])
    plain = (replayed / 2.0).log_softmax(-1)
    torch.testing.assert_close(log_p[0], plain[0])  # No stored token: plain replay.
    rest = torch.ones(V, dtype=torch.bool)
    rest[head.ids_NK[3]] = False
    shift = (log_p - plain)[3][rest]
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))  # One factor for all others.
    codec = replay.corrected_log_probs(replayed / 2.0, head.ids_NK, head.log_p_NK, head.log_tail_N)
    torch.testing.assert_close(log_p, codec)


def test_a_head_from_the_same_logits_changes_nothing():
    student, teacher = logits(0), logits(1)
    head = stored(teacher, 2.0, RAGGED)
    log_p = corrected_log_probs(teacher, head.ids_NK, head.log_p_NK, head.log_tail_N, 2.0)
    torch.testing.assert_close(kl_replay(student, log_p, 2.0), kl_full(student, teacher, 2.0))


def test_sampled_tail_is_the_full_divergence_up_to_a_constant():
    """R = 1: the mean over all tail tokens, each by its probability, is the expectation."""
    teacher = logits(1)
    head = stored(teacher, 2.0)
    p = (teacher / 2.0).softmax(-1)
    tail = p.scatter(1, head.ids_NK, 0.0)
    entropy = -4.0 * torch.xlogy(tail, tail).sum()
    for seed in (0, 3):
        student = logits(seed)
        expected = sum(
            cross_entropy_sampled(
                student,
                head.ids_NK,
                head.log_p_NK,
                head.log_tail_N,
                torch.full((N, 1), token),
                2.0,
                weights_N=tail[:, token] / tail.sum(-1),
            )
            for token in range(V)
        )
        torch.testing.assert_close(expected, kl_full(student, teacher, 2.0) + entropy)


def test_weights_multiply_rows():
    student, teacher = logits(0), logits(1)
    weights = torch.arange(N, dtype=torch.float64)
    head = stored(teacher, 2.0, RAGGED)
    sparse = (head.ids_NK, head.log_p_NK, head.log_tail_N)
    draws = torch.arange(N * R).reshape(N, R) % V
    for loss, arguments in (
        (kl_replay, (torch.log_softmax(teacher / 2.0, -1), 2.0)),
        (kl_sparse, (*sparse, 2.0)),
        (cross_entropy_sampled, (*sparse, draws, 2.0)),
        (squared_error, (teacher,)),
        (cosine_distance, (teacher,)),
    ):
        single = torch.stack(
            [loss(student[n : n + 1], *(cut(a, n) for a in arguments)) for n in range(N)]
        )
        torch.testing.assert_close(loss(student, *arguments, weights_N=weights), weights @ single)


def cut(argument, n):
    return argument[n : n + 1] if isinstance(argument, torch.Tensor) else argument


def test_tail_of_nothing_gives_no_nan():
    student = logits(0).requires_grad_()
    head = stored(logits(1), 2.0)
    nothing = torch.full((N,), -INFINITY, dtype=torch.float64)
    log_p = head.log_p_NK - head.log_p_NK.logsumexp(-1, keepdim=True)
    kl_sparse(student, head.ids_NK, log_p, nothing, 2.0).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("sampled", [False, True])
def test_tail_of_the_student_far_below_float_range_is_finite(sampled):
    student = torch.full((1, V), -400.0)
    student[0, :K] = 400.0
    ids = torch.arange(K)[None]
    log_p = torch.full((1, K), math.log(0.5 / K))
    tail = torch.tensor([math.log(0.5)])
    draws = torch.tensor([[K, V - 1]])
    rows = student.clone().requires_grad_()
    total, ce, *_ = head_loss(
        rows,
        torch.eye(V),
        torch.zeros(V),
        target=SparseTarget(ids, log_p, tail, draws if sampled else None),
        labels_N=None,
        temperature=1.0,
        ce_weight=1.0,
        mlm_weight=0.0,
        row_chunk=1,
    )
    total.backward()
    plain = (
        cross_entropy_sampled(student, ids, log_p, tail, draws, 1.0)
        if sampled
        else kl_sparse(student, ids, log_p, tail, 1.0)
    )
    torch.testing.assert_close(ce, plain)
    assert ce > 300
    assert rows.grad.isfinite().all()


def test_other_terms_equal_torch():
    student = logits(0)
    labels = torch.tensor([1, -100, 3, 4, -100, 6, 7])
    torch.testing.assert_close(
        masked_cross_entropy(student, labels),
        functional.cross_entropy(student[labels >= 0], labels[labels >= 0], reduction="sum"),
    )
    a, b = logits(2), logits(3)
    expected = torch.nn.CosineEmbeddingLoss(reduction="sum")(a, b, torch.ones(N))
    torch.testing.assert_close(cosine_distance(a, b), expected)
    torch.testing.assert_close(squared_error(a, b), torch.nn.MSELoss(reduction="sum")(a, b))
