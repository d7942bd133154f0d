"""A student with fewer ids than the cache on the page: its answers, against its own passes."""

import numpy as np
import pytest
import torch

from distilcache.data.cache.cache import Cache
from distilcache.pipeline.look.positions import choose_positions, describe
from distilcache.pipeline.look.sample import read_samples
from distilcache.pipeline.look.students import Student
from distilcache.pipeline.look.teaching import Teaching
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.student_train.student import build_student
from distilcache.stages.student_train.trimming import trimmed_ids


def test_kl_is_over_its_ids(small_cache):
    cache = Cache.open(small_cache(hidden_dtype="float32", logits_dtype="float32"))
    trimmed, encoding = trimmed_ids(cache, 70), cache.encoding
    config = StudentConfig(sizes=("2x32",), vocabulary=70)
    model = build_student(
        size="2x32", student=config, seed=0, encoding=encoding, teacher_dir=cache.teacher_dir,
        trimmed=trimmed,
    ).eval()  # fmt: skip
    student = Student("70", "student", model, encoding.vocab_size, trimmed)
    teaching, kept, grown = Teaching(cache), torch.from_numpy(trimmed.old_n), 0
    too_long = 0
    for sample in read_samples(cache, 8, 0):
        chosen = choose_positions(sample)
        entries = describe(teaching, [student], sample, chosen, [1.0, 2.0])
        before = sample.input_ids.astype(int)
        recut = trimmed.recut(before, np.array([len(before)]), 99)
        ids, places = recut.ids, recut.places_T
        if len(ids) > 32:  # more than the student's positions
            too_long += 1
            ids, places = recut.ids[places], np.arange(len(before))
        grown += len(ids) - len(before)
        with torch.no_grad():
            own = model(torch.from_numpy(ids)[None]).logits[0]
        theirs = teaching.replayed(teaching.hidden(sample))
        for row, entry in zip(chosen.tolist(), entries, strict=True):
            ours_n = own[places[entry["position"]]]
            for number, temperature in enumerate((1.0, 2.0)):
                p, q = ((z / temperature).log_softmax(-1) for z in (theirs[row, kept], ours_n))
                kl = float((p.exp() * (p - q)).sum())
                assert entry["students"][0]["kl"][number] == pytest.approx(kl, rel=1e-3, abs=1e-4)
                log_p = np.array(entry["students"][0]["logits"]) / temperature
                log_p -= entry["students"][0]["norm"][number]
                new = trimmed.new_V[entry["tokens"]]
                wanted = np.where(new < 0, 0, q.exp().numpy()[np.maximum(new, 0)])
                assert np.exp(log_p) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert grown > 10
    assert too_long > 0
