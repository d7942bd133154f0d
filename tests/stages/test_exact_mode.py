"""The offline losses and gradients are the live ones.

Exact mode: hidden states in float32 with replay, or all V logits in float32; every position. The
live side is written here with torch's own loss functions and the teacher run beside the student.
"""

import lzma
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForMaskedLM

from data.cache import Cache
from data.dataset import CachedBatches
from data.masking import MaskingConfig
from stages.corpus.build import build_corpus
from stages.corpus.config import CorpusConfig
from stages.student_train.config import StudentConfig, TrainConfig
from stages.student_train.model import DistillationModel, required_signals
from stages.student_train.student import build_student
from stages.teacher_cache.config import CacheConfig
from stages.teacher_cache.run import build_cache

V = 120
EXACT = {
    "replay": {"hidden_dtype": "float32", "top_k": 0},
    "sparse": {"hidden_dtype": "float32", "top_k": V, "logits_dtype": "float32"},
}
TERMS = ("ce", "mlm", "cos")
LINES = {"packing": "lines", "max_length": 24, "documents": 160}


def make_model(cache, size, weights=(5.0, 2.0, 1.0), **train):
    """The student inside its losses, without dropout, as training makes it."""
    config = TrainConfig(
        **dict(zip(("alpha_ce", "alpha_mlm", "alpha_cos"), weights, strict=True)), **train
    )
    signals = required_signals(cache.encoding, config)
    student = build_student(
        size=size,
        student=StudentConfig(sizes=(size,), dropout=0.0),
        seed=0,
        encoding=cache.encoding,
        teacher_dir=cache.teacher_dir,
    )
    return DistillationModel(
        student,
        train=config,
        signals=signals,
        lm_head=cache.lm_head() if signals.ce == "replay" else None,
        hidden_decoder=cache.hidden_decoder() if signals.hidden else None,
        teacher_width=cache.encoding.hidden_layer().width,
    )


def offline(model, batch, scale=1.0):
    """Loss terms (means) and gradients from the cache."""
    model.zero_grad()
    signals = len(batch["signal_index"])
    counts = {"ce": signals, "mlm": len(batch["labels"]), "cos": signals}
    loss, sums = model(batch, counts)
    (scale * loss).backward()
    terms = [total / counts[name] for name, total in zip(TERMS, sums, strict=True)]
    return loss.detach(), terms, gradients(model)


def gradients(model):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def live(model, teacher, batch, positions, weights=(5.0, 2.0, 1.0)):
    """The same from the dense formulas; which positions count is worked out here."""
    model.zero_grad()
    temperature = model.train_config.temperature
    attention = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": attention}
    with torch.no_grad():
        theirs = teacher(**inputs, output_hidden_states=True)
    mine = model.student(**inputs, output_hidden_states=True)
    masked = torch.zeros_like(attention, dtype=torch.bool).flatten()
    masked[batch["masked_index"]] = True
    selected = masked if positions == "masked" else attention.flatten().bool()
    student = mine.logits.flatten(0, 1)
    # kl_div's batchmean divides by the number of rows: the selected positions.
    ce = (
        functional.kl_div(
            functional.log_softmax(student[selected] / temperature, dim=-1),
            functional.softmax(theirs.logits.flatten(0, 1)[selected] / temperature, dim=-1),
            reduction="batchmean",
        )
        * temperature**2
    )
    labels = torch.full_like(batch["input_ids"].flatten(), -100)
    labels[batch["masked_index"]] = batch["labels"]
    mlm = functional.cross_entropy(student, labels, ignore_index=-100)
    cos = functional.cosine_embedding_loss(
        model.projection(mine.hidden_states[-1].flatten(0, 1)[selected]),
        theirs.hidden_states[-1].flatten(0, 1)[selected],
        torch.ones(int(selected.sum())),
    )
    loss = weights[0] * ce + weights[1] * mlm + weights[2] * cos
    loss.backward()
    return loss.detach(), [ce.detach(), mlm.detach(), cos.detach()], gradients(model)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("signal", EXACT)
@pytest.mark.parametrize("corpus", [{}, LINES], ids=["unpadded", "padded"])
@pytest.mark.parametrize("size", ["2x32", "1x16"])
def test_losses_and_gradients_equal_the_live_ones(
    small_cache, small_teacher, corpus, signal, temperature, size
):
    path = small_cache(corpus=corpus, positions="all", **EXACT[signal])
    cache = Cache.open(path)
    teacher = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    model = make_model(cache, size, signal=signal, temperature=temperature, row_chunk=50)
    data = CachedBatches(cache, batch_size=6, seed=0, signal=signal, hidden=True)
    for k in (0, data.steps_per_epoch - 1):
        batch = data[k]
        loss, terms, grads = offline(model, batch)
        wanted_loss, wanted_terms, wanted_grads = live(model, teacher, batch, "all")
        for name, found, wanted in zip(TERMS, terms, wanted_terms, strict=True):
            assert float(wanted) > 1e-2, name
            assert float(found) == pytest.approx(float(wanted), rel=1e-4), name
        assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-4)
        assert grads.keys() == wanted_grads.keys()
        largest = max(float(g.norm()) for g in wanted_grads.values())
        for name, wanted in wanted_grads.items():
            # Some gradients (key biases) are zero in exact arithmetic: measured by the largest.
            size_of = max(float(wanted.norm()), 1e-3 * largest)
            assert float((grads[name] - wanted).norm()) <= 1e-4 * size_of, name
        assert ("projection.weight" in grads) == (size == "1x16")


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("signal", EXACT)
def test_each_term_alone(small_cache, small_teacher, signal, term):
    """A wrong gradient of a small term cannot hide behind a large one."""
    cache = Cache.open(small_cache(corpus=LINES, positions="all", **EXACT[signal]))
    teacher = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    weights = tuple(float(term == name) for name in TERMS)
    model = make_model(cache, "2x32", weights, signal=signal, temperature=2.0)
    # Signals are read in any case, so that the positions are those of the whole loss.
    data = CachedBatches(cache, batch_size=6, seed=0, signal=signal, hidden=True)
    batch = data[1]
    _, _, grads = offline(model, batch)
    _, _, wanted = live(model, teacher, batch, "all", weights)
    flat, target = (torch.cat([g.flatten() for g in side.values()]) for side in (grads, wanted))
    assert relative(flat, target) < 1e-4


