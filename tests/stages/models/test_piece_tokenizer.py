"""Tokenizers written in Python, from text to student; the slow one is the truth."""

import json
import sys
from dataclasses import replace

import pytest
from transformers import AutoTokenizer, pipeline

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.pipeline.plan.corpus_size import _sampled
from distilcache.pipeline.recipe import load_recipe
from distilcache.stages.evaluate.tasks.catalogue import TAGS, TASKS
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.features import NO_TAG, encode
from distilcache.stages.evaluate.tasks.values import Answers
from distilcache.stages.models.piece_tokenizer import PieceTokenizer
from distilcache.stages.models.tokenizers import load_tokenizer
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student
from distilcache.stages.student_train.trimming import trimmed_ids
from tests.builders import build_corpus_of, random_texts, run_stage_one
from tests.refusals import refused
from tests.stages.corpus.corpus_support import read_sequences
from tests.stages.models.families_support import make_model
from tests.stages.models.layouts import by_code, counted_merges, japanese, moses

TEXTS = ("amber bridge of the River", "amber [MASK] bridge", "[UNK] [CLS]amber", "", "#Q ##r \n")


@pytest.fixture(scope="module", params=["bert", "roformer"])
def teacher(request, tmp_path_factory):
    """A small BERT with a Japanese tokenizer that cuts words at spaces; a RoFormer."""
    folder = tmp_path_factory.mktemp("teacher")
    settings = {"do_lower_case": False, "model_max_length": 40}
    name = "BertJapaneseTokenizer"
    if request.param == "roformer":
        pytest.importorskip("rjieba")
        name = "RoFormerTokenizer"
    slow, files = by_code(name, japanese, **settings)()
    model = make_model(request.param, len(slow), pad_token_id=slow.pad_token_id)
    model.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="module")
def slow(teacher):
    return AutoTokenizer.from_pretrained(teacher)


