"""L_rel and its gradient: against the paper's formula, written out in float64."""

import math

import pytest
import torch

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.stages.student_train import relation_loss as module
from distilcache.stages.student_train.assembly import assemble
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.relation_loss import relation_loss
from distilcache.stages.student_train.signals import required_signals
from tests.stages.student_train.losses_support import dense_relations
from tests.stages.student_train.model_support import EXACT, build, gradient, in_losses, make

B, L, HEADS = 3, 6, 4


def draw(width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, B, L, width, generator=generator, dtype=dtype)


def lengths_mask(lengths):
    return torch.arange(L) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("elements", [1, 2 * HEADS * L * L, 1 << 20])
@pytest.mark.parametrize("lengths", [(L, L, L), (2, 6, 5)])
def test_loss_and_gradient_are_the_papers(monkeypatch, elements, lengths):
    monkeypatch.setitem(module.ELEMENTS, "cpu", elements)
    teacher = draw(16, 1)
    student, again = draw(8, 0).requires_grad_(), draw(8, 0).requires_grad_()
    mask = None if lengths == (L, L, L) else lengths_mask(lengths)
    total, plain = relation_loss(student, teacher, HEADS, mask, 0.3)
    (5 * total).backward()
    wanted = dense_relations(again, teacher, HEADS, lengths)
    (5 * 0.3 * wanted).backward()
    torch.testing.assert_close(plain, wanted.detach())
    torch.testing.assert_close(total, 0.3 * wanted)
    torch.testing.assert_close(student.grad, again.grad)
    assert not plain.requires_grad
    if mask is not None:
        assert not student.grad[:, ~mask].any()


def test_padding_may_hold_anything():
    student, teacher = draw(8, 0, torch.float32), draw(16, 1, torch.float32)
    mask = lengths_mask((2, 6, 5))
    found = relation_loss(student, teacher, HEADS, mask, 1.0)[1]
    student[:, ~mask] = 1e3
    teacher[:, ~mask] = -1e3
    assert relation_loss(student, teacher, HEADS, mask, 1.0)[1] == found


def test_gradient_in_a_shorter_type():
    teacher, wanted = draw(16, 1, torch.float32), draw(8, 0, torch.float32).requires_grad_()
    relation_loss(wanted, teacher, HEADS, None, 1.0)[0].backward()
    student = wanted.detach().bfloat16().requires_grad_()
    total, plain = relation_loss(student, teacher, HEADS, None, 1.0)
    total.backward()
    assert (plain.dtype, student.grad.dtype) == (torch.float32, torch.bfloat16)
    gap = (student.grad.float() - wanted.grad).norm() / wanted.grad.norm()
    assert 1e-4 < gap < 0.02


@pytest.mark.parametrize("heads", [1, 4])
def test_the_step_of_a_run_in_other_heads(tiny_cache, heads):
    """Live relations would give the same: the exact mode compares them with the teacher's heads."""
    cache = Cache.open(tiny_cache(**EXACT, relation_layer=-1))
    model, data = make(cache.path, alpha_ce=0, alpha_mlm=0, alpha_cos=0, alpha_rel=2.0,
                       relation_heads=heads)  # fmt: skip
    batch = data[1]
    loss, sums, _ = gradient(model, batch)
    with torch.no_grad(), model._tap:
        model.encode(batch, batch["masked_index"])
        lengths = batch["attention_mask"].sum(1).tolist()
        wanted = dense_relations(
            model._tap.gave(), cache.teacher.relations()(batch), heads, lengths
        )
    torch.testing.assert_close(sums["rel"], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, 2 * wanted / sum(lengths), rtol=1e-5, atol=1e-6)
    assert [name for name, value in sums.items() if value] == ["rel"]


def test_codes_give_nearly_the_same_gradient(tiny_cache):
    """Of a code of a fine quality; a coarse one is further off."""

    def angle(quality):
        found = []
        for settings in (EXACT, {"hidden_dtype": "none", "relation_quality": quality}):
            model, data = make(tiny_cache(**settings, relation_layer=-1), alpha_ce=0,
                               alpha_mlm=0, alpha_cos=0, alpha_rel=1.0)  # fmt: skip
            found.append(gradient(model, data[0])[2])
        return math.degrees(math.acos(torch.cosine_similarity(*found, dim=0)))

    assert angle(1e-4) < 3 < angle(0.05)


@pytest.mark.parametrize(
    ("settings", "train", "message"),
    [
        ({}, {}, "alpha_rel must be 0 where the cache has no relations, got 1; make the cache"),
        ({"relation_layer": -1}, {"relation_heads": 5}, r"divide the width of the teacher \(32\)"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_cache, settings, train, message):
    cache = Cache.open(tiny_cache(**settings))
    with pytest.raises(UserError, match=message):
        in_losses(cache, build(cache, "1x32"), alpha_rel=1.0, **train)


def test_heads_must_divide_the_students_width(tiny_cache):
    cache = Cache.open(tiny_cache(relation_layer=-1))
    train = TrainConfig(alpha_rel=1.0, relation_heads=32)
    student = build(cache, "1x16", init="random")
    with pytest.raises(UserError, match=r"divide the width of the student \(16\), got 32; use"):
        assemble(cache, student, train, required_signals(cache.encoding, train))
