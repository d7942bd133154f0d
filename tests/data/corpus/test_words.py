"""Which tokens go on with a word: held against what tokenizers say of their own words."""

import json

import numpy as np
import pytest

from distilcache.data.corpus.words import continuations
from distilcache.data.errors import UserError
from distilcache.stages.models.tokenizers import vocabulary_size
from tests.builders import random_texts
from tests.stages.models.families_support import make_tokenizer


def content(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "xlm-roberta", "deberta-v2"])
def test_words_are_those_of_the_tokenizer(kind):
    tokenizer = make_tokenizer(kind)
    goes_on = continuations(content(tokenizer), vocabulary_size(tokenizer))
    seen = np.zeros(2, int)
    for text in random_texts(20, seed=4):
        glued = text.split()  # words that no vocabulary has
        encoded = tokenizer(" ".join(map("".join, zip(glued, glued[1:], strict=False))))
        words = encoded.word_ids()
        for i in range(1, len(words)):
            if words[i] is None or words[i - 1] is None:
                continue
            same = words[i] == words[i - 1]
            assert goes_on[encoded["input_ids"][i]] == same
            seen[int(same)] += 1
    assert (seen > 50).all()


@pytest.mark.parametrize(
    ("pieces", "goes_on"),
    [
        (["\u2581the", "re", ".", "\u2581", "\u2581(", "\u2026", "<0x0A>", "7"],
         [0, 1, 0, 0, 0, 0, 1, 1]),
        (["\u0120the", "re", "'s", "\u010a", "\u00c3\u00a9", "-", "\u0120-"],
         [0, 1, 0, 0, 1, 0, 0]),
    ],
)  # fmt: skip
def test_punctuation_and_white_space_are_no_part_of_a_word(pieces, goes_on):
    for vocab in ({p: i for i, p in enumerate(pieces)}, [[p, -1.0] for p in pieces]):
        found = continuations({"model": {"type": "X", "vocab": vocab}}, len(pieces) + 2)
        assert found.tolist() == [*map(bool, goes_on), False, False]


def test_a_vocabulary_that_marks_no_words_is_refused():
    vocab = {letter: i for i, letter in enumerate("LAGVSERTIDPKQNFYMHWC")}
    with pytest.raises(UserError, match=r"masking: unit must be 'token' .* WordLevel tokenizer"):
        continuations({"model": {"type": "WordLevel", "vocab": vocab}}, 20)
