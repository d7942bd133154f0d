import importlib.util
import io
import itertools
import json
import random
import re
import subprocess
import sys
import unicodedata

import pytest
import tokenizers
from transformers import AutoTokenizer, EsmTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from distilcache.data.errors import UserError
from distilcache.stages.corpus.tokenise import open_tokenizer, tokenise
from distilcache.stages.models.special_tokens import (
    role_tokens,
    special_ids,
)
from distilcache.stages.models.tokenizer_doubts import tell_doubts
from distilcache.stages.models.tokenizers import (
    find_tokenizer,
    load_tokenizer,
    saved_fingerprint,
    tokenizer_fingerprint,
    vocabulary_size,
)
from distilcache.stages.models.wordpiece import BERT_SPECIAL_TOKENS, train_wordpiece
from tests.command_line import SRC
from tests.refusals import refused
from tests.stages.models.families_support import FAMOUS, make_tokenizer

DOCUMENTS = [f"The {a} {b} walked – slowly, {i} times – to Zürich!" for i in range(30)
             for a in ("old", "young", "tall") for b in ("man", "woman", "dog")]  # fmt: skip

PRINT_FINGERPRINT = """
from tests_documents import DOCUMENTS
from distilcache.stages.models.tokenizers import tokenizer_fingerprint
from distilcache.stages.models.wordpiece import train_wordpiece
print(tokenizer_fingerprint(train_wordpiece(DOCUMENTS, 320)))
"""


def test_trained_tokenizer_opens_as_a_bert_tokenizer(tmp_path):
    trained = train_wordpiece(DOCUMENTS, 320)
    trained.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.is_fast
    assert [opened.decode([i]) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert special_ids(opened) == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    ids = opened("The OLD man walked to Zurich!")["input_ids"]
    assert (ids[0], ids[-1]) == (2, 3)
    assert opened.decode(ids, skip_special_tokens=True) == "the old man walked to zurich!"
    assert vocabulary_size(opened) == len(opened) <= 320
    assert sorted(opened.get_vocab().values()) == list(range(len(opened)))
    assert tokenizer_fingerprint(opened) == tokenizer_fingerprint(trained)


def test_a_saved_tokenizer_is_known_by_its_file(tmp_path):
    trained = train_wordpiece(DOCUMENTS, 320)
    trained.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    assert saved_fingerprint(path) == tokenizer_fingerprint(trained)
    whole = path.read_text()
    for text in ("", "{}", whole[:-9], "[" * 100_000, whole.replace('"##a"', '"##A"')):
        path.write_text(text)
        assert saved_fingerprint(path) != tokenizer_fingerprint(trained)


def test_training_is_the_same_in_every_process(tmp_path):
    (tmp_path / "tests_documents.py").write_text(f"DOCUMENTS = {DOCUMENTS!r}\n")
    here = tokenizer_fingerprint(train_wordpiece(DOCUMENTS, 320))
    done = subprocess.run(
        [sys.executable, "-c", PRINT_FINGERPRINT],
        env={"PYTHONPATH": f"{SRC}:{tmp_path}", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here
    for _ in range(5):  # the library's own hash seeds differ from call to call
        assert tokenizer_fingerprint(train_wordpiece(DOCUMENTS, 320)) == here


def test_fingerprint_ignores_truncation_and_sees_the_vocabulary():
    tokenizer = train_wordpiece(DOCUMENTS, 320)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], truncation=True, padding=True, max_length=8)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["zzz"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_missing_tokenizers(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"a folder or a hub id.*not exist; bring the teacher"):
        load_tokenizer(str(tmp_path / "none"), "bring the teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"without tokenizer files"):
        load_tokenizer(str(tmp_path / "empty"))
    monkeypatch.setattr("distilcache.stages.models.hub.hub_answers", lambda *_: False)
    with pytest.raises(UserError, match="hub id that can be reached, .*pass its path") as caught:
        load_tokenizer("no-such-owner/no-such-model")
    assert "\n" not in str(caught.value)


def test_tokenizer_without_mask():
    tokenizer = train_wordpiece(DOCUMENTS, 320)
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="without mask_token"):
        special_ids(tokenizer)


def write(folder, kind, files, **tokenizer_config):
    """A folder of a model of that type with these files, in the manner of older checkpoints."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return str(folder)


@pytest.mark.parametrize("kind", FAMOUS)
def test_a_tokenizer_of_special_tokens_alone_is_none(kind, tmp_path):
    """What transformers makes up for a folder with a model and no tokenizer."""
    folder = write(tmp_path, kind, {"model.safetensors": b"", "training_args.bin": b""})
    assert find_tokenizer(folder) is None
    text = refused(load_tokenizer, folder)
    assert "without tokenizer files" in text
    assert "--set corpus.tokenizer=PATH" in text
    make_tokenizer(kind).save_pretrained(folder)
    assert tokenizer_fingerprint(load_tokenizer(folder)) == tokenizer_fingerprint(
        AutoTokenizer.from_pretrained(folder)
    )


def test_a_tokenizer_of_the_hub_without_words_is_none(tmp_path, monkeypatch):
    """There the files are not looked at."""
    whole = AutoTokenizer.from_pretrained
    folder = write(tmp_path, "bert", {})
    monkeypatch.setattr("distilcache.stages.models.hub.hub_answers", lambda *_: True)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: whole(folder))
    assert find_tokenizer("some/model") is None


CASED = "\n".join([*BERT_SPECIAL_TOKENS, "[unused0]", "the", "Cat", "cat", "London", "##s", "a"])


def test_capitals_that_can_never_be_used_are_told(tmp_path, capsys):
    folder = write(tmp_path, "bert", {"vocab.txt": CASED})
    assert load_tokenizer(folder).tokenize("London Cat") == ["[UNK]", "cat"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "has 2 words with capitals (Cat, London)" in line
    (tmp_path / "tokenizer_config.json").write_text(re.search(r"put (\{.*\}) into its", line)[1])
    assert load_tokenizer(folder).tokenize("London Cat") == ["London", "Cat"]
    assert capsys.readouterr().err == ""


HINDI = ["हिन्दी", "में", "के", "कुछ", "सूर्य"]
HANGUL = ["나라", "사람", "##은", "##이", "한국"]


def spiece(words):
    """The sentencepiece model of an ALBERT."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra 'sentencepiece'")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 50), model_writer=written, vocab_size=60,
        hard_vocab_limit=False, minloglevel=2, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
        user_defined_symbols=["[CLS]", "[SEP]", "[MASK]"],
    )  # fmt: skip
    return {"spiece.model": written.getvalue()}


