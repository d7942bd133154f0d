"""What stands around a text, and what is never masked, whatever a tokenizer calls it."""

import numpy as np
import pytest
import tokenizers
from transformers import (
    AutoTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    PreTrainedTokenizerFast,
)

from distilcache.data.corpus.store import Corpus
from distilcache.stages.corpus import build
from distilcache.stages.models.special_tokens import (
    never_masked,
    puts_between,
    puts_cls_last,
    role_tokens,
    special_ids,
)
from tests.builders import WORDS, build_corpus_of, random_texts


def test_a_sequence_begins_and_ends_as_the_tokenizer_has_it():
    """Whatever its cls and sep are: some models know these only from their fine-tuning."""
    names = ["<unk>", "<s>", "</s>", "<mask>", "<sep>", "<pad>", "<cls>", "a"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>")
    )
    roles = {f"{name}_token": f"<{name}>" for name in ("unk", "mask", "sep", "pad", "cls")}

    def found(template):
        backend.post_processor = template
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **roles
        )
        made.backend_tokenizer.enable_padding(pad_id=5, pad_token="<pad>", length=8)
        assert {"<cls>", "<sep>", "<s>", "</s>"} <= set(role_tokens(made))
        return *(special_ids(made)[role] for role in ("cls", "sep")), puts_cls_last(made)

    own = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert found(own) == (1, 2, False)
    assert found(tokenizers.processors.BertProcessing(("<sep>", 4), ("<cls>", 6))) == (6, 4, False)
    last = tokenizers.processors.TemplateProcessing(
        single="$A <sep> <cls>", special_tokens=[("<sep>", 4), ("<cls>", 6)]
    )
    assert found(last) == (6, 4, True)
    language = tokenizers.processors.TemplateProcessing(
        single="$A </s> <mask>", special_tokens=[("</s>", 2), ("<mask>", 3)]
    )
    assert found(language) == (3, 2, True)


def mbart(kind, folder):
    """A tokenizer of a language, saved in a folder."""
    letters = {letter for word in WORDS for letter in word}
    named = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*named, *(f"▁{word}" for word in WORDS), "▁", *sorted(letters)]
    made = kind(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], src_lang="de_DE")
    made.save_pretrained(folder)
    return made


def sequences(texts, folder, tokenizer):
    """Those of a corpus of lines."""
    place = build_corpus_of(texts, folder, tokenizer, packing="lines", heldout_fraction=0.0)
    split = Corpus.open(place).split("train")
    blocks = [split.block(number) for number in range(len(split.block_sequences))]
    return sorted(
        part.tolist() for ids, lengths in blocks for part in np.split(ids, np.cumsum(lengths)[:-1])
    )


@pytest.mark.parametrize("kind", [MBartTokenizer, MBart50Tokenizer])
def test_a_corpus_has_the_language_where_the_tokenizer_has_it(kind, tmp_path):
    """mBART-25 reads it last, mBART-50 first."""
    mbart(kind, tmp_path / "own")
    texts = random_texts(longest=12)
    wanted = AutoTokenizer.from_pretrained(tmp_path / "own")(texts).input_ids
    assert sequences(texts, tmp_path, tmp_path / "own") == sorted(wanted)


def test_parts_of_a_corpus_that_an_older_version_began_are_made_again(tmp_path, monkeypatch):
    """It had mBART-25's sequences begin with <s>."""
    made, texts = mbart(MBartTokenizer, tmp_path / "own"), random_texts(longest=12)
    old = special_ids(made) | {"cls": made.cls_token_id}
    with monkeypatch.context() as patch:
        patch.setattr(build, "special_ids", lambda _: old)
        patch.setattr(build, "puts_cls_last", lambda _: False)
        before = sequences(texts, tmp_path, tmp_path / "own")
    (tmp_path / "corpus" / "manifest.json").unlink()
    wanted = sorted(AutoTokenizer.from_pretrained(tmp_path / "own")(texts).input_ids)
    assert before != wanted
    assert sequences(texts, tmp_path, tmp_path / "own") == wanted


def test_what_stands_around_a_text_is_neither_text_nor_masked():
    """Here no letter is known, nothing stands for unknown text, and no role names the tokens."""
    names = ["<pad>", "<mask>", "[GO]", "[LANG]", "[STOP]", "word"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>")
    )
    roles = {"pad_token": "<pad>", "mask_token": "<mask>"}

    def made(template):
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[(n, names.index(n)) for n in names[2:5]]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)

    plain = made("[GO] $A [STOP]")
    assert {r: special_ids(plain)[r] for r in ("cls", "sep", "unk")} == {
        "cls": 2, "sep": 4, "unk": -1
    }  # fmt: skip
    assert never_masked(plain) == (0, 1, 2, 4)
    assert role_tokens(plain) == ("<mask>", "<pad>", "[GO]", "[STOP]")
    assert never_masked(made("[GO] [LANG] $A [STOP]")) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("between", [True, False])
def test_whether_a_token_stands_between_two_texts(between):
    """As a pair says that is encoded, for the library's own kinds of processors."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")
    )
    ends = [("<s>", 1), ("</s>", 2)]
    made = tokenizers.processors
    processors = (
        [made.BertProcessing(*ends[::-1]), made.RobertaProcessing(*ends[::-1]),
         made.TemplateProcessing(single="$A", pair="$A </s> $B", special_tokens=ends)]
        if between
        else [None, made.ByteLevel(),
              made.TemplateProcessing(single="<s> $A", pair="<s> $A $B </s>", special_tokens=ends)]
    )  # fmt: skip
    for processor in processors:
        if processor is not None:
            backend.post_processor = processor
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a")
        ids = tokenizer("a", "a").input_ids
        first, second = (n for n, index in enumerate(ids) if index == 0)
        assert puts_between(tokenizer) == (second > first + 1) == between


def test_begin_and_end_stand_in_for_cls_and_sep():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    roles = {"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<p>", "mask_token": "<m>"}
    found = special_ids(PreTrainedTokenizerFast(tokenizer_object=backend, **roles))
    assert (found["cls"], found["sep"]) == (1, 2)
