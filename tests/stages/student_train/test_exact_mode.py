"""The offline losses and gradients are the live ones, those of DistilBERT's published training.

Exact mode: hidden states in float32 with replay, or all V logits in float32; every position. The
live side is written here with torch's own loss functions and the teacher run beside the student.
"""

import lzma
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForMaskedLM

from distilcache.data.cache.cache import Cache
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.student_train.model import TERMS
from distilcache.stages.student_train.signals import count_positions
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.run import build_cache
from tests.stages.student_train.model_support import build, in_losses

V = 120
FLOAT32 = {"hidden_dtype": "float32", "logits_dtype": "float32", "relation_layer": -1}
EXACT = {
    "replay": {**FLOAT32, "top_k": 0},
    "replay+topk": {**FLOAT32, "top_k": 8},
    "replay+residual": {**FLOAT32, "top_k": 8, "residual_samples": 4},
    "sparse": {**FLOAT32, "top_k": V},
}
MSE, REL = 0.3, 0.5
HEADS = 2
LINES = {"packing": "lines", "max_length": 24, "documents": 160}


def weights_of(signal):
    """Weights of L_ce, L_mlm, L_cos as published, of L_mse where the signal has one, of L_rel."""
    return (5.0, 2.0, 1.0, 0.0 if signal == "sparse" else MSE, REL)


def make_model(cache, size, weights, **train):
    """The student inside its losses, without dropout, as training makes it."""
    alphas = {f"alpha_{name}": weight for name, weight in zip(TERMS, weights, strict=True)}
    return in_losses(cache, build(cache, size), **alphas, **train)[0]


def make_data(cache, signal, restrict=False, batch_size=6):
    return CachedBatches(
        cache, batch_size=batch_size, seed=0, signal=signal, restrict_ce_to_mask=restrict,
        relation=cache.encoding.relation is not None,
    )  # fmt: skip


def offline(model, batch, scale=1.0):
    """Loss terms (means) and gradients from the cache."""
    model.zero_grad()
    counts = count_positions(batch)
    loss, sums = model(batch, counts)
    (scale * loss).backward()
    terms = [total / max(counts[name], 1) for name, total in zip(TERMS, sums, strict=True)]
    return loss.detach(), terms, gradients(model)


def gradients(model):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def relations(x_LP):
    """Log relations of one sequence, head by head."""
    heads = x_LP.chunk(HEADS, -1)
    return torch.stack([(h @ h.T / math.sqrt(h.shape[1])).log_softmax(-1) for h in heads])


def relation_loss(model, teacher, mine, theirs, attention):
    """MiniLMv2's loss of the last layers, by their own modules, one sequence at a time."""
    ours = model.student.distilbert.transformer.layer[-1].attention
    other = teacher.bert.encoder.layer[-1].attention.self
    total = 0.0
    for name, full in (("q", "query"), ("k", "key"), ("v", "value")):
        student = getattr(ours, f"{name}_lin")(mine.hidden_states[-2])
        wanted = getattr(other, full)(theirs.hidden_states[-2])
        for x_LP, t_LP, there in zip(student, wanted, attention == 1, strict=True):
            p, q = relations(t_LP[there].detach()), relations(x_LP[there])
            total = total + (p.exp() * (p - q)).sum() / HEADS
    return total / attention.sum()


def live(model, teacher, batch, weights, positions="all", restrict=False):
    """The step of DistilBERT's published training, teacher and student side by side.

    L_ce and L_mse over the attended positions, or the masked ones under
    ``restrict_ce_to_mask``; L_mlm over the masked ones, L_cos over the attended ones in any
    case. ``positions="masked"`` departs from it: L_cos at masked positions too.
    """
    model.zero_grad()
    temperature = model.train_config.temperature
    attention = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": attention}
    with torch.no_grad():
        theirs = teacher(**inputs, output_hidden_states=True)
    mine = model.student(**inputs, output_hidden_states=True)
    labels = torch.full_like(batch["input_ids"], -100).flatten()
    labels[batch["masked_index"]] = batch["labels"]
    attended, masked = attention.flatten() == 1, labels > -1
    at_ce = masked if restrict or positions == "masked" else attended
    at_cos = masked if positions == "masked" else attended
    student = mine.logits.flatten(0, 1)
    student_ce, teacher_ce = student[at_ce], theirs.logits.flatten(0, 1)[at_ce]
    soft = torch.nn.KLDivLoss(reduction="batchmean")(
        torch.log_softmax(student_ce / temperature, -1), torch.softmax(teacher_ce / temperature, -1)
    )
    mlm = torch.nn.CrossEntropyLoss(ignore_index=-100)(student, labels)
    student_cos = model.projection(mine.hidden_states[-1].flatten(0, 1)[at_cos])
    teacher_cos = theirs.hidden_states[-1].flatten(0, 1)[at_cos]
    same = torch.ones(len(student_cos))
    cos = torch.nn.CosineEmbeddingLoss(reduction="mean")(student_cos, teacher_cos, same)
    mse = torch.nn.MSELoss(reduction="sum")(student_ce, teacher_ce) / len(student_ce)
    rel = relation_loss(model, teacher, mine, theirs, attention)
    terms = (soft * temperature**2, mlm, cos, mse, rel)
    loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    loss.backward()
    return loss.detach(), [term.detach() for term in terms], gradients(model)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


