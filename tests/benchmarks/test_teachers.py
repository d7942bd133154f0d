"""A work folder is used again for what it was made for, and for nothing else."""

import random

import pytest

from benchmarks.teachers import make_cache, random_teacher, text_corpus
from distilcache.data.errors import UserError


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    words = ["the", "old", "boat", "sailed", "north", "over", "quiet", "water"]
    path = tmp_path / "given.txt"
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=40)) for _ in range(60)))
    return path


def test_a_corpus_of_other_text_is_refused(tmp_path, text, small_tokenizer):
    made = text_corpus(tmp_path / "work", text, small_tokenizer, 8, 4)
    assert text_corpus(tmp_path / "work", text, small_tokenizer, 8, 4) == made
    text.write_text(text.read_text().replace("boat", "north"))
    with pytest.raises(UserError, match="text is new, gone or changed"):
        text_corpus(tmp_path / "work", text, small_tokenizer, 8, 4)


def test_a_cache_of_another_teacher_is_refused(tmp_path, text, small_tokenizer):
    first, other = (random_teacher(tmp_path, size, small_tokenizer) for size in ("1x32", "2x32"))
    corpus = text_corpus(tmp_path / "work", text, small_tokenizer, 8, 4)
    fingerprints = {
        make_cache(tmp_path / "work/cache", corpus, first, device="cpu").manifest.fingerprint
        for _ in range(2)
    }
    assert len(fingerprints) == 1
    with pytest.raises(UserError, match="must have been made with the same settings"):
        make_cache(tmp_path / "work/cache", corpus, other, device="cpu")