def vocab(words):
    return {"vocab.txt": "\n".join([*BERT_SPECIAL_TOKENS, "the", *words])}


@pytest.mark.parametrize(
    ("kind", "files", "words"),
    [("bert", vocab, HANGUL), ("bert", vocab, HINDI), ("albert", spiece, HINDI)],
)
def test_words_whose_marks_are_taken_off_are_told(
    kind, files, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    folder = write(tmp_path, kind, files(words))
    text = " ".join(word for word in words if word[0] != "#")
    lost = load_tokenizer(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "words with accents, vowel signs or Hangul (" in line
    write(tmp_path, kind, {}, **json.loads(re.search(r"put (\{.*\}) into its", line)[1]))
    found = load_tokenizer(folder)
    assert found.decode(found(text)["input_ids"], skip_special_tokens=True) == text
    assert lost.decode(lost(text)["input_ids"], skip_special_tokens=True) != text
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("kind", "files", "words"), [("bert", vocab, HANGUL + HINDI), ("albert", spiece, HINDI)]
)
def test_words_of_an_ordinary_uncased_vocabulary_are_not_told(kind, files, words, tmp_path, capsys):
    """They were made of text without marks: single Korean letters, Latin ones without accents."""
    apart = [unicodedata.normalize("NFD", word) for word in words]
    words = ["".join(c for c in word if unicodedata.category(c)[0] != "M") for word in apart]
    load_tokenizer(write(tmp_path, kind, files([*words, "cafe", "amber"])))
    assert capsys.readouterr().err == ""


def test_a_space_mark_before_each_text_takes_nothing_off(capsys):
    """As the tokenizer.json of older SentencePiece BPEs has it."""
    pieces = [("<unk>", 0.0), *((f"▁{word}", -1.0) for word in HINDI + HANGUL)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    tell_doubts(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), {}, "x")
    assert "vowel signs" not in capsys.readouterr().err


@pytest.mark.parametrize("entry", [["x.K", None], [None, "some/repo--x.K"]])
def test_a_tokenizer_of_its_own_code_is_called_that(tmp_path, entry):
    folder = write(tmp_path, "nomic", {"vocab.txt": CASED}, auto_map={"AutoTokenizer": entry})
    line = refused(load_tokenizer, folder)
    assert line.endswith("its code lies in the repository (x.py), which distilcache does not run; "
                         "use a model that transformers holds")  # fmt: skip


def test_code_beside_a_tokenizer_that_opens_without_it_is_told(tmp_path, capsys):
    """Its code may cut text otherwise."""
    folder = write(tmp_path, "bert", {"vocab.txt": CASED}, do_lower_case=False,
                   auto_map={"AutoTokenizer": ["x.K", None]})  # fmt: skip
    load_tokenizer(folder).save_pretrained(tmp_path / "copy")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tokenizer: {folder} has code of its own (x.py), which")
    load_tokenizer(tmp_path / "copy")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["albert", "roberta", "deberta-v2"])