def flat(grads):
    return torch.cat([g.flatten() for g in grads.values()])


def assert_equal(found, expected, weights):
    """Every term that counts, the loss and each parameter's gradient to 1e-4."""
    (loss, terms, grads), (wanted_loss, wanted_terms, wanted_grads) = found, expected
    for name, term, wanted, weight in zip(TERMS, terms, wanted_terms, weights, strict=True):
        assert float(wanted) > 1e-2, name
        assert float(term) == pytest.approx(float(wanted) if weight else 0.0, rel=1e-4), name
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-4)
    assert grads.keys() == wanted_grads.keys()
    largest = max(float(g.norm()) for g in wanted_grads.values())
    for name, wanted in wanted_grads.items():
        # Some gradients (key biases) are zero in exact arithmetic: measured by the largest.
        size_of = max(float(wanted.norm()), 1e-3 * largest)
        assert float((grads[name] - wanted).norm()) <= 1e-4 * size_of, name
    assert relative(flat(grads), flat(wanted_grads)) < 1e-4


@pytest.mark.parametrize("restrict", [False, True], ids=["all", "restricted"])
@pytest.mark.parametrize("signal", EXACT)
@pytest.mark.parametrize("corpus", [{}, LINES], ids=["unpadded", "padded"])
@pytest.mark.parametrize("size", ["2x32", "1x16"])
def test_parity_with_the_published_step(small_cache, small_teacher, corpus, signal, size, restrict):
    """All positions, T = 2, weights 5, 2, 1 (and L_mse): losses and gradients are the live ones."""
    cache = Cache.open(small_cache(corpus=corpus, positions="all", **EXACT[signal]))
    teacher = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    weights = weights_of(signal)
    model = make_model(
        cache,
        size,
        weights,
        signal=signal,
        temperature=2.0,
        restrict_ce_to_mask=restrict,
        row_chunk=50,
    )
    data = make_data(cache, signal, restrict)
    for k in (0, data.steps_per_epoch - 1):
        batch = data[k]
        found = offline(model, batch)
        assert_equal(found, live(model, teacher, batch, weights, restrict=restrict), weights)
        assert ("projection.weight" in found[2]) == (size == "1x16")


@pytest.mark.parametrize("signal", [s for s in EXACT if s != "replay+residual"])
def test_temperature_1(small_cache, small_teacher, signal):
    cache = Cache.open(small_cache(corpus=LINES, positions="all", **EXACT[signal]))
    teacher = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    weights = weights_of(signal)
    model = make_model(cache, "2x32", weights, signal=signal, temperature=1.0)
    batch = make_data(cache, signal)[0]
    assert_equal(offline(model, batch), live(model, teacher, batch, weights), weights)


@pytest.mark.parametrize(
    ("signal", "term"),
    [(s, t) for s in EXACT for t in TERMS if (s, t) != ("sparse", "mse")],
)
def test_each_term_alone(small_cache, small_teacher, signal, term):
    """A wrong gradient of a small term cannot hide behind a large one."""
    cache = Cache.open(small_cache(corpus=LINES, positions="all", **EXACT[signal]))
    teacher = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    weights = tuple(float(term == name) for name in TERMS)
    model = make_model(cache, "2x32", weights, signal=signal, temperature=2.0)
    # Signals are read in any case, so that the positions are those of the whole loss.
    batch = make_data(cache, signal)[1]
    _, _, grads = offline(model, batch)
    _, _, wanted = live(model, teacher, batch, weights)
    assert relative(flat(grads), flat(wanted)) < 1e-4