def test_text_and_pairs_have_the_ids_of_the_slow_tokenizer(teacher, slow):
    found = load_tokenizer(teacher)
    assert isinstance(found, PieceTokenizer)
    given = list(TEXTS)
    for longest in range(6, 24):
        for more in ([], [given[::-1]]):
            rules = {"return_token_type_ids": True, "truncation": True, "max_length": longest}
            assert found(given, *more, **rules).data == slow(given, *more, **rules).data
    rules = {"truncation": True, "max_length": 9}
    assert found(*given[:2], **rules)["input_ids"] == slow(*given[:2], **rules)["input_ids"]
    for text in TEXTS:
        assert found(text)["input_ids"] == slow(text)["input_ids"]
    ids = slow(TEXTS[0])["input_ids"]
    assert found.decode(ids) == slow.decode(ids)
    words = [text.split() for text in TEXTS[:2]]
    assert found(words, is_split_into_words=True)["input_ids"] == slow(TEXTS[:2])["input_ids"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_has_the_ids_of_the_slow_tokenizer(teacher, slow, tmp_path, workers):
    """Roles in a text are text, and no known one; the vocabulary's words are not cut again."""
    texts = [*random_texts(), "amber [MASK] bridge [PAD]"]
    made = build_corpus_of(
        texts, tmp_path, teacher, packing="lines", max_length=40, workers=workers, chunk_bytes=1024
    )
    corpus = Corpus.open(made)
    found = read_sequences(corpus, "train") + read_sequences(corpus, "heldout")
    unknown = slow.unk_token_id
    roles = {slow.mask_token_id: unknown, slow.pad_token_id: unknown}
    wanted = [[roles.get(i, i) for i in slow(text)["input_ids"]] for text in texts]
    assert sorted(found) == sorted(wanted)
    recipe = load_recipe(
        "own", [f"teacher.model={teacher}", f"corpus.sources={tmp_path / 'text.txt'}",
                "corpus.packing=lines", "corpus.max_length=40", "corpus.heldout_fraction=0.1",
                f"root={tmp_path / 'runs'}"],
    )  # fmt: skip
    assert _sampled(recipe).tokens == pytest.approx(0.9 * sum(map(len, wanted)))


def test_a_student_opens_with_the_slow_tokenizer(teacher, slow, tmp_path):
    corpus = build_corpus_of(random_texts(), tmp_path, teacher)
    assert (corpus / "tokenizer" / "tokenizer.json").is_file()
    run_stage_one(tmp_path / "cache", corpus, teacher, masking={"unit": "word"})
    cache = Cache.open(tmp_path / "cache")
    text = refused(trimmed_ids, cache, 60)
    assert "vocabulary must be 1, all" in text
    settings = TrainConfig(steps=2, batch_size=4)
    train_student(
        cache_dir=tmp_path / "cache",
        out=tmp_path / "out",
        size="1x32",
        student=StudentConfig(sizes=("1x32",)),
        train=settings,
        device="cpu",
    )
    folder = tmp_path / "out"
    assert not (folder / "tokenizer.json").exists()
    again = AutoTokenizer.from_pretrained(folder)
    assert type(again) is type(slow)
    assert again(TEXTS[0])["input_ids"] == slow(TEXTS[0])["input_ids"]
    assert pipeline("fill-mask", str(folder))("amber [MASK] bridge")
    assert isinstance(load_tokenizer(folder), PieceTokenizer)


def test_tags_belong_to_the_first_piece_of_a_word(teacher, slow):
    words = [["amber", "Londonamber", "bridge"], ["zebra"], [" ", "River", "amber"]]
    tags = [[1, 0, 1], [0], [1, 1, 0]]
    task = replace(TASKS["rte"], kind=TAGS, labels=("O", "I"))
    found = encode(task, Split((words,), tags), load_tokenizer(teacher), 36)
    for row, (of_words, of_tags) in enumerate(zip(words, tags, strict=True)):
        pieces = [slow(word, add_special_tokens=False)["input_ids"] for word in of_words]
        labels = [
            [tag] + [NO_TAG] * (len(p) - 1) for tag, p in zip(of_tags, pieces, strict=True) if p
        ]
        first, last = found.bounds[row : row + 2]
        assert found.ids[first + 1 : last - 1].tolist() == sum(pieces, [])
        assert found.labels[first:last].tolist() == [NO_TAG, *sum(labels, []), NO_TAG]


def test_answers_in_a_text_are_refused(teacher):
    split = Split((["amber"], ["amber bridge"]), [Answers(("amber",), (0,))])
    text = refused(encode, TASKS["squad"], split, load_tokenizer(teacher), 36)
    assert "squad must have a tokenizer that tells where in a text a token lies" in text


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fugashi", None)
    files = {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\namber\n"}
    settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    files["tokenizer_config.json"] = json.dumps(settings)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    text = refused(load_tokenizer, tmp_path)
    assert "You need to install fugashi" in text
    assert "for installation; pip install 'fugashi>=" in text


def test_emojis_that_would_stay_unknown_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    _, files = by_code("BertweetTokenizer", counted_merges, normalization=True)()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert "must have the package emoji" in refused(load_tokenizer, tmp_path)


@pytest.mark.parametrize("name", ["PhobertTokenizer", "BertweetTokenizer"])
def test_a_tokenizer_json_beside_the_files_that_the_code_reads_changes_nothing(
    tmp_path, name, capsys, monkeypatch
):
    """As both are published."""
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    _, files = by_code(name, counted_merges)()
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
        for file, content in files.items():
            (tmp_path / folder / file).write_text(content)
    (tmp_path / "without" / "tokenizer.json").unlink()
    slow = AutoTokenizer.from_pretrained(tmp_path / "without")
    capsys.readouterr()
    found = load_tokenizer(tmp_path / "with")
    assert capsys.readouterr().err == ""
    for text in TEXTS:
        assert found(text)["input_ids"] == slow(text)["input_ids"]
    assert len(found) == len(slow)


@pytest.mark.parametrize("name", ["PhobertTokenizer", "BertweetTokenizer"])
def test_a_line_feed_is_no_part_of_a_word(tmp_path, name):
    _, files = by_code(name, counted_merges)()
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    found = load_tokenizer(tmp_path)
    ids = found("amber am")["input_ids"]
    assert found.unk_token_id not in ids
    for text in ("amber\nam", "amber \n am\n", "amber\n\n\nam"):
        assert found(text)["input_ids"] == ids


@pytest.mark.parametrize("codes", ["", "a m\nr i\n"])
def test_lost_merges_are_refused(tmp_path, codes):
    """An empty file, and a copy that BERTweet's class has saved, without counts."""
    _, files = by_code("BertweetTokenizer", counted_merges)()
    for name, content in {**files, "bpe.codes": codes}.items():
        (tmp_path / name).write_text(content)
    assert "must have merges of two pieces" in refused(load_tokenizer, tmp_path)


def test_the_files_of_a_class_are_named(tmp_path):
    """Whether the class is named, or is that of the model's type."""
    _, files = by_code("PhobertTokenizer", counted_merges)()
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_text(files[name])
    text = refused(load_tokenizer, tmp_path)
    assert text.endswith("; PhobertTokenizer reads bpe.codes, vocab.txt")
    pytest.importorskip("sacremoses")
    folder = tmp_path / "another"
    folder.mkdir()
    (folder / "vocab.json").write_text(moses()["vocab.json"])
    (folder / "config.json").write_text('{"model_type": "xlm"}')
    text = refused(load_tokenizer, folder)
    assert text.endswith("; XLMTokenizer reads merges.txt, vocab.json")


def test_a_vocabulary_that_nothing_says_how_to_read_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text(japanese()["vocab.txt"])
    text = refused(load_tokenizer, tmp_path)
    assert 'a tokenizer_config.json with "tokenizer_class", which say how to read it' in text


@pytest.mark.parametrize("settings", [{}, {"word_tokenizer_type": "mecab"}])
def test_a_vocabulary_is_saved_as_it_was_read(tmp_path, settings):
    """A word that stands there twice: the class's own copy has a line less, and other ids."""
    if settings:
        pytest.importorskip("fugashi")
        settings = {**settings, "do_word_tokenize": False, "mecab_kwargs": {"mecab_dic": "ipadic"}}
    words = japanese()["vocab.txt"].split("\n")
    twice = "\n".join([*words[:60], words[60], *words[60:]])
    slow, files = by_code("BertJapaneseTokenizer", lambda: {"vocab.txt": twice}, **settings)()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = load_tokenizer(tmp_path)
    found.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "vocab.txt").read_text() == twice
    assert "local_files_only" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    text = " ".join(words[50:75])
    for again in (load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(
            tmp_path / "saved")):  # fmt: skip
        assert again(text)["input_ids"] == found(text)["input_ids"] == slow(text)["input_ids"]


def test_a_tokenizer_of_other_inputs_is_refused(tmp_path):
    """A RoCBert's gives the shapes and sounds of characters as well."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\namber\n")
    for name in ("word_shape.json", "word_pronunciation.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RoCBertTokenizer"}')
    text = refused(load_tokenizer, tmp_path)
    assert "must make ids of texts alone, got RoCBertTokenizer" in text
