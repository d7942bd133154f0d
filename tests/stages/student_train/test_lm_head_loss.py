"""The fused head loss against the plain formulas: values, gradients, memory."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from distilcache.stages.student_train import lm_head_loss
from distilcache.stages.student_train.losses import (
    corrected_log_probs,
    cross_entropy_sampled,
    kl_replay,
    kl_sparse,
    masked_cross_entropy,
    squared_error,
)
from distilcache.stages.student_train.targets import FullTarget, ResidualTarget, SparseTarget
from tests.stages.student_train.losses_support import (
    RAGGED,
    D,
    K,
    N,
    R,
    V,
    head_loss,
    logits,
    stored,
)

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


def _target(name, teacher, temperature, log_weight=None):
    """A target, its plain L_ce and L_mse as functions of student logits and weights.

    With ``log_weight`` the tokens are a sample of a vocabulary.
    """
    offset = 0 if log_weight is None else temperature * log_weight
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
        return (
            SparseTarget(*sparse),
            lambda s, w: kl_sparse(s + offset, *sparse, temperature, w),
            None,
        )
    if kind == "sampled":
        return (
            SparseTarget(*sparse, draws),
            lambda s, w: cross_entropy_sampled(s + offset, *sparse, draws, temperature, w),
            None,
        )
    bias = torch.linspace(-1.0, 1.0, V, dtype=replayed.dtype) if "bias" in kind else None
    biased = replayed if bias is None else replayed + bias
    log_p = ((biased + offset) / temperature).log_softmax(-1)
    if "head" in kind:
        log_p = corrected_log_probs(biased + offset, *sparse, temperature)
        held = torch.zeros_like(replayed).scatter_add(1, head.ids_NK, sparse[1].exp()) > 0
        replayed = torch.where(held, true, replayed)
    residual = {"residual_ids_NR": draws, "residual_mass_N": mass} if "residual" in kind else {}
    root = 1 if log_weight is None else (log_weight / 2).exp()
    target = FullTarget(
        teacher.rows_ND,
        teacher.weight_VD,
        teacher.bias_V,
        replay_bias_V=bias,
        topk=head if "head" in kind else None,
        residual=ResidualTarget(draws, mass) if residual else None,
    )
    return (
        target,
        lambda s, w: kl_replay(s + offset, log_p, temperature, weights_N=w, **residual),
        lambda s, w: squared_error(root * s, root * replayed, w),
    )


def s_zero(student, weights):
    return student.sum() * 0


def loss_of(*tensors, **terms):
    """The loss and its terms; what is not said is usual."""
    usual = {"labels_N": LABELS, "temperature": 2.0, "ce_weight": 1.0, "mlm_weight": 1.0}
    return head_loss(*tensors, **{**usual, "row_chunk": 4, **terms})


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", TARGETS)
def test_lm_head_loss_equals_plain_autograd(
    kind, temperature, with_labels, weighted, sampled, monkeypatch
):
    monkeypatch.setattr(lm_head_loss, "CPU_LOGITS", 2 * V)  # several blocks in a chunk
    tensors, teacher = _inputs()
    log_weight = torch.linspace(0.0, 3.0, V, dtype=torch.float64) if sampled else None
    target, plain_ce, plain_mse = _target(kind, teacher, temperature, log_weight)
    weights = torch.linspace(0.5, 3.0, N, dtype=torch.float64) if weighted else None
    student = tensors[0] @ tensors[1].T + tensors[2]
    zero = student.sum() * 0
    mse_weight = 0.2 if plain_mse else 0.0
    expected = (
        plain_ce(student, weights),
        masked_cross_entropy(student + log_weight if sampled else student, LABELS)
        if with_labels
        else zero,
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
            log_weight_V=log_weight,
            row_chunk=row_chunk,
        )
        fused = torch.autograd.grad(2 * total, tensors)
        for got, plain in zip((total, *sums), (expected_total, *expected), strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-9, atol=1e-9)
        for got, plain in zip(fused, expected_grads, strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", TARGETS)
def test_lm_head_loss_gradcheck(kind):
    tensors, teacher = _inputs()
    target, _, plain_mse = _target(kind, teacher, 2.0)

    def total(*args):
        return loss_of(
            *args,
            target=target,
            ce_weight=0.7,
            mlm_weight=0.3,
            mse_weight=0.2 if plain_mse else 0.0,
            row_weights_N=torch.linspace(0.5, 3.0, N, dtype=torch.float64),
        )[0]

    assert torch.autograd.gradcheck(total, tensors, fast_mode=True)


def test_a_term_of_weight_0_is_left_out():
    tensors, teacher = _inputs()
    _, ce, mlm, mse = loss_of(*tensors, target=teacher, ce_weight=0.0, mse_weight=0.5)
    assert ce == 0
    assert mlm > 0
    assert mse > 0


@pytest.mark.parametrize("kind", ["full", "head ragged", "sparse ragged", "sampled ragged"])
def test_lm_head_loss_under_autocast_stays_near_float32(kind):
    tensors, teacher = _inputs(torch.float32)
    target, _, plain_mse = _target(kind, teacher, 2.0)

    def run():
        total, *sums = loss_of(*tensors, target=target, mse_weight=0.1 if plain_mse else 0.0)
        assert {total.dtype, *(s.dtype for s in sums)} == {torch.float32}
        return total, torch.autograd.grad(total, tensors)

    exact, exact_grads = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, rounded_grads = run()
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)
    for got, expected in zip(rounded_grads, exact_grads, strict=True):
        assert got.dtype == torch.float32
        assert functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.999


def test_lm_head_loss_of_no_rows_is_zero():
    tensors, teacher = _inputs()
    empty = FullTarget(teacher.rows_ND[:0], teacher.weight_VD, teacher.bias_V)
    rows = tensors[0][:0]
    total, *_ = loss_of(rows, *tensors[1:], target=empty, labels_N=LABELS[:0], mse_weight=1.0)
    total.backward()
    assert total == 0
    assert tensors[1].grad.abs().max() == 0


def test_without_a_term_nothing_is_computed():
    (rows_ND, weight_VD, bias_V), _ = _inputs()
    with torch.no_grad():
        weight_VD.fill_(float("nan"))
    total, *sums = loss_of(rows_ND, weight_VD, bias_V, target=None, labels_N=None)
    total.backward()
    assert [value.item() for value in (total, *sums)] == [0, 0, 0, 0]
    for tensor in (rows_ND, weight_VD, bias_V):  # of every rank, so that they can be averaged
        assert tensor.grad.abs().max() == 0
        assert tensor.grad.is_contiguous()


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
        total, *_ = loss_of(
            *tensors,
            target=target,
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
