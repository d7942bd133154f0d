"""A student with fewer ids than its teacher."""

import json

from transformers import AutoModelForMaskedLM, AutoTokenizer

from distilcache.data.cache.cache import Cache
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student
from distilcache.stages.student_train.trimming import token_counts, trimmed_ids


def train(cache, out, size="2x32", vocabulary=60, **settings):
    plain = {"batch_size": 8, "streams": 2, "steps": 4, "logging_steps": 2, "save_steps": 2}
    return train_student(
        cache_dir=cache,
        out=out,
        size=size,
        student=StudentConfig(sizes=(size,), vocabulary=vocabulary),
        train=TrainConfig(**{**plain, **settings}),
        device="cpu",
        dtype="float32",
    )


def test_trains(tiny_cache, tmp_path):
    cache = tiny_cache(positions="all", logit_positions="masked")
    c = Cache.open(cache)
    print(c.encoding.vocab_size, trimmed_ids(c, 0.9).__len__())
    t = json.loads((c.teacher_dir / "tokenizer.json").read_text())
    print(len(t["model"]["vocab"]))
    print(token_counts(c))
    r = train(cache, tmp_path / "s")
    print(r)
    m = AutoModelForMaskedLM.from_pretrained(tmp_path / "s")
    tok = AutoTokenizer.from_pretrained(tmp_path / "s")
    print(m.config.vocab_size, len(tok), tok.tokenize("amber bridge"))
