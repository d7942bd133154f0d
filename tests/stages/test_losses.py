"""The plain formulas against torch, and the fused head loss against the plain formulas."""

import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from data.codecs import replay
from stages.student_train.head_loss import head_loss
from stages.student_train.losses import (
    corrected_log_probs,
    cosine_distance,
    cross_entropy_sampled,
    kl_full,
    kl_replay,
    kl_sparse,
    masked_cross_entropy,
    squared_error,
)
from stages.student_train.targets import FullTarget, HeadTarget, ResidualTarget, SparseTarget

N, V, D, K, R = 7, 23, 3, 6, 4
INFINITY = float("inf")
RAGGED = (0, 1, 3, K, 2, 0, K)
"""Stored tokens per position: none, all K, and between."""


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(N, V, generator=generator, dtype=torch.float64)
    values[::2, 0] += 3 * scale  # Id 0 is stored in some rows: the one that padding shows.
    return values


def stored(teacher: torch.Tensor, temperature: float, lengths=(K,) * N) -> HeadTarget:
    """The largest logits of each row, padded as the loader pads, and exact masses at T."""
    values, ids = teacher.topk(max(lengths), dim=-1)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    log_probs = (teacher / temperature).log_softmax(-1)
    held = torch.zeros(N, V).scatter_add(1, ids, real.float()) > 0
    return HeadTarget(
        ids.masked_fill(~real, 0),
        values.masked_fill(~real, -INFINITY),
        log_probs.gather(1, ids).masked_fill(~real, -INFINITY),
        log_probs.masked_fill(held, -INFINITY).logsumexp(-1),
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
        (kl_full, (teacher, 2.0)),
        (kl_sparse, (*sparse, 2.0)),
        (cross_entropy_sampled, (*sparse, draws, 2.0)),
        (squared_error, (teacher,)),
        (cosine_distance, (teacher,)),
    ):
        single = torch.stack(
            [loss(student[n : n + 1], *(cut(a, n) for a in arguments)) for n in range(N)]
        )
        torch.testing.assert_close(loss(student, *arguments, weights), weights @ single)


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


LABELS = torch.tensor([1, -100, 3, 4, -100, 6, 7])


