"""The losses against dense formulas, and the fused head loss against both."""

import math

import pytest
import torch
from torch.nn import functional

from stages.student_train.head_loss import FullTarget, SparseTarget, head_loss
from stages.student_train.losses import (
    cosine_distance,
    kl_full,
    kl_sparse,
    masked_cross_entropy,
    sparse_log_probs,
)

N, V, D, K = 7, 23, 5, 6


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, V, generator=generator, dtype=torch.float64)


def sparse(teacher: torch.Tensor, temperature: float, k: int = K):
    """Columns as a cache holds them: largest logits, logsumexp and tail at T."""
    values, ids = teacher.topk(k, dim=-1)
    scaled = teacher / temperature
    rest = scaled.scatter(1, ids, float("-inf"))
    lse = scaled.logsumexp(-1)
    return ids, *sparse_log_probs(values, lse, rest.logsumexp(-1) - lse, temperature)


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
    ids, log_p, log_tail = sparse(teacher, temperature, k)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    p_head, q_head = p.gather(1, ids), q.gather(1, ids)
    merged_p = torch.cat([p_head, (1 - p_head.sum(-1, keepdim=True)).clamp(min=0)], -1)
    merged_q = torch.cat([q_head, 1 - q_head.sum(-1, keepdim=True)], -1)
    if k == V:
        merged_p, merged_q = p_head, q_head
    expected = temperature**2 * functional.kl_div(merged_q.log(), merged_p, reduction="sum")
    loss = kl_sparse(student, ids, log_p, log_tail, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    full = kl_full(student, teacher, temperature)
    if k == V:
        torch.testing.assert_close(loss, full)
    else:
        assert loss < full


def test_sparse_log_probs_renormalise_rounded_values():
    teacher = logits(1)
    values, ids = teacher.topk(K, dim=-1)
    lse = teacher.logsumexp(-1)
    tail = teacher.scatter(1, ids, float("-inf")).logsumexp(-1) - lse
    log_p, log_tail = sparse_log_probs(values.half().double(), lse, tail, 1.0)
    torch.testing.assert_close(
        log_p.exp().sum(-1) + log_tail.exp(), torch.ones(N, dtype=torch.float64)
    )


def test_tail_of_nothing_gives_no_nan():
    student = logits(0).requires_grad_()
    ids, log_p, _ = sparse(logits(1), 2.0)
    nothing = torch.full((N,), float("-inf"), dtype=torch.float64)
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    kl_sparse(student, ids, log_p, nothing, 2.0).backward()
    assert student.grad.isfinite().all()


def test_tail_of_the_student_far_below_float_range_is_finite():
    student = torch.full((1, V), -400.0)
    student[0, :K] = 400.0
    ids = torch.arange(K)[None]
    log_p = torch.full((1, K), math.log(0.5 / K))
    tail = torch.tensor([math.log(0.5)])
    rows = student.clone().requires_grad_()
    total, ce, _ = head_loss(
        rows,
        torch.eye(V),
        torch.zeros(V),
        target=SparseTarget(ids, log_p, tail),
        labels_N=None,
        temperature=1.0,
        ce_weight=1.0,
        mlm_weight=0.0,
        row_chunk=1,
    )
    total.backward()
    torch.testing.assert_close(ce, kl_sparse(student, ids, log_p, tail, 1.0))
    assert ce > 300
    assert rows.grad.isfinite().all()


def test_masked_cross_entropy_and_cosine_equal_torch():
    student = logits(0)
    labels = torch.tensor([1, -100, 3, 4, -100, 6, 7])
    torch.testing.assert_close(
        masked_cross_entropy(student, labels),
        functional.cross_entropy(student[labels >= 0], labels[labels >= 0], reduction="sum"),
    )
    a, b = logits(2), logits(3)
    expected = torch.nn.CosineEmbeddingLoss(reduction="sum")(a, b, torch.ones(N))
    torch.testing.assert_close(cosine_distance(a, b), expected)


def _inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.tensor([1, -100, 3, 4, -100, 6, 7])
    teacher = FullTarget(
        torch.randn(N, D + 2, generator=generator, dtype=dtype),
        torch.randn(V, D + 2, generator=generator, dtype=dtype),
        torch.randn(V, generator=generator, dtype=dtype),
    )
    return (rows, weight, bias), labels, teacher


TARGETS = ["full", "sparse", "sparse-all", "none"]


def _target(kind, teacher, temperature):
    teacher_logits = teacher.rows_ND @ teacher.weight_VD.T + teacher.bias_V
    if kind == "full":
        return teacher, lambda s: kl_full(s, teacher_logits, temperature)
    if kind == "none":
        return None, lambda s: s.sum() * 0
    ids, log_p, tail = sparse(teacher_logits, temperature, K if kind == "sparse" else V)
    return SparseTarget(ids, log_p, tail), lambda s: kl_sparse(s, ids, log_p, tail, temperature)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_head_loss_equals_plain_autograd(kind, with_labels, temperature):
    tensors, labels, teacher = _inputs()
    target, plain_ce = _target(kind, teacher, temperature)
    arguments = {
        "target": target,
        "labels_N": labels if with_labels else None,
        "temperature": temperature,
        "ce_weight": 0.7,
        "mlm_weight": 0.3,
    }
    total, ce, mlm = head_loss(*tensors, **arguments, row_chunk=3)
    fused = torch.autograd.grad(2 * total, tensors)
    rows, weight, bias = tensors
    student = rows @ weight.T + bias
    expected_ce = plain_ce(student)
    expected_mlm = masked_cross_entropy(student, labels) if with_labels else student.sum() * 0
    expected_total = 0.7 * expected_ce + 0.3 * expected_mlm
    for got, expected in zip(
        (total, ce, mlm), (expected_total, expected_ce, expected_mlm), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    for got, expected in zip(fused, torch.autograd.grad(2 * expected_total, tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", TARGETS)
def test_head_loss_gradcheck(kind):
    tensors, labels, teacher = _inputs()
    target, _ = _target(kind, teacher, 2.0)

    def total(*args):
        return head_loss(
            *args,
            target=target,
            labels_N=labels,
            temperature=2.0,
            ce_weight=0.7,
            mlm_weight=0.3,
            row_chunk=4,
        )[0]

    assert torch.autograd.gradcheck(total, tensors, fast_mode=True)


def test_head_loss_under_autocast_stays_near_float32():
    tensors, labels, teacher = _inputs(torch.float32)

    def run():
        total, ce, mlm = head_loss(
            *tensors,
            target=teacher,
            labels_N=labels,
            temperature=2.0,
            ce_weight=1.0,
            mlm_weight=1.0,
            row_chunk=4,
        )
        assert total.dtype == ce.dtype == mlm.dtype == torch.float32
        return total, torch.autograd.grad(total, tensors)

    exact, exact_grads = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, rounded_grads = run()
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)
    for got, expected in zip(rounded_grads, exact_grads, strict=True):
        assert got.dtype == torch.float32
        assert functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.999


def test_head_loss_of_no_rows_is_zero():
    tensors, _, teacher = _inputs()
    empty = FullTarget(teacher.rows_ND[:0], teacher.weight_VD, teacher.bias_V)
    total, _, _ = head_loss(
        tensors[0][:0],
        *tensors[1:],
        target=empty,
        labels_N=torch.zeros(0, dtype=torch.int64),
        temperature=2.0,
        ce_weight=1.0,
        mlm_weight=1.0,
        row_chunk=4,
    )
    total.backward()
    assert total == 0
    assert tensors[1].grad.abs().max() == 0


def test_memory_of_one_chunk(monkeypatch):
    """No intermediate of the loss is larger than row_chunk x V or the decoder itself."""
    sizes = []
    original = torch.log_softmax

    def spy(tensor, *args, **kwargs):
        sizes.append(tensor.shape[0])
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch, "log_softmax", spy)
    tensors, labels, teacher = _inputs()
    head_loss(
        *tensors,
        target=teacher,
        labels_N=labels,
        temperature=2.0,
        ce_weight=1.0,
        mlm_weight=1.0,
        row_chunk=2,
    )
    assert sizes
    assert max(sizes) == 2