def test_a_vocabulary_that_the_class_of_a_type_passes_over_is_named(tmp_path, kind):
    """As Chinese and Indonesian ALBERTs have BERT's."""
    words = CASED.lower().replace("[pad]\n[unk]\n[cls]\n[sep]\n[mask]",
                                  "\n".join(BERT_SPECIAL_TOKENS))  # fmt: skip
    folder = write(tmp_path, kind, {"vocab.txt": words})
    line = refused(load_tokenizer, folder)
    assert "with vocab.txt where " in line
    settings = json.loads("{" + re.search(r"put (.*) into its tokenizer_config", line)[1] + "}")
    opened = load_tokenizer(write(tmp_path, kind, {}, **settings))
    assert opened.tokenize("the London cats") == ["the", "london", "cat", "##s"]


def test_a_lower_cased_vocabulary_is_not_told_of(tmp_path, capsys):
    words = CASED.replace("Cat\n", "").replace("London", "london")
    load_tokenizer(write(tmp_path, "bert", {"vocab.txt": words}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "spiece.model"])
def test_a_pointer_in_place_of_a_tokenizer_is_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"
    assert f"{name}, which is a Git LFS pointer" in refused(
        load_tokenizer, write(tmp_path, "bert", {name: pointer})
    )


@pytest.mark.parametrize("absent", ["sentencepiece", "google.protobuf"])
def test_a_sentencepiece_model_names_the_extra_that_it_needs(tmp_path, monkeypatch, absent):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == absent else there(n))
    text = refused(load_tokenizer, write(tmp_path, "albert", {"spiece.model": b"\x0a\x0e"}))
    assert f"got no {absent.rpartition('.')[2]}; pip install 'protobuf>=4.21'" in text


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("xlm-roberta", "sentencepiece.bpe.model"),
        ("camembert", "sentencepiece.bpe.model"),
        ("deberta-v2", "spm.model"),
        ("xlnet", "spiece.model"),
    ],
)
def test_a_sentencepiece_model_alone_opens(tmp_path, kind, name):
    """Its pieces, and more ids for the family's special tokens."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra 'sentencepiece'")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS),
        model_writer=written,
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(write(tmp_path, kind, {name: written.getvalue()}))
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    text = "the old man walked"
    assert tokenizer.tokenize(text) == model.encode(text, out_type=str)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("xlm-roberta", "sentencepiece.bpe.model"),
        ("deberta-v2", "spm.model"),
        ("big_bird", "spiece.model"),
        ("mbart", "sentencepiece.bpe.model"),
    ],
)
def test_a_sentencepiece_model_alone_keeps_its_map_of_characters(tmp_path, kind, name):
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra 'sentencepiece'")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS),
        model_writer=written,
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["[CLS]", "[SEP]", "[MASK]", "<pad>"],
    )
    tokenizer = load_tokenizer(write(tmp_path, kind, {name: written.getvalue()}))
    tokenizer.save_pretrained(tmp_path / "saved")
    write(tmp_path / "saved", kind, {})
    again = load_tokenizer(tmp_path / "saved")
    assert special_ids(again) == special_ids(tokenizer)
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    for text in ("the\u00a0old \uff4d\uff41n", "walked\u3000the", "the\nold"):
        pieces = model.encode(text, out_type=str)
        assert tokenizer.tokenize(text) == again.tokenize(text) == pieces
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


PIECES = {
    "xlm-roberta": "sentencepiece.bpe.model",
    "mbart": "sentencepiece.bpe.model",
    "camembert": "sentencepiece.bpe.model",
    "albert": "spiece.model",
    "deberta-v2": "spm.model",
    "big_bird": "spiece.model",
    "xlnet": "spiece.model",
}
ROLES = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "mask")}


def pieces_of(kind, **options):
    """The bytes of a SentencePiece model of that kind, and the library's own reading of it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra 'sentencepiece'")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=written, model_type=kind, minloglevel=2,
        hard_vocab_limit=False, vocab_size=26 if kind == "word" else 90,
        user_defined_symbols=list(ROLES.values()), pad_piece="[PAD]", **options,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return written.getvalue(), model


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("pieces", ["bpe", "word"])
def test_a_sentencepiece_model_of_another_kind_than_its_class_is_refused(kind, pieces, tmp_path):
    """transformers 5 takes each for a Unigram; what sentencepiece makes of it is the truth."""
    content, model = pieces_of(pieces, pad_id=3)
    folder = write(tmp_path, kind, {PIECES[kind]: content}, **ROLES, pad_token="[PAD]")
    line = refused(load_tokenizer, folder)
    assert f"with {PIECES[kind]}, a {pieces.upper()}; save a tokenizer.json of it" in line
    assert ("with transformers 4" in line) == (pieces == "bpe")
    if pieces == "word":
        return
    words = {model.id_to_piece(i): i for i in range(len(model))}
    proto = import_protobuf().ModelProto.FromString(content)
    made = SpmConverter.build_tokenizer_from_spm_proto(proto, words)
    write(tmp_path, kind, {"tokenizer.json": made.to_str()})
    line = refused(load_tokenizer, folder)
    assert "tokenizer.json, a BPE; put" in line
    settings = json.loads("{" + re.search(r"put (.*) and its special", line)[1] + "}")
    write(tmp_path, kind, {}, **settings, **ROLES, pad_token="[PAD]", unk_token="<unk>")
    opened = load_tokenizer(folder)
    for text in ("The old man walked", "slowly, 7 times – to Zürich!", "walked ☃☃ dog"):
        assert opened(text, add_special_tokens=False).input_ids == model.encode(text)