def _inputs(dtype=torch.float64):
    """The student's rows, decoder and bias; the teacher's."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, generator=generator, dtype=dtype, requires_grad=True)
    teacher = FullTarget(
        torch.randn(N, D + 2, generator=generator, dtype=dtype),
        torch.randn(V, D + 2, generator=generator, dtype=dtype),
        torch.randn(V, generator=generator, dtype=dtype),
    )
    return (rows, weight, bias), teacher


LENGTHS = {
    "": (K,) * N,
    "ragged": RAGGED,
    "all": (V,) * N,
    "all-ragged": (V, 0, V - 1, 1, V, 3, 2),
    "nothing": (0,) * N,
}
TARGETS = [
    "none",
    "full",
    "residual",
    *(f"{kind} {lengths}".strip() for kind in ("head", "sparse") for lengths in LENGTHS),
    "bias",
    "bias+head+residual ragged",
    "sampled",
    "sampled ragged",
    "sampled nothing",
]


def _target(name, teacher, temperature):
    """A target, its plain L_ce as a function of student logits and weights, teacher logits."""
    kind, _, lengths = name.partition(" ")
    replayed = teacher.rows_ND @ teacher.weight_VD.T + teacher.bias_V
    # What is stored comes from other logits than replay gives, or it could not correct them.
    true = replayed + 0.5 * logits(7, 1.0).to(replayed.dtype)
    true[[2, 4], 0] = replayed.max() + 1  # Padding has this id too.
    head = stored(true, temperature, LENGTHS[lengths])
    sparse = (head.ids_NK, head.log_p_NK, head.log_tail_N)
    draws = torch.arange(N * R).reshape(N, R).remainder(V)
    draws[:, 1] = draws[:, 0]  # Drawn with replacement.
    mass = torch.linspace(0.0, 0.3, N, dtype=replayed.dtype)
    if kind == "none":
        return None, lambda s, w: s.sum() * 0, s_zero
    if kind == "sparse":
        return SparseTarget(*sparse), lambda s, w: kl_sparse(s, *sparse, temperature, w), None
    if kind == "sampled":
        return (
            SparseTarget(*sparse, draws),
            lambda s, w: cross_entropy_sampled(s, *sparse, draws, temperature, w),
            None,
        )
    bias = torch.linspace(-1.0, 1.0, V, dtype=replayed.dtype) if "bias" in kind else None
    biased = replayed if bias is None else replayed + bias
    log_p = (biased / temperature).log_softmax(-1)
    if "head" in kind:
        log_p = corrected_log_probs(biased, *sparse, temperature)
        held = torch.zeros_like(replayed).scatter_add(1, head.ids_NK, sparse[1].exp()) > 0
        replayed = torch.where(held, true, replayed)
    residual = {"residual_ids_NR": draws, "residual_mass_N": mass} if "residual" in kind else {}
    target = FullTarget(
        teacher.rows_ND,
        teacher.weight_VD,
        teacher.bias_V,
        replay_bias_V=bias,
        head=head if "head" in kind else None,
        residual=ResidualTarget(draws, mass) if residual else None,
    )
    return (
        target,
        lambda s, w: kl_replay(s, log_p, temperature, weights_N=w, **residual),
        lambda s, w: squared_error(s, replayed, w),
    )


def s_zero(student, weights):
    return student.sum() * 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", TARGETS)
def test_head_loss_equals_plain_autograd(kind, temperature, with_labels, weighted):
    tensors, teacher = _inputs()
    target, plain_ce, plain_mse = _target(kind, teacher, temperature)
    weights = torch.linspace(0.5, 3.0, N, dtype=torch.float64) if weighted else None
    student = tensors[0] @ tensors[1].T + tensors[2]
    zero = student.sum() * 0
    mse_weight = 0.2 if plain_mse else 0.0
    expected = (
        plain_ce(student, weights),
        masked_cross_entropy(student, LABELS) if with_labels else zero,
        plain_mse(student, weights) if plain_mse else zero,
    )
    expected_total = 0.7 * expected[0] + 0.3 * expected[1] + mse_weight * expected[2]
    expected_grads = torch.autograd.grad(2 * expected_total, tensors)
    for row_chunk in (1, 3, N):
        total, *sums = head_loss(
            *tensors,
            target=target,
            labels_N=LABELS if with_labels else None,
            temperature=temperature,
            ce_weight=0.7,
            mlm_weight=0.3,
            mse_weight=mse_weight,
            row_weights_N=weights,
            row_chunk=row_chunk,
        )
        fused = torch.autograd.grad(2 * total, tensors)
        for got, plain in zip((total, *sums), (expected_total, *expected), strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-9, atol=1e-9)
        for got, plain in zip(fused, expected_grads, strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", TARGETS)
def test_head_loss_gradcheck(kind):
    tensors, teacher = _inputs()
    target, _, plain_mse = _target(kind, teacher, 2.0)

    def total(*args):
        return head_loss(
            *args,
            target=target,
            labels_N=LABELS,
            temperature=2.0,
            ce_weight=0.7,
            mlm_weight=0.3,
            mse_weight=0.2 if plain_mse else 0.0,
            row_weights_N=torch.linspace(0.5, 3.0, N, dtype=torch.float64),
            row_chunk=4,
        )[0]

    assert torch.autograd.gradcheck(total, tensors, fast_mode=True)


def test_a_term_of_weight_0_is_left_out():
    tensors, teacher = _inputs()
    _, ce, mlm, mse = head_loss(
        *tensors,
        target=teacher,
        labels_N=LABELS,
        temperature=2.0,
        ce_weight=0.0,
        mlm_weight=1.0,
        mse_weight=0.5,
        row_chunk=4,
    )
    assert ce == 0
    assert mlm > 0
    assert mse > 0


@pytest.mark.parametrize("kind", ["full", "head ragged", "sparse ragged", "sampled ragged"])
def test_head_loss_under_autocast_stays_near_float32(kind):
    tensors, teacher = _inputs(torch.float32)
    target, _, plain_mse = _target(kind, teacher, 2.0)

    def run():
        total, *sums = head_loss(
            *tensors,
            target=target,
            labels_N=LABELS,
            temperature=2.0,
            ce_weight=1.0,
            mlm_weight=1.0,
            mse_weight=0.1 if plain_mse else 0.0,
            row_chunk=4,
        )
        assert {total.dtype, *(s.dtype for s in sums)} == {torch.float32}
        return total, torch.autograd.grad(total, tensors)

    exact, exact_grads = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, rounded_grads = run()
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)
    for got, expected in zip(rounded_grads, exact_grads, strict=True):
        assert got.dtype == torch.float32
        assert functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.999


def test_head_loss_of_no_rows_is_zero():
    tensors, teacher = _inputs()
    empty = FullTarget(teacher.rows_ND[:0], teacher.weight_VD, teacher.bias_V)
    total, *_ = head_loss(
        tensors[0][:0],
        *tensors[1:],
        target=empty,
        labels_N=torch.zeros(0, dtype=torch.int64),
        temperature=2.0,
        ce_weight=1.0,
        mlm_weight=1.0,
        mse_weight=1.0,
        row_chunk=4,
    )
    total.backward()
    assert total == 0
    assert tensors[1].grad.abs().max() == 0


class Watch(TorchDispatchMode):
    """Largest tensor that any operation returns, and all operations by name."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "unique"}


@pytest.mark.parametrize("kind", TARGETS)
def test_memory_is_that_of_one_chunk_and_nothing_waits_for_the_device(kind):
    tensors, teacher = _inputs()
    target, _, plain_mse = _target(kind, teacher, 2.0)
    with Watch() as watch:
        total, *_ = head_loss(
            *tensors,
            target=target,
            labels_N=LABELS,
            temperature=2.0,
            ce_weight=1.0,
            mlm_weight=1.0,
            mse_weight=1.0 if plain_mse else 0.0,
            row_weights_N=torch.ones(N),
            row_chunk=2,
        )
        forward = set(watch.names)
        total.backward()
    chunk, decoders, rows = 2 * V, V * (D + 2), N * (D + 2)
    assert watch.largest <= max(chunk, decoders, rows) < N * V
    assert not forward & WAITS
    assert {"mm", "scatter_add_"} <= watch.names  # The watch sees what is done.
