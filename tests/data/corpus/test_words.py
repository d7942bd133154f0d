"""Which tokens go on with a word: held against what tokenizers say of their own words."""

import json

import numpy as np
import pytest
import tokenizers

from distilcache.data.corpus.words import continuations
from distilcache.data.errors import UserError
from distilcache.data.masks.masking import GOES_ON, joined
from distilcache.stages.models.tokenizers import load_tokenizer, vocabulary_size
from tests.builders import random_texts
from tests.stages.models.families_support import make_tokenizer, marks_word_ends
from tests.stages.models.layouts import by_code, counted_merges, moses


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
            assert (goes_on[encoded["input_ids"][i]] == GOES_ON) == same
            seen[int(same)] += 1
    assert (seen > 50).all()


BY_ENDS = {
    "phobert": by_code("PhobertTokenizer", counted_merges),
    "bertweet": by_code("BertweetTokenizer", counted_merges),
    "xlm": by_code("XLMTokenizer", moses),
    "flaubert": by_code("FlaubertTokenizer", moses),
}


@pytest.mark.parametrize("kind", [*BY_ENDS, "herbert"])
def test_words_whose_ends_are_marked_are_those_of_the_text(tmp_path, kind):
    if kind in ("xlm", "flaubert"):
        pytest.importorskip("sacremoses")
    if kind == "herbert":
        tokenizer = marks_word_ends()
    else:
        for name, text in BY_ENDS[kind]()[1].items():
            (tmp_path / name).write_text(text)
        tokenizer = load_tokenizer(tmp_path)
    places = continuations(content(tokenizer), vocabulary_size(tokenizer))
    for text in random_texts(20, seed=4):
        words = text.split()
        words = [*map("".join, zip(words, words[1:], strict=False)), *words, "a"]
        pieces = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        ids = tokenizer.encode(" ".join(words), add_special_tokens=False)
        assert ids == [i for word in pieces for i in word]
        found = joined(places[ids], np.ones(len(ids), bool))
        found[0] = False  # the first of a sequence
        assert found.tolist() == [n > 0 for word in pieces for n in range(len(word))]


def bytes_of(text):
    """A text in the characters of a byte-level vocabulary."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level.pre_tokenize_str(text)[0][0]


@pytest.mark.parametrize(
    ("pieces", "places"),
    [
        (["\u2581the", "re", ".", "\u2581", "\u2581(", "\u2026", "<0x0A>", "7", "\u0120akra"],
         [0, 1, 2, 0, 2, 2, 2, 1, 1]),
        (["\u2581the", *(f"<0x{byte:02X}>" for byte in b"a .\xe3\xe9\xea\xc3\x80")],
         [0, 1, 0, 2, 0, 0, 1, 1, 1]),
        (["\u2581the", "\u77e5\u8b58", "\u306b", "\u0e01\u0e32", "\u0e35\u0e04", "\ud55c\uad6d"],
         [0, 0, 0, 0, 1, 1]),
        ([*map(bytes_of, (" the", "re", "'s", "\n", "\u00e9", "-", " -", "\u201d", " \u201c"))],
         [0, 1, 0, 2, 1, 2, 2, 2, 2]),
        ([*map(bytes_of, (" the", "\u77e5", "\u0e01\u0e32", "\ud55c")),
          bytes_of("\u77e5")[:2], bytes_of("\u77e5")[2:], bytes_of("\ud55c")[:2]],
         [0, 0, 0, 1, 0, 1, 1]),
        (["Nam", "N@@", "Nam@@", ".", "\u2026@@", "@@", "\u0120\u1ee5@@"], [3, 1, 1, 2, 2, 1, 1]),
        (["the</w>", "the", "!</w>", "(", "</w>", "'s</w>", "\u2581a", "@@"],
         [3, 1, 2, 2, 3, 3, 1, 2]),
        (["\u2581the", "\u2581of", "re", "@@", "a@@", "a</w>"], [0, 0, 1, 2, 1, 1]),
    ],
)  # fmt: skip
def test_how_tokens_stand_in_words(pieces, places):
    """Punctuation marks are words of their own, and so are tokens of scripts without spaces."""
    for vocab in ({p: i for i, p in enumerate(pieces)}, [[p, -1.0] for p in pieces]):
        found = continuations({"model": {"type": "X", "vocab": vocab}}, len(pieces) + 2)
        assert found.tolist() == [*places, 0, 0]


def test_a_vocabulary_that_marks_no_words_is_refused():
    vocab = {letter: i for i, letter in enumerate("LAGVSERTIDPKQNFYMHWC")}
    with pytest.raises(UserError, match=r"masking: unit must be 'token' .* WordLevel tokenizer"):
        continuations({"model": {"type": "WordLevel", "vocab": vocab}}, 20)