@pytest.mark.parametrize("kind", sorted(PIECES.keys() - {"camembert", "albert", "xlnet"}))
def test_a_sentencepiece_model_of_letters_opens(kind, tmp_path):
    """A class that takes it for a Unigram reads it all the same."""
    content, model = pieces_of("char", pad_id=3)
    opened = load_tokenizer(write(tmp_path, kind, {PIECES[kind]: content}, **ROLES))
    for text in ("The old man walked", "walked ☃☃ dog"):
        assert opened.tokenize(text) == model.encode(text, out_type=str)


def test_a_sentencepiece_model_of_another_order_than_its_class_is_read_by_its_own_rules(tmp_path):
    """As rinna's Japanese RoBERTa, which has this file alone: T5's class takes 2 for unknown."""
    content, model = pieces_of("unigram", pad_id=3)
    roles = {**ROLES, "pad_token": "[PAD]", "unk_token": "<unk>", "extra_ids": 0}
    files = {"spiece.model": content}
    folder = write(tmp_path, "roberta", files, tokenizer_class="T5Tokenizer", **roles)
    line = refused(load_tokenizer, folder)
    assert "got '</s>' from" in line
    found = re.search(r"copy its (\S+) to (\S+), with (.*) and its special tokens in", line)
    (tmp_path / found[2]).write_bytes((tmp_path / found[1]).read_bytes())
    write(tmp_path, "roberta", {}, **roles, **json.loads("{" + found[3] + "}"))
    opened = load_tokenizer(folder)
    for text in ("The old man walked", "walked ☃☃ dog"):
        assert opened(text, add_special_tokens=False).input_ids == model.encode(text)
    ids = special_ids(opened)
    assert [ids[role] for role in ("unk", "pad")] == [model.unk_id(), model.pad_id()]
    assert [ids[role] for role in ("cls", "sep", "mask")] == model.piece_to_id([*ROLES.values()])


