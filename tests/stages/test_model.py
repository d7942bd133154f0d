"""The student's loss and gradient against the dense formulas with the teacher run live."""

import pytest
import torch
from torch.nn import functional
from transformers import BertForMaskedLM

from data.cache import Cache
from data.dataset import CachedBatches
from data.errors import UserError
from data.schema import Encoding, HiddenEncoding
from stages.student_train.config import StudentConfig, TrainConfig
from stages.student_train.model import DistillationModel, required_signals
from stages.student_train.student import build_student

VOCABULARY = 72


def make(cache_dir, size="1x32", batch_size=5, **train):
    cache = Cache.open(cache_dir)
    config = TrainConfig(row_chunk=7, **train)
    signals = required_signals(cache.encoding, config)
    student = build_student(
        size=size,
        student=StudentConfig(sizes=(size,), dropout=0.0),
        seed=0,
        encoding=cache.encoding,
        teacher_dir=cache.teacher_dir,
    )
    hidden = cache.encoding.hidden_layer()
    model = DistillationModel(
        student,
        train=config,
        signals=signals,
        lm_head=cache.lm_head() if signals.ce == "replay" else None,
        hidden_decoder=cache.hidden_decoder() if signals.hidden else None,
        teacher_width=hidden.width if hidden else None,
    )
    data = CachedBatches(
        cache, batch_size=batch_size, seed=0, signal=signals.ce, hidden=signals.hidden
    )
    return model, data


def counts_of(batch):
    signals = len(batch.get("signal_index", ()))
    return {"ce": signals, "mlm": len(batch["labels"]), "cos": signals}


def dense(model, teacher, batch, positions):
    """L_ce, L_mlm and L_cos as one writes them with the teacher beside the student."""
    train = model.train_config
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    with torch.no_grad():
        live = teacher(**inputs, output_hidden_states=True)
    mine = model.student(**inputs, output_hidden_states=True)
    rows = batch["signal_index"]
    if positions == "all":
        expected = (
            torch.arange(batch["input_ids"].numel())
            if inputs["attention_mask"] is None
            else inputs["attention_mask"].flatten().nonzero().flatten()
        )
        assert torch.equal(rows, expected)
    t = train.temperature
    ce = t**2 * functional.kl_div(
        (mine.logits.flatten(0, 1)[rows] / t).log_softmax(-1),
        (live.logits.flatten(0, 1)[rows] / t).softmax(-1),
        reduction="batchmean",
    )
    mlm = functional.cross_entropy(
        mine.logits.flatten(0, 1)[batch["masked_index"]], batch["labels"]
    )
    cos = torch.nn.CosineEmbeddingLoss()(
        mine.hidden_states[-1].flatten(0, 1)[rows],
        live.hidden_states[-1].flatten(0, 1)[rows],
        torch.ones(len(rows)),
    )
    return ce, mlm, cos


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("positions", "signal", "settings"),
    [
        ("masked", "replay", {"hidden_dtype": "float32", "top_k": 0}),
        ("all", "replay", {"hidden_dtype": "float32", "top_k": 0}),
        ("all", "sparse", {"hidden_dtype": "float32", "top_k": VOCABULARY}),
    ],
)
def test_loss_and_gradient_equal_the_live_formulas(
    tiny_cache, tiny_teacher, positions, signal, settings, temperature
):
    cache = tiny_cache(positions=positions, **settings)
    model, data = make(cache, signal=signal, temperature=temperature)
    teacher = BertForMaskedLM.from_pretrained(tiny_teacher).eval()
    batch = data[0]
    counts = counts_of(batch)
    loss, sums = model(batch, counts)
    loss.backward()
    got = [p.grad.clone() for p in model.student.parameters()]
    model.zero_grad()
    terms = dense(model, teacher, batch, positions)
    expected = sum(w * x for w, x in zip((5.0, 2.0, 1.0), terms, strict=True))
    expected.backward()
    # Logits stored as float16 are off by 2^-11 of their size; hidden states are exact.
    tolerance = 1e-4 if signal == "replay" else 2e-3
    for name, term, total in zip(("ce", "mlm", "cos"), terms, sums, strict=True):
        torch.testing.assert_close(total / counts[name], term, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=1e-6)
    wanted = torch.cat([p.grad.flatten() for p in model.student.parameters()])
    error = (torch.cat([g.flatten() for g in got]) - wanted).norm() / wanted.norm()
    assert error < tolerance


