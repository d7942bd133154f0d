"""The benchmark's loss on inner layers, against transformers' own hidden states."""

import torch
from torch.nn import functional
from transformers import AutoModelForMaskedLM

from benchmarks.inner import ALPHA, InnerLayers, everywhere
from distilcache.data.cache.cache import Cache
from distilcache.stages.student_train import assembly
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.signals import required_signals
from distilcache.stages.student_train.student import build_student
from distilcache.stages.teacher_cache.teacher import load_teacher


def test_inner_layers_follow_the_teachers(small_cache, small_teacher, monkeypatch):
    cache = Cache.open(small_cache())
    train = TrainConfig(batch_size=4, vocabulary_fraction=1.0)
    teacher = load_teacher(str(small_teacher), torch.device("cpu"), torch.float32)
    their = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    size = f"2x{teacher.width}"
    shape = StudentConfig(sizes=(size,), family="teacher")

    def student():
        return build_student(size=size, student=shape, seed=0,
                             encoding=cache.encoding, teacher_dir=cache.teacher_dir)  # fmt: skip

    signals = required_signals(cache.encoding, train)
    plain, batches = assembly.assemble(cache, student(), train, signals)
    monkeypatch.setattr(
        assembly, "DistillationModel", lambda *a, **k: InnerLayers(*a, teacher=teacher, **k)
    )
    inner, _ = assembly.assemble(cache, student(), train, signals)
    assert inner.trained_tensors().keys() == plain.trained_tensors().keys()
    batch, counts = batches[0], dict.fromkeys(("ce", "mlm", "cos", "mse", "rel"), 7.0)
    base, terms = plain.eval()(batch, counts)
    loss, again = inner.eval()(batch, counts)
    torch.testing.assert_close(again, terms)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    with torch.no_grad():
        states = [
            m(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
            for m in (inner.student, their)
        ]
    ours, theirs = states[0].hidden_states[1], states[1].hidden_states[teacher.num_layers // 2]
    away = (1 - functional.cosine_similarity(ours, theirs, dim=-1))[mask.bool()]
    torch.testing.assert_close(loss - base, ALPHA * away.mean(), rtol=1e-4, atol=1e-4)
    loss.backward()
    assert inner.student.base_model.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    assert len(everywhere(batch)) == mask.sum()
