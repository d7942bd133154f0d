"""Dropout and attention of training on a CPU: the dense formulas, with masks of the right share."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional

from distilcache.stages.models.encoder import RowEncoder
from distilcache.stages.models.families import FAMILIES, Family
from distilcache.stages.student_train.attention import (
    Dropout,
    SharedCast,
    attention,
    keep_mask,
    use_cpu_kernels,
)
from tests.stages.models.families_support import WORKING, make_model


def student(dropout=0.0):
    """A tiny student."""
    return make_model("distilbert", 50, 2, dropout=dropout, attention_dropout=dropout).train()


@pytest.mark.parametrize("padded", [False, True])
def test_without_dropout_the_student_is_transformers_own(padded):
    ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = None
    if padded:
        mask = (torch.arange(12) < torch.tensor([[12], [7], [1]])).long()
    ours, theirs = student(), student()
    use_cpu_kernels(ours)
    found, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (ours, theirs))
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    for logits in (found, expected):
        logits[real].square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


OURS = [k for k in WORKING if FAMILIES.get(k, Family()).mask in ("keys", "windows")]
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "shape"), [*((kind, {}) for kind in OURS), ("eurobert", GROUPED)])
def test_every_family_trains_as_with_its_own_attention(kind, shape, dtype):
    if dtype == torch.bfloat16 and not FAMILIES[kind].bfloat16:
        pytest.skip("does not run in bfloat16")
    ids = torch.randint(5, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    there = (torch.arange(12) < torch.tensor([[12], [7], [3]])).long()
    rows = there.flatten().nonzero().flatten()
    states, gradients = [], []
    for change in (use_cpu_kernels, lambda model: None):
        model = make_model(kind, 50, **shape)
        for layer in model.modules():  # in training, without anything drawn
            vars(layer).update({n: 0.0 for n in vars(layer) if "dropout" in n and n != "dropout"})
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        change(model.train())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = RowEncoder(model)(ids, there, rows).float()
        found.square().mean().backward()
        states.append(found.detach())
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    most = 1e-5 if dtype == torch.float32 else 0.05
    for ours, theirs in (states, gradients):
        assert (ours - theirs).norm() < most * theirs.norm()


def test_weights_names_and_configuration_stay():
    ours, theirs = student(0.1), student(0.1)
    use_cpu_kernels(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.distilbert.embeddings.dropout.p == 0.1
    assert all(type(m) is not torch.nn.Dropout for m in ours.modules())


def test_evaluation_is_transformers_own():
    ours, theirs = student(0.1).eval(), student(0.1).eval()
    use_cpu_kernels(ours)
    ids = torch.arange(12)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_masks_have_the_share_and_the_scale(p, dtype):
    torch.manual_seed(0)
    like = torch.empty(1001, 999, dtype=dtype)
    mask, scale = keep_mask(like, p)
    assert mask.shape == like.shape
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    share = mask.double().mean().item()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / like.numel()) ** 0.5 + 2**-16
    assert scale == pytest.approx(1 / (1 - p), rel=2**-16 / (1 - p))
    # Neighbours do not know of each other: neither in a row nor across 16-bit words of a draw.
    centred = mask.double().flatten() - share
    for distance in (1, 2, 3, 4, 999):
        product = (centred[distance:] * centred[:-distance]).mean().item()
        assert abs(product) < 5 * p * (1 - p) / like.numel() ** 0.5


def test_masks_come_from_torchs_generator():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([keep_mask(torch.empty(5, 7), 0.5)[0] for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])


def test_dropout_and_its_gradient():
    torch.manual_seed(0)
    x = torch.randn(64, 64, requires_grad=True)
    layer = Dropout(0.25)
    y = layer(x)
    y.sum().backward()
    kept = y != 0
    torch.testing.assert_close(y[kept], x.detach()[kept] / 0.75)
    torch.testing.assert_close(x.grad, kept / 0.75)
    assert layer.eval()(x) is x


def test_attention_with_dropout_is_right_on_average():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
    layer = torch.nn.Module().train()
    expected = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    many = [x.expand(4000, 2, 6, 4) for x in (query, key, value)]
    found, _ = attention(layer, *many, None, dropout=0.3)
    error = found.std(0) / 4000**0.5
    assert ((found.mean(0) - expected[0]).abs() < 5 * error + 1e-12).all()
    plain, weights = attention(layer, query, key, value, None)
    torch.testing.assert_close(plain, expected)
    assert weights is None


def test_two_students_do_not_share_layers():
    first = student(0.1)
    second = copy.deepcopy(first)
    use_cpu_kernels(first)
    assert type(second.distilbert.embeddings.dropout) is torch.nn.Dropout


def test_an_input_is_cast_once_for_all_layers_that_read_it():
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    first, second = torch.randn(2, 5, 8).unbind()
    inputs = [x.requires_grad_() for x in (first, second)]

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.stack([layer(x) for x in inputs for layer in layers])
        return found, torch.autograd.grad(found.float().square().sum(), inputs)

    usual, expected = run()
    seen = []
    hook = SharedCast()
    for layer in layers:
        layer.register_forward_pre_hook(hook)
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found, gradients = run()
    assert torch.equal(found, usual)
    assert [x.dtype for x in seen] == [torch.bfloat16] * 6
    assert len({id(x) for x in seen}) == 2
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))


def test_inputs_stay_as_they_are_outside_of_training_in_bfloat16():
    layer, given = torch.nn.Linear(3, 3), torch.randn(2, 3)
    hook = SharedCast()
    assert hook(layer, (given,)) is None  # float32
    with torch.autocast("cpu", torch.bfloat16):
        assert hook(layer, ()) is None
        assert hook(layer.eval(), (given,)) is None
        with torch.no_grad():
            assert hook(layer.train(), (given,)) is None


def test_an_input_that_was_changed_in_place_is_cast_again():
    layer, given, hook = torch.nn.Linear(3, 3), torch.randn(2, 3), SharedCast()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hook(layer, (given,)), given.bfloat16())
        given += 1
        assert torch.equal(hook(layer, (given,)), given.bfloat16())
        assert hook(layer, (given.double(),)) is None  # as in autocast


@pytest.mark.parametrize("made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_student_that_was_trained_in_bfloat16_can_be_copied(made):
    first = student()
    use_cpu_kernels(first)
    ids = torch.arange(12)[None]
    with torch.autocast("cpu", torch.bfloat16):
        first(input_ids=ids).logits.sum().backward()
        second = made(first)
        assert torch.equal(second(input_ids=ids).logits, first(input_ids=ids).logits)