@pytest.mark.parametrize("signal", EXACT)
def test_masked_positions_alone(small_cache, small_teacher, signal):
    cache = Cache.open(small_cache(corpus=LINES, **EXACT[signal]))
    teacher = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    model = make_model(cache, "2x32", signal=signal)
    batch = CachedBatches(cache, batch_size=6, seed=0, signal=signal, hidden=True)[0]
    loss, terms, grads = offline(model, batch)
    wanted_loss, wanted_terms, wanted = live(model, teacher, batch, "masked")
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-4)
    for found, expected in zip(terms, wanted_terms, strict=True):
        assert float(found) == pytest.approx(float(expected), rel=1e-4)
    flat, target = (torch.cat([g.flatten() for g in side.values()]) for side in (grads, wanted))
    assert relative(flat, target) < 1e-4


def test_the_comparison_can_fail(small_cache, small_teacher):
    """Other stored signals (T of another run, coarse logits) are seen by the same measure."""
    teacher = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    cache = Cache.open(small_cache(corpus=LINES, positions="all", top_k=8, hidden_dtype="float32"))
    model = make_model(cache, "2x32", signal="sparse")
    batch = CachedBatches(cache, batch_size=6, seed=0, signal="sparse", hidden=True)[0]
    _, terms, grads = offline(model, batch)
    _, wanted_terms, wanted = live(model, teacher, batch, "all")
    assert abs(float(terms[0] / wanted_terms[0]) - 1) > 1e-3
    flat, target = (torch.cat([g.flatten() for g in side.values()]) for side in (grads, wanted))
    assert relative(flat, target) > 1e-2


def angle(a, b):
    cosine = a.double() @ b.double() / (a.double().norm() * b.double().norm())
    return math.degrees(math.acos(min(1.0, float(cosine))))


@pytest.fixture(scope="module")
def real_cache(shared, tmp_path_factory):
    """The default encoding, of some Wikipedia text; calibrated on a third of it."""
    folder = tmp_path_factory.mktemp("real")
    with lzma.open(shared / "corpus" / "wiki_valid_2MB.txt.xz", "rt", encoding="utf-8") as file:
        (folder / "text.txt").write_text(file.read(100_000))
    config = CorpusConfig(
        sources=(str(folder / "text.txt"),), block_sequences=32, heldout_fraction=0.0, workers=1
    )
    build_corpus(config, folder / "corpus", str(shared / "teacher"))
    build_cache(
        corpus_dir=folder / "corpus",
        out=folder / "cache",
        teacher=str(shared / "teacher"),
        masking=MaskingConfig(),
        config=CacheConfig(calibration_sequences=64),
        device="cpu",
        dtype="float32",
    )
    return Cache.open(folder / "cache")


def gradient_angle(model, teacher, batches):
    """Between the gradients of L_ce alone, summed over batches."""
    before, model.train_config = model.train_config, replace(
        model.train_config, alpha_ce=1.0, alpha_mlm=0.0, alpha_cos=0.0
    )  # fmt: skip
    sums = []
    for side in (offline, lambda m, b: live(m, teacher, b, "masked", (1.0, 0.0, 0.0))):
        parts = [torch.cat([g.flatten() for g in side(model, b)[2].values()]) for b in batches]
        sums.append(torch.stack(parts).sum(0))
    model.train_config = before
    return angle(*sums)


@pytest.mark.shared_data
def test_default_encoding_keeps_the_direction_of_the_gradient(real_cache):
    """Coded hidden states as they come by default, T = 2, a student fresh from the teacher."""
    teacher = AutoModelForMaskedLM.from_pretrained(real_cache.teacher_dir).eval()
    model = make_model(real_cache, "3x384", temperature=2.0)
    batch = CachedBatches(real_cache, batch_size=16, seed=0)[0]
    assert gradient_angle(model, teacher, [batch]) <= 3.0
    assert real_cache.manifest.totals["clipped_codes"] == 0


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.timeout(1800)
def test_the_direction_is_kept_while_the_student_learns(real_cache):
    """The further the student has come, the smaller its gradient and the larger any error."""
    teacher = AutoModelForMaskedLM.from_pretrained(real_cache.teacher_dir).eval()
    model = make_model(real_cache, "3x384", temperature=2.0)
    data = CachedBatches(real_cache, batch_size=16, seed=0)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=5e-4)
    for k in range(60):
        offline(model, data[k])
        torch.nn.utils.clip_grad_norm_(model.student.parameters(), 5.0)
        optimizer.step()
    assert gradient_angle(model, teacher, [data[0]]) <= 3.0
    assert gradient_angle(model, teacher, [data[k] for k in range(5)]) <= 3.0