def test_micro_batches_add_up_to_the_whole_batch(tiny_cache):
    """Sums divided by global counts: accumulation changes neither loss nor gradient."""
    cache = tiny_cache(hidden_dtype="float32", top_k=0)
    model, parts = make(cache, batch_size=3)
    _, whole = make(cache, batch_size=6)
    batch, halves = whole[0], [parts[0], parts[1]]
    assert torch.equal(torch.cat([half["input_ids"] for half in halves]), batch["input_ids"])
    results = []
    for micro_batches in ([batch], halves):
        model.zero_grad()
        loss = sum(model(part, counts_of(batch))[0] for part in micro_batches)
        loss.backward()
        results.append((loss, torch.cat([p.grad.flatten() for p in model.student.parameters()])))
    torch.testing.assert_close(*(loss for loss, _ in results))
    torch.testing.assert_close(*(grad for _, grad in results), rtol=1e-4, atol=1e-6)


def test_other_width_through_a_trained_projection(tiny_cache, capsys):
    model, data = make(tiny_cache(hidden_dtype="float32", top_k=0), size="1x64")
    loss, _ = model(data[0], counts_of(data[0]))
    loss.backward()
    assert model.projection.weight.shape == (32, 64)
    assert model.projection.weight.grad.abs().sum() > 0
    assert {n.split(".")[0] for n in model.trained_tensors()} == {"student", "projection"}


def test_frozen_teacher_is_no_part_of_the_state(tiny_cache):
    model, _ = make(tiny_cache(hidden_dtype="float32", top_k=0))
    assert {n.split(".")[0] for n in model.state_dict()} == {"student"}
    assert {n.split(".")[0] for n in model.trained_tensors()} == {"student"}


def test_mlm_alone_needs_no_teacher(tiny_cache):
    cache = Cache.open(tiny_cache(mask_only=True))
    train = TrainConfig(alpha_ce=0.0, alpha_cos=0.0)
    signals = required_signals(cache.encoding, train)
    assert (signals.ce, signals.hidden) == (None, False)
    config = StudentConfig(init="random", dropout=0.0)
    student = build_student(
        size="1x32", student=config, seed=0, encoding=cache.encoding, teacher_dir=cache.teacher_dir
    )
    model = DistillationModel(student, train=train, signals=signals)
    batch = CachedBatches(cache, batch_size=4, seed=0, signal=None, hidden=False)[0]
    loss, sums = model(batch, counts_of(batch))
    logits = student(batch["input_ids"], batch.get("attention_mask")).logits.flatten(0, 1)
    expected = functional.cross_entropy(logits[batch["masked_index"]], batch["labels"])
    torch.testing.assert_close(loss, 2 * expected)
    assert sums[0] == sums[2] == 0


def encoding(**changes):
    last = HiddenEncoding(layer=2, width=32, dtype="float16")
    values = {
        "vocab_size": VOCABULARY,
        "max_length": 16,
        "pad_id": 0,
        "temperatures": (2.0,),
        "top_k": 8,
        "hidden": (last,),
        "num_layers": 2,
    }
    return Encoding(**{**values, **changes})


@pytest.mark.parametrize(
    ("held", "train", "message"),
    [
        ({"mask_only": True}, {}, "alpha_ce and alpha_cos must be 0 on a mask-only cache"),
        ({"hidden": ()}, {}, "no hidden states of the last layer, got 'replay'"),
        (
            {"hidden": (HiddenEncoding(layer=1, width=32, dtype="float16"),)},
            {"signal": "sparse"},
            r"alpha_cos must be 0 .* got 1 \(stored layers: 1\)",
        ),
        ({"top_k": 0}, {"signal": "sparse"}, "signal must be 'replay' .* got 'sparse'"),
        (
            {},
            {"signal": "sparse", "temperature": 3.0},
            r"temperature must be one that the cache holds .*\(1, 2\), got 3; .*replay",
        ),
    ],
)
def test_missing_signals_are_refused(held, train, message):
    with pytest.raises(UserError, match=message) as caught:
        required_signals(encoding(**held), TrainConfig(**train))
    assert "\n" not in str(caught.value)


def test_sparse_reads_the_column_of_its_temperature():
    held = encoding(temperatures=(4.0, 2.0))
    for temperature, column in ((1.0, 0), (4.0, 1), (2.0, 2)):
        train = TrainConfig(signal="sparse", temperature=temperature)
        assert required_signals(held, train).temperature_column == column
