"""Targets chunk by chunk: draws are right in expectation, padding leaves no trace."""

from dataclasses import replace

import pytest
import torch

from distilcache.data.codecs.draws import residual_draws, systematic
from distilcache.stages.student_train.targets import (
    FullTarget,
    ResidualTarget,
    SparseTarget,
    TopkTarget,
    kl_full_rows,
    kl_sparse_rows,
    replayed_logits,
    squared_error_rows,
)

V, K, T = 11, 3, 2.0
INFINITY = float("inf")


def one(seed: int) -> torch.Tensor:
    """Logits of one position."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(1, V, generator=generator, dtype=torch.float64)


STUDENT, TRUE, REPLAYED = one(0), one(1), one(1) + 0.7 * one(2)


def full(replayed, **parts):
    """A target whose decoder is the identity."""
    eye, bias = torch.eye(V, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    return FullTarget(replayed, eye, bias, **parts)


def head_of(true, rows, k=K):
    values, ids = true.topk(k, dim=-1)
    log_p = (true / T).log_softmax(-1)
    tail = log_p.scatter(1, ids, -INFINITY).logsumexp(-1)
    one_row = TopkTarget(ids, values, log_p.gather(1, ids), tail)
    return TopkTarget(
        *(
            getattr(one_row, name).expand(rows, *getattr(one_row, name).shape[1:]).contiguous()
            for name in ("ids_NK", "values_NK", "log_p_NK", "log_tail_N")
        )
    )


def replay(target, part):
    """The teacher's raw logits at some rows."""
    return replayed_logits(target, target.products(part, torch.float64), torch.float64)


def replayed_log_probs(with_head):
    """p_hat of the one position, as stage one works it out."""
    target = full(REPLAYED, topk=head_of(TRUE, 1) if with_head else None)
    logits = replay(target, slice(0, 1))
    zeros = torch.zeros(1, V, dtype=torch.float64)
    _, gradient = kl_full_rows(zeros, logits, target, slice(0, 1), T)
    return (1 / V - gradient).log()  # The gradient is q - p_hat.


def run_full(rows, residual, with_head):
    """Loss and gradient of the same position, once for each row of draws."""
    target = full(
        REPLAYED.expand(rows, V).clone(),
        topk=head_of(TRUE, rows) if with_head else None,
        residual=residual,
    )
    everything = slice(0, rows)
    teacher = replay(target, everything)
    return kl_full_rows((STUDENT / T).expand(rows, V).clone(), teacher, target, everything, T)


def exact(log_p_hat):
    """Expected loss, KL(p || q) - KL(p || p_hat), and its gradient q - p, without T^2."""
    log_p, log_q = (TRUE / T).log_softmax(-1), (STUDENT / T).log_softmax(-1)
    return (log_p.exp() * (log_p_hat - log_q)).sum(), log_q.exp() - log_p.exp()


@pytest.mark.parametrize("with_head", [False, True])
def test_residual_draws_give_the_exact_gradient_in_expectation(with_head):
    """R = 2, every pair of a positive and a negative token weighted by its probability."""
    log_p_hat = replayed_log_probs(with_head)
    difference = (TRUE / T).softmax(-1) - log_p_hat.exp()
    positive, negative = difference.clamp(min=0)[0], (-difference).clamp(min=0)[0]
    mass = positive.sum()
    torch.testing.assert_close(negative.sum(), mass)
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    chance = positive[pairs[:, 0]] * negative[pairs[:, 1]] / mass**2
    loss, gradient = run_full(len(pairs), ResidualTarget(pairs, mass.expand(len(pairs))), with_head)
    expected_loss, expected_gradient = exact(log_p_hat)
    torch.testing.assert_close(chance @ loss, expected_loss)
    torch.testing.assert_close(chance[None] @ gradient, expected_gradient)
    _, without = run_full(1, None, with_head)
    assert (without - expected_gradient).norm() > 1e-2  # There was something to put right.