@pytest.mark.parametrize("signal", EXACT)
def test_masked_positions_alone(small_cache, small_teacher, signal):
    cache = Cache.open(small_cache(corpus=LINES, **EXACT[signal]))
    teacher = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    weights = weights_of(signal)
    model = make_model(cache, "2x32", weights, signal=signal)
    batch = make_data(cache, signal)[0]
    expected = live(model, teacher, batch, weights, positions="masked")
    assert_equal(offline(model, batch), expected, weights)


def test_the_comparison_can_fail(small_cache, small_teacher):
    """Coarser signals and other positions are seen by the same measure."""
    teacher = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    settings = {**FLOAT32, "top_k": 8}
    cache = Cache.open(small_cache(corpus=LINES, positions="all", **settings))
    weights = weights_of("sparse")
    for signal, restrict in (("sparse", False), ("replay", True)):
        model = make_model(cache, "2x32", weights, signal=signal)
        batch = make_data(cache, signal)[0]
        _, terms, grads = offline(model, batch)
        _, wanted_terms, wanted = live(model, teacher, batch, weights, restrict=restrict)
        assert abs(float(terms[0] / wanted_terms[0]) - 1) > 1e-3
        assert relative(flat(grads), flat(wanted)) > 1e-2


def angle(a, b):
    cosine = a.double() @ b.double() / (a.double().norm() * b.double().norm())
    return math.degrees(math.acos(min(1.0, float(cosine))))


@pytest.fixture(scope="module")
def real_cache(shared, tmp_path_factory):
    """The default encoding, of some Wikipedia text; calibrated on a quarter of it."""
    folder = tmp_path_factory.mktemp("real")
    with lzma.open(shared / "corpus" / "wiki_valid_2MB.txt.xz", "rt", encoding="utf-8") as file:
        (folder / "text.txt").write_text(file.read(60_000))
    config = CorpusConfig(
        sources=(str(folder / "text.txt"),), block_sequences=32, heldout_fraction=0.0, workers=1
    )
    build_corpus(config, folder / "corpus", str(shared / "teacher"))
    build = Build(
        corpus_dir=folder / "corpus",
        out=folder / "cache",
        teacher=str(shared / "teacher"),
        masking=MaskingConfig(),
        config=CacheConfig(calibration_sequences=24),
        device="cpu",
        dtype="float32",
    )
    return build_cache(build)


def gradient_angle(model, teacher, batches):
    """Between the gradients of L_ce alone, summed over batches."""
    before, model.train_config = model.train_config, replace(
        model.train_config, alpha_ce=1.0, alpha_mlm=0.0, alpha_cos=0.0
    )  # fmt: skip
    weights = (1.0, 0.0, 0.0, 0.0)
    sums = []
    for side in (offline, lambda m, b: live(m, teacher, b, weights, positions="masked")):
        sums.append(torch.stack([flat(side(model, b)[2]) for b in batches]).sum(0))
    model.train_config = before
    return angle(*sums)


@pytest.mark.slow
@pytest.mark.shared_data
def test_default_encoding_keeps_the_direction_of_the_gradient(real_cache):
    """Coded hidden states as they come by default, T = 2, a student fresh from the teacher."""
    teacher = AutoModelForMaskedLM.from_pretrained(real_cache.teacher_dir).eval()
    model = make_model(real_cache, "3x384", (5.0, 2.0, 1.0, 0.0), temperature=2.0)
    batch = make_data(real_cache, "replay+topk", batch_size=8)[0]
    assert gradient_angle(model, teacher, [batch]) <= 2.5
    totals, width = real_cache.manifest.totals, real_cache.encoding.hidden_layer().width
    # A codec of few sequences meets codes beyond those it saw.
    assert totals["clipped_codes"] < 1e-3 * totals["positions"] * width


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.timeout(1800)
def test_the_direction_is_kept_while_the_student_learns(real_cache):
    """The further the student has come, the smaller its gradient and the larger any error."""
    teacher = AutoModelForMaskedLM.from_pretrained(real_cache.teacher_dir).eval()
    model = make_model(real_cache, "3x384", (5.0, 2.0, 1.0, 0.0), temperature=2.0)
    data = make_data(real_cache, "replay+topk", batch_size=16)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=5e-4)
    for k in range(60):
        offline(model, data[k])
        torch.nn.utils.clip_grad_norm_(model.student.parameters(), 5.0)
        optimizer.step()
    assert gradient_angle(model, teacher, [data[0]]) <= 2.5
    assert gradient_angle(model, teacher, [data[k] for k in range(5)]) <= 2.5