def test_words_that_never_split_keeps_whole_and_a_tokenizer_cuts_are_told(tmp_path, capsys):
    """As AraBERT's; the reading of the slow tokenizer of transformers is the truth."""
    kept = ["[\u0628\u0631\u064a\u062f]", "[URL]", "plain"]
    files = {"vocab.txt": "\n".join([*BERT_SPECIAL_TOKENS, *kept, "the", "[", "]", "url", "##s"])}
    settings = {"never_split": [*kept, "[lacking]"], "do_lower_case": False}
    folder = write(tmp_path, "bert", files, **settings)
    text = f"the {kept[0]} plain {kept[1]}"
    slow = BertTokenizerLegacy(tmp_path / "vocab.txt", **settings)
    wanted = slow.tokenize(text)
    assert load_tokenizer(folder).tokenize(text) != wanted == text.split()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cuts {', '.join(kept[:2])}, which its never_split keeps whole" in line
    remedy = json.loads("{" + re.search(r"put (.*) into its tokenizer_config", line)[1] + "}")
    opened = load_tokenizer(write(tmp_path, "bert", {}, **settings, **remedy))
    assert opened.tokenize(text) == wanted
    opened.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").tokenize(text) == wanted
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([*"LAGVSERTIDPKQNFYMHWCXBUZO.-"], "LAGVSERTIDPKQNFYMHWCX.-JJab \t"),
        (
            ["".join(x) for x in itertools.product("ATCG", repeat=3)] + [*"ATCGN"],
            "ATCGATCGATCGN xJ",
        ),
    ],
    ids=["proteins", "dna"],
)
def test_an_esm_gets_the_fast_tokenizer_that_transformers_lacks(words, text, tmp_path):
    """Its own, slow one is the truth, for unknown letters and pairs as well."""
    names = ["<cls>", "<pad>", "<eos>", "<unk>", *words, "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    (tmp_path / "config.json").write_text('{"model_type": "esm"}')
    slow = EsmTokenizer(str(tmp_path / "vocab.txt"))
    fast = load_tokenizer(tmp_path)
    random_letters = random.Random(0)
    for length in range(1, 120):
        line = "".join(random_letters.choices(text, k=length))
        assert fast(line)["input_ids"] == slow(line)["input_ids"]
    assert fast("ATC", "GA")["input_ids"] == slow("ATC", "GA")["input_ids"]
    eos = names.index("<eos>")
    assert special_ids(fast) == {
        "pad": 1, "cls": 0, "sep": eos, "mask": len(names) - 1, "unk": 3
    }  # fmt: skip
    fast.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("GATTACA")["input_ids"] == slow("GATTACA")["input_ids"]


def test_dna_has_no_token_that_closes_a_sequence(tmp_path):
    """As the Nucleotide Transformer's files say; its own, slow tokenizer is the truth."""
    names = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "ATC", "GGA", *"ATCGN"]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    (tmp_path / "config.json").write_text('{"model_type": "esm"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    slow = AutoTokenizer.from_pretrained(tmp_path)
    fast = load_tokenizer(tmp_path)
    assert fast("ATCGGAT")["input_ids"] == slow("ATCGGAT")["input_ids"] == [3, 5, 6, 8]
    assert fast("ATC", "GGA")["input_ids"] == [3, 5, 6]  # of two texts the slow one makes nothing
    assert special_ids(fast) == {"pad": 1, "cls": 3, "sep": -1, "mask": 2, "unk": 0}
    assert role_tokens(fast) == ("<cls>", "<mask>", "<pad>", "<unk>")
    fast.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert special_ids(again) == special_ids(fast)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(fast)


@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_tokens_of_one_id_are_refused(tmp_path, kind):
    """The library would write one of them alone."""
    state = json.loads(train_wordpiece(DOCUMENTS, 320).backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words["##n"] = words["##o"]
    text = refused(
        load_tokenizer,
        write(tmp_path, "bert", {"tokenizer.json": json.dumps(state)}, tokenizer_class=kind),
    )
    assert "must have an id for each token, got '##" in text
    assert f"of the same id, {words['##o']}, in" in text


@pytest.mark.parametrize("kind", ["XLNetTokenizer", "AlbertTokenizer", "XLMRobertaTokenizer"])
@pytest.mark.parametrize("place", range(5))
def test_what_is_unknown_becomes_the_unknown_token_or_the_tokenizer_is_refused(
    place, kind, tmp_path
):
    """Classes look for the unknown token where published vocabularies have it."""
    named = ["cls", "sep", "pad", "mask"]
    named.insert(place, "unk")
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram(
            [*((f"<{name}>", 0.0) for name in named), ("▁", -2.0), ("a", -2.0)], place
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    roles = {f"{name}_token": f"<{name}>" for name in named}
    state = {"tokenizer.json": backend.to_str()}
    folder = write(tmp_path, "bert", state, tokenizer_class=kind, **roles)
    wanted = backend.encode("a ☃ a").ids
    assert wanted == [5, 6, 5, place, 5, 6]
    opened = AutoTokenizer.from_pretrained(folder)
    if opened.encode("a ☃ a", add_special_tokens=False) != wanted:
        line = refused(load_tokenizer, folder)
        assert "must read what it does not know as '<unk>', got '<" in line
        folder = write(tmp_path, "bert", {}, tokenizer_class="PreTrainedTokenizerFast", **roles)
    assert load_tokenizer(folder).encode("a ☃ a", add_special_tokens=False) == wanted


@pytest.mark.parametrize("kind", ["XLMRobertaTokenizer", "PreTrainedTokenizerFast"])
def test_bytes_that_a_class_does_not_spell_are_told(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "<mask>"]
    words = [*((name, 0.0) for name in names), ("a", -2.0), ("▁", -2.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(words, 3, byte_fallback=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    roles = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    roles = {f"{role}_token": token for role, token in roles.items()}
    state = {"tokenizer.json": backend.to_str()}
    opened = load_tokenizer(write(tmp_path, "bert", state, tokenizer_class=kind, **roles))
    ids = opened("a ☃", add_special_tokens=False).input_ids
    is_told = "spells them in bytes" in capsys.readouterr().err
    assert is_told == (ids != backend.encode("a ☃", add_special_tokens=False).ids)
    assert is_told == (kind != "PreTrainedTokenizerFast")


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel", "bytes"])
def test_a_model_without_an_unknown_token_is_refused(kind, tmp_path, capsys, monkeypatch):
    """Not one that knows all bytes; of one of words a line tells, since there may be no others."""
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    roles = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask")}
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else ["cat"]
    words = {word: i for i, word in enumerate([*roles.values(), *letters])}
    if kind == "Unigram":
        model = tokenizers.models.Unigram([(word, -1.0) for word in words])
    else:
        model = getattr(tokenizers.models, "WordLevel" if kind == "WordLevel" else "WordPiece")(
            words, unk_token="[UNK]"
        )
        if kind == "bytes":
            model.continuing_subword_prefix = ""
    backend = tokenizers.Tokenizer(model)
    if kind == "bytes":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    state = {"tokenizer.json": backend.to_str()}
    folder = write(tmp_path, "bert", state, tokenizer_class="PreTrainedTokenizerFast", **roles)
    if kind in ("WordPiece", "Unigram"):
        assert "must have an unknown token in the vocabulary" in refused(load_tokenizer, folder)
        return
    opened = load_tokenizer(folder)
    line = capsys.readouterr().err
    assert ("has no token for what it does not know" in line) == (kind == "WordLevel")
    assert opened("cat", add_special_tokens=False).input_ids
    if kind == "WordLevel":
        plain = open_tokenizer(opened.backend_tokenizer.to_str(), role_tokens(opened))
        text = refused(tokenise, plain, ["zebra"], "uint16")
        assert "corpus: tokenizer must have a token for each word and letter of the text" in text


@pytest.mark.parametrize(
    "names",
    [
        ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"],
        ["<pad>", "<unk>", "<s>", "</s>", "<mask>"],
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[mask]"],
    ],
)
def test_special_tokens_that_are_spelt_another_way_must_be_named(names, tmp_path):
    """BERT's class would add its own, for which the model has no trained rows."""
    words = [*names, "mask", "the", "##s"]
    folder = write(tmp_path, "bert", {"vocab.txt": "\n".join(words)})
    line = refused(load_tokenizer, folder)
    assert "must name its special tokens as its vocabulary does" in line
    settings = json.loads("{" + re.search(r"put (.*) into its tokenizer_config", line)[1] + "}")
    opened = load_tokenizer(write(tmp_path, "bert", {}, **settings))
    assert list(special_ids(opened).values()) == [0, 4, 1, 2, 3]
    assert vocabulary_size(opened) == len(words)


def test_special_tokens_of_a_bpe_must_be_named_as_they_are_spelt(tmp_path):
    words = [*BERT_SPECIAL_TOKENS, "a", "b", "Ġ", "ab"]
    files = {"vocab.json": json.dumps({word: i for i, word in enumerate(words)}),
             "merges.txt": "#version: 0.2\na b\n"}  # fmt: skip
    folder = write(tmp_path, "roberta", files)
    line = refused(load_tokenizer, folder)
    settings = json.loads("{" + re.search(r"put (.*) into its tokenizer_config", line)[1] + "}")
    opened = load_tokenizer(write(tmp_path, "roberta", {}, **settings))
    assert list(special_ids(opened).values()) == [0, 4, 1, 2, 3]


def test_a_bpe_without_a_mask_token_must_name_it(tmp_path):
    """RoBERTa's class would add <mask>, at the first row that the model has to spare."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "Ġ", "ab"]
    files = {"vocab.json": json.dumps({word: i for i, word in enumerate(words)}),
             "merges.txt": "#version: 0.2\na b\n"}  # fmt: skip
    folder = write(tmp_path, "roberta", files)
    assert "to which RobertaTokenizer adds <mask>; put the one" in refused(load_tokenizer, folder)
    opened = load_tokenizer(write(tmp_path, "roberta", {}, mask_token="<mask>"))
    assert special_ids(opened)["mask"] == len(words)


def test_added_tokens_must_be_read_by_the_ids_of_their_files(tmp_path):
    """The library gives them the next free ones, whatever the file says."""
    words = [*BERT_SPECIAL_TOKENS, "the", "cat", "##s"]
    token = {"content": "[NUM]", "lstrip": False, "rstrip": False, "single_word": False}
    token |= {"normalized": False, "special": False}
    text = "\n".join(words)
    ways = {
        "added_tokens.json": ({"added_tokens.json": '{"[NUM]": 11}', "vocab.txt": text}, {}),
        "tokenizer_config.json": ({"vocab.txt": text}, {"added_tokens_decoder": {"11": token}}),
    }
    for file, (files, settings) in ways.items():
        folder = tmp_path / file
        line = refused(load_tokenizer, write(folder, "bert", files, **settings))
        assert f"whose {file} gives '[NUM]' the id 11, where it is read as 8; put tokens" in line
        filled = [*words, "[unused1]", "[unused2]", "[unused3]"]
        write(folder, "bert", {"vocab.txt": "\n".join(filled)})
        assert load_tokenizer(folder).convert_tokens_to_ids(["[NUM]", "cat"]) == [11, 6]
    saved = tmp_path / "saved"
    load_tokenizer(folder).save_pretrained(saved)
    write(saved, "bert", {})
    assert load_tokenizer(saved).convert_tokens_to_ids("[NUM]") == 11
    state = json.loads((saved / "tokenizer.json").read_text())
    for word in filled[len(words) :]:
        del state["model"]["vocab"][word]
    (saved / "tokenizer.json").write_text(json.dumps(state))
    line = refused(load_tokenizer, saved)
    assert "whose tokenizer.json gives '[NUM]' the id 11, where it is read as 8" in line


def test_special_tokens_that_were_added_in_training_are_taken(tmp_path):
    """A file names them, as in a checkpoint that was saved with them."""
    words = [*BERT_SPECIAL_TOKENS[:-1], "<mask>", "mask", "the", "##s"]
    folder = write(tmp_path, "bert", {"vocab.txt": "\n".join(words)}, mask_token="[MASK]")
    assert special_ids(load_tokenizer(folder))["mask"] == len(words)


def test_what_is_unknown_becomes_no_word(tmp_path):
    """RemBERT's class takes the token with id 2 for it, whatever that is."""
    words = [("<pad>", 0.0), ("<unk>", 0.0), ("a", -2.0), ("▁", -2.0)]
    roles = {f"{name}_token": f"<{name}>" for name in ("cls", "sep", "pad", "mask", "unk")}
    words += [(role, 0.0) for role in roles.values() if (role, 0.0) not in words]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(words, 1))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    state = {"tokenizer.json": backend.to_str()}
    folder = write(tmp_path, "bert", state, tokenizer_class="RemBertTokenizer", **roles)
    assert "must read what it does not know as '<unk>', got 'a'" in refused(load_tokenizer, folder)


@pytest.mark.parametrize("kind", ["RobertaTokenizer", "PreTrainedTokenizerFast"])
def test_a_vocabulary_that_its_class_takes_for_another_kind_is_read_as_its_own(
    kind, tmp_path, capsys, monkeypatch
):
    """As CamemBERTa's, which transformers gives RoBERTa's class by the name in its config.json."""
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    made = make_tokenizer("bert")
    roles = {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIAL_TOKENS}
    state = {"tokenizer.json": made.backend_tokenizer.to_str()}
    folder = write(tmp_path, "roberta", state, tokenizer_class=kind, **roles)
    named = {"model_type": "roberta", "model_name": "camembertv2-base"}
    (tmp_path / "config.json").write_text(json.dumps(named))
    assert type(AutoTokenizer.from_pretrained(folder)).__name__ == "RobertaTokenizer"
    capsys.readouterr()
    found = load_tokenizer(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "is read as the WordPiece in its tokenizer.json, and not by RobertaTokenizer" in line
    assert found("an old river")["input_ids"] == made("an old river")["input_ids"]
    assert special_ids(found) == special_ids(made)
    found.save_pretrained(tmp_path / "student")
    write(tmp_path / "student", "roberta", {})  # a student's is without the name
    again = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert again("an old river")["input_ids"] == made("an old river")["input_ids"]


def test_special_tokens_that_a_class_adds_are_left_out(tmp_path):
    """As CamemBERT was first published: its piece for unknown text is there twice."""
    special = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>", "<s>", "</s>"]
    pieces = [(piece, 0.0) for piece in special] + [("▁a", -1.0), ("b", -2.0), ("<mask>", 0.0)]
    published = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 3))
    published.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    published.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 5), ("</s>", 6)]
    )
    published.add_special_tokens([*special, "<mask>"])
    folder = write(tmp_path, "camembert", {"tokenizer.json": published.to_str()})
    assert "<unk>NOTUSED" in AutoTokenizer.from_pretrained(folder).get_vocab()
    for place in (folder, tmp_path / "saved"):
        opened = load_tokenizer(place)
        assert vocabulary_size(opened) == len(opened) == len(pieces)
        assert opened("ab ☃").input_ids == published.encode("ab ☃").ids == [5, 7, 8, 3, 6]
        opened.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("alphabet", [[], ["\u043a"], "bytes"])
@pytest.mark.parametrize("unknown", [None, "[UNK]"])
def test_a_bpe_that_leaves_characters_out_is_told(alphabet, unknown, tmp_path, capsys, monkeypatch):
    """Either the text has unknown tokens, or a line says that they are not counted."""
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    rules, trainers = tokenizers.pre_tokenizers, tokenizers.trainers
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=unknown))
    all_bytes = alphabet == "bytes"
    backend.pre_tokenizer = rules.ByteLevel() if all_bytes else rules.Whitespace()
    backend.decoder = tokenizers.decoders.ByteLevel() if all_bytes else None
    letters = rules.ByteLevel.alphabet() if all_bytes else alphabet
    roles = {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIAL_TOKENS}
    settings = {"special_tokens": list(roles.values()), "initial_alphabet": letters}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **settings)
    backend.train_from_iterator(DOCUMENTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(tmp_path)
    opened = load_tokenizer(tmp_path)
    ids = opened("\u043a\ua66e\u043a", add_special_tokens=False).input_ids
    line = capsys.readouterr().err
    if all_bytes:
        assert (opened.decode(ids).strip(), line) == ("\u043a\ua66e\u043a", "")
    elif unknown:
        assert (ids.count(opened.unk_token_id), line) == (1 if alphabet else 3, "")
    else:
        assert (len(ids), opened.unk_token_id in ids) == (2 * len(alphabet), False)
        assert "leaves out characters that it does not know" in line
        opened.save_pretrained(tmp_path / "copy")
        load_tokenizer(tmp_path / "copy")
        assert capsys.readouterr().err == ""  # of a run's own copy it is told no more


def test_merges_are_not_skipped_at_random(tmp_path, capsys, monkeypatch):
    """BPE dropout is a field of tokenizer.json, and every reading of a text would be another."""
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    made = make_tokenizer("modernbert")
    wanted = made("an old river and an amber garden")["input_ids"]
    state = json.loads(made.backend_tokenizer.to_str())
    state["model"]["dropout"] = 0.5
    made.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    opened = load_tokenizer(tmp_path)
    assert "skips merges at random (dropout 0.5), not so here" in capsys.readouterr().err
    opened.save_pretrained(tmp_path / "saved")
    for tokenizer in (opened, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for _ in range(10):
            assert tokenizer("an old river and an amber garden")["input_ids"] == wanted


def test_rules_that_are_not_taken_from_tokenizer_json_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    made = train_wordpiece(DOCUMENTS, 320)
    backend = made.backend_tokenizer
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = write(tmp_path, "bert", {"tokenizer.json": backend.to_str()})
    assert (
        load_tokenizer(folder).tokenize("Z_x")
        != backend.encode("Z_x", add_special_tokens=False).tokens
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert 'is of BertTokenizer, which reads "cafe' in line
    assert 'in its tokenizer.json read "Café' in line
    roles = {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIAL_TOKENS}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}  # as the line says
    write(tmp_path, "bert", {}, **settings)
    assert (
        load_tokenizer(folder).tokenize("Z_x")
        == backend.encode("Z_x", add_special_tokens=False).tokens
    )
    assert capsys.readouterr().err == ""


def test_pairs_that_are_not_made_as_tokenizer_json_says_are_told(tmp_path, capsys, monkeypatch):
    """DeBERTa's of transformers 4 have one [SEP] between two texts."""
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*special, *letters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    roles = {f"{token[1:-1].lower()}_token": token for token in special}
    state = {"tokenizer.json": backend.to_str()}
    folder = write(tmp_path, "deberta", state, tokenizer_class="DebertaTokenizer", **roles)
    wanted = [1, ids["a"], 2, ids["b"], 2]
    if load_tokenizer(folder)("a", "b")["input_ids"] != wanted:
        (line,) = capsys.readouterr().err.splitlines()
        assert "reads '[CLS] A [SEP] [SEP] B [SEP]' where" in line
        assert "in its tokenizer.json read '[CLS] A [SEP] B [SEP]';" in line
        write(tmp_path, "deberta", {}, tokenizer_class="PreTrainedTokenizerFast", **roles)
    assert load_tokenizer(folder)("a", "b")["input_ids"] == wanted
    assert capsys.readouterr().err == ""
