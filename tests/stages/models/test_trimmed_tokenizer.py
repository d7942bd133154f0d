"""Trimmed tokenizers of all kinds, against the library's own tokenizers."""

import json
import random

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import BertProcessing, RobertaProcessing, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distilcache.stages.models.special_tokens import closing_tokens
from distilcache.stages.models.trimmed_ids import TrimmedIds
from distilcache.stages.models.trimmed_tokenizer import choose, ids_of, trim
from tests.builders import WORDS

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def texts(count, seed, extra=""):
    """Words of random syllables, a few of them often."""
    rng = random.Random(seed)
    words = WORDS + ["".join(rng.choices("aeioubcdfg", k=rng.randint(2, 9))) for _ in range(300)]
    weights = [1 / (1 + n) for n in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=20)) + extra for _ in range(count)]


TRAIN, HELDOUT = texts(400, 0, " é."), texts(100, 0) + texts(100, 1, " ünd 5 %")


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    alphabet = list("abcdefghijklmnopqrstuvwxyzéü.%5")
    trainer = trainers.WordPieceTrainer(
        vocab_size=420,
        special_tokens=[*SPECIAL, *(f"##{c}" for c in alphabet)],
        initial_alphabet=alphabet,
    )
    made.train_from_iterator(TRAIN, trainer)
    state = json.loads(made.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(state))
    ends = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ends
    )
    return made


def byte_level():
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TRAIN, trainer)
    ends = [(name, made.token_to_id(name)) for name in ("</s>", "<s>")]
    made.post_processor = RobertaProcessing(*ends)
    return made