@pytest.mark.parametrize("with_head", [False, True])
def test_residual_draws_of_the_codec_do_so_too(with_head):
    """One u for each row, in equal steps: the mean is the integral up to a step."""
    steps, samples = 4000, 6
    log_p_hat = replayed_log_probs(with_head)
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    ids, mass = residual_draws(
        (TRUE / T).log_softmax(-1).expand(steps, V),
        log_p_hat.expand(steps, V),
        samples,
        torch.stack([u, u.flip(0)], -1),
    )
    loss, gradient = run_full(steps, ResidualTarget(ids, mass), with_head)
    expected_loss, expected_gradient = exact(log_p_hat)
    torch.testing.assert_close(loss.mean(), expected_loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradient.mean(0)[None], expected_gradient, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("k", [0, K])
def test_tail_draws_of_the_codec_give_the_exact_gradient_in_expectation(k):
    steps, samples = 4000, 5
    head = head_of(TRUE, steps, k)
    tail = (TRUE / T).softmax(-1).scatter(1, head.ids_NK[:1], 0.0)
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    draws = systematic(tail.expand(steps, V), samples, u)
    target = SparseTarget(head.ids_NK, head.log_p_NK, head.log_tail_N, draws)
    scaled = (STUDENT / T).expand(steps, V).clone()
    _, gradient = kl_sparse_rows(scaled, target, slice(0, steps))
    _, expected = exact(torch.zeros(1, V))
    torch.testing.assert_close(gradient.mean(0)[None], expected, rtol=1e-3, atol=3e-4)


def padded(seed, rows=8):
    """Rows of 0 to K stored tokens, and the same with other ids in the padding."""
    generator = torch.Generator().manual_seed(seed)
    true = 2.0 * torch.randn(rows, V, generator=generator, dtype=torch.float64)
    values, ids = true.topk(K, dim=-1)
    padding = torch.arange(K) >= (torch.arange(rows) % (K + 1))[:, None]
    values = values.masked_fill(padding, -INFINITY)
    log_p = (true / T).log_softmax(-1).gather(1, ids).masked_fill(padding, -INFINITY)
    tail = (1 - log_p.exp().sum(-1)).log()
    # Padded with the row's own largest token: the worst collision.
    collided = ids.masked_scatter(padding, ids[:, :1].expand(rows, K)[padding])
    other = torch.randint(V, (rows, K), generator=generator)
    return [
        TopkTarget(torch.where(padding, filler, ids), values, log_p, tail)
        for filler in (torch.zeros_like(ids), collided, other)
    ]


@pytest.mark.parametrize("kind", ["head", "sparse", "sampled"])
def test_ids_of_padding_leave_no_trace(kind):
    rows = 8
    generator = torch.Generator().manual_seed(9)
    student, replayed = torch.randn(2, rows, V, generator=generator, dtype=torch.float64)
    draws = torch.randint(V, (rows, 4), generator=generator)
    results = []
    for head in padded(3, rows):
        if kind == "head":
            target = full(replayed, topk=head)
            teacher = replay(target, slice(0, rows))
            errors = squared_error_rows(student, teacher, target, slice(0, rows))
            divergence = kl_full_rows(student.clone(), teacher, target, slice(0, rows), T)
            results.append((*errors, *divergence))
        else:
            target = SparseTarget(
                head.ids_NK, head.log_p_NK, head.log_tail_N, draws if kind == "sampled" else None
            )
            results.append(kl_sparse_rows(student.clone(), target, slice(0, rows)))
    for others in results[1:]:
        for first, other in zip(results[0], others, strict=True):
            assert first.isfinite().all()
            # Sums over K may differ in their last bit: a padded term is -0 or 0 times another.
            torch.testing.assert_close(first, other, rtol=1e-14, atol=1e-14)


def test_stored_logits_take_their_places():
    head = padded(4)[1]
    replayed = torch.zeros(8, V, dtype=torch.float64)
    target, part = full(replayed, topk=head), slice(2, 8)
    zeros = torch.zeros(6, V, dtype=torch.float64)
    _, gradient = squared_error_rows(zeros, replay(target, part), target, part)
    for row, ids, values in zip(gradient / -2, head.ids_NK[2:], head.values_NK[2:], strict=True):
        real = values > -INFINITY
        assert torch.equal(row[ids[real]], values[real])
        assert int((row != 0).sum()) == int(real.sum())
    assert replayed.abs().max() == 0


def test_no_mass_outside_the_stored_tokens():
    """A tail that underflowed (log odds +inf) gives finite losses and gradients."""
    head = head_of(TRUE, 1)
    certain = replace(
        head,
        log_p_NK=head.log_p_NK - head.log_p_NK.logsumexp(-1, keepdim=True),
        log_tail_N=torch.full((1,), -INFINITY, dtype=torch.float64),
    )
    one_row = slice(0, 1)
    target = full(REPLAYED, topk=certain)
    teacher = replay(target, one_row)
    draws = torch.zeros(1, 4, dtype=torch.int64)
    sparse = (certain.ids_NK, certain.log_p_NK, certain.log_tail_N)
    results = [
        kl_full_rows(STUDENT / T, teacher, target, one_row, T),
        kl_sparse_rows(STUDENT / T, SparseTarget(*sparse), one_row),
        kl_sparse_rows(STUDENT / T, SparseTarget(*sparse, draws), one_row),
    ]
    log_q = (STUDENT / T).log_softmax(-1)
    p = torch.zeros(1, V, dtype=torch.float64).scatter(1, certain.ids_NK, certain.log_p_NK.exp())
    expected = (torch.xlogy(p, p) - p * log_q).sum(-1), log_q.exp() - p
    for result in results:
        torch.testing.assert_close(result, expected)