def word_ends():
    """As XLM's: pieces at the end of a word are marked."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, end_of_word_suffix="</w>",
        initial_alphabet=list("ünd5%"),
    )  # fmt: skip
    made.train_from_iterator([*TRAIN, "ü n d 5 %", "üü nn dd 55 %%"], trainer)
    return made


def unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL[:4], unk_token="<unk>",
        initial_alphabet=list("ünd5%"),
    )  # fmt: skip
    made.train_from_iterator(TRAIN, trainer)
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])  # behind the pieces, as XLM-R's
    return made


KINDS = {"WordPiece": word_piece, "ByteLevel": byte_level, "BPE": word_ends, "Unigram": unigram}


@pytest.fixture(scope="module", params=list(KINDS))
def old(request):
    return KINDS[request.param]()


def counts_of(tokenizer, lines=TRAIN):
    ids = np.concatenate([e.ids for e in tokenizer.encode_batch(lines)])
    return np.bincount(ids, minlength=tokenizer.get_vocab_size())


def trimmed(old, wanted):
    state = json.loads(old.to_str())
    return state, trim(state, choose(state, counts_of(old), wanted))


def test_text_is_written_without_loss(old, tmp_path):
    """No more unknown tokens than before, the same text back, the same in transformers."""
    state, content = trimmed(old, 0.9)
    own = Tokenizer.from_str(json.dumps(content))
    assert own.get_vocab_size() < old.get_vocab_size() - 30
    assert sorted(ids_of(content).values()) == list(range(own.get_vocab_size()))
    kept = {t: i for t, i in ids_of(state).items() if t in ids_of(content)}
    assert sorted(kept, key=kept.get) == sorted(kept, key=ids_of(content).get)
    PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
    ).save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    grown = 0
    for text in HELDOUT:
        before, after = old.encode(text), own.encode(text)
        for found in (before, after):  # a Unigram calls an unknown token by its text
            assert own.token_to_id("<unk>") not in found.ids
        assert old.decode(before.ids) == own.decode(after.ids)
        assert opened(text)["input_ids"] == after.ids
        grown += len(after.ids) - len(before.ids)
    assert grown > 50


@pytest.mark.parametrize("parts", ["bert", "template"])
def test_what_is_put_around_a_text_is_kept(old, parts):
    """Ordinary tokens that no text uses, and that nothing but the post-processor names."""
    first, last = list(old.get_vocab(with_added_tokens=False).items())[-2:]
    around = {
        "bert": BertProcessing(last, first),
        "template": TemplateProcessing(
            single=f"{first[0]} $A {last[0]}", special_tokens=[first, last]
        ),
    }
    state = json.loads(old.to_str())
    counts = counts_of(old)
    counts[[first[1], last[1]]] = 0
    state["post_processor"] = json.loads(around[parts].__getstate__())
    content = trim(state, choose(state, counts, 0.8))
    own = Tokenizer.from_str(json.dumps(content)).encode("a")
    assert (own.tokens[0], own.tokens[-1]) == (first[0], last[0])


def test_of_two_pieces_of_one_name_text_becomes_the_first():
    """CamemBERT's vocabulary has the piece for unknown text twice."""
    pieces = [
        ("<unk>", 0.0),
        ("<pad>", 0.0),
        ("<unk>", 0.0),
        *((c, -1.0) for c in "abc"),
        ("ab", -0.5),
    ]
    old = Tokenizer(models.Unigram(pieces, 0))
    old.add_special_tokens(["<unk>", "<pad>"])
    assert old.encode("abX").ids == [6, 0]
    assert old.token_to_id("<unk>") == 2
    theirs = json.loads(old.to_str())
    kept = choose(theirs, np.array([1, 0, 0, 2, 2, 2, 1]), 5)
    assert kept == [1, 2, 3, 4, 5]
    trimmed = TrimmedIds(theirs, trim(theirs, kept))
    assert trimmed.old_n.tolist() == [1, 0, 3, 4, 5]  # the row that the teacher has trained
    assert trimmed.tokenizer().encode("abX").ids == [2, 3, 1]
    assert trimmed.recut(np.array([6, 0]), np.array([2]), 9).ids.tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("template", "sep", "closing"),
    [
        ("<s> $A", None, 0),
        ("<s> $A", "</s>", 1),  # the corpus closes it
        ("<s> $A </s>", "</s>", 1),
        ("$A </s> <s>", "</s>", 2),
        (None, "</s>", 1),
    ],
)
def test_what_closes_a_sequence_stays_when_it_is_cut(template, sep, closing):
    """By a loop over the text as the trimmed tokenizer writes it."""
    old = unigram()
    ends = [(name, old.token_to_id(name)) for name in ("<s>", "</s>")]
    if template is not None:
        old.post_processor = TemplateProcessing(single=template, special_tokens=ends)
    theirs, content = trimmed(old, 0.9)
    roles = {"cls_token": "<s>", "pad_token": "<pad>", "mask_token": "<mask>", "sep_token": sep}
    opened = PreTrainedTokenizerFast(tokenizer_object=old, **roles)
    ids = TrimmedIds(theirs, content, closing=closing_tokens(opened))
    sequences = [encoding.ids for encoding in old.encode_batch(HELDOUT)]
    if template is None:
        sequences = [[0, *sequence] for sequence in sequences]
    if template in (None, "<s> $A") and sep:
        sequences = [[*sequence, 2] for sequence in sequences]
    lengths = np.array([len(sequence) for sequence in sequences])
    longest = int(np.median(lengths))
    recut = ids.recut(np.concatenate(sequences), lengths, longest)
    found = np.split(recut.ids, np.cumsum(recut.lengths)[:-1])
    places = np.split(recut.places_T, np.cumsum(lengths)[:-1])
    cut = 0
    for sequence, new, place in zip(sequences, found, places, strict=True):
        pieces = [
            ids.recut(np.array([token]), np.array([1]), 99).ids.tolist() for token in sequence
        ]
        whole = sum(pieces, [])
        if len(whole) > longest:
            cut += 1
            whole = whole[: longest - closing] + whole[len(whole) - closing :]
        assert new.tolist() == whole
        for at, piece in zip(place, pieces, strict=True):
            assert at == -1 or whole[at] == piece[0]
        first = np.cumsum([0, *map(len, pieces)])[:-1]
        kept = (first < longest - closing) | (np.arange(len(first)) >= len(first) - closing)
        assert ((place >= 0) == kept).all()
    assert cut > 10
