"""Model cards: what they take over from a teacher's, the example, and figures that come later."""

import json
import re

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distilcache.data.corpus.store import Corpus
from distilcache.stages.models.cards import (
    add_results,
    card,
    masked_line,
    origin_in_cache,
    origin_of,
    origin_of_model,
    origin_of_teacher,
    recorded_origin,
)
from tests.builders import WORDS, build_corpus_of, random_texts
from tests.stages.models.families_support import marks_word_ends

TEACHER = """---
license: other
license_name: open-rail
license_link: https://example.org/licence
language: [de, en]
datasets:
- some/text
base_model: some/older
tags: [bert]
---
# A teacher
"""
ORIGIN = {"base_model": "some/bert", "license": "mit", "language": "en", "datasets": ["a/b"]}


def page(folder, text=TEACHER):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text)
    return folder


def result(task="fill-mask", value=4.5):
    return EvalResult(
        task_type=task, dataset_type="text", dataset_name="held out", metric_type="loss",
        metric_value=value,
    )  # fmt: skip


def front(text):
    """The metadata, by a reader of YAML alone."""
    return yaml.safe_load(text.split("---\n")[1])


def test_what_a_teacher_says_of_itself_holds_for_its_students(tmp_path):
    found = origin_of_teacher(str(page(tmp_path / "teacher")))
    assert found == {
        "license": "other",
        "license_name": "open-rail",
        "license_link": "https://example.org/licence",
        "language": ["de", "en"],
    }
    # Its data and its own base model are the teacher's alone, but a model fine-tuned from a
    # student has the same as the student.
    both = {"datasets": ["some/text"], "base_model": "some/older"}
    assert origin_of(tmp_path / "teacher") == {**found, **both}
    assert origin_of(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("# No metadata\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\nlicense: 3\nlanguage:\n- 5\n---\n", {}),
        ("---\nlicense: mit\nlanguage: no\n---\n", {"license": "mit", "language": "no"}),
    ],
)
def test_a_card_of_any_kind_is_read(tmp_path, text, kept):
    """Norwegian is no, which YAML 1.1 takes for false."""
    assert origin_of(page(tmp_path / "teacher", text)) == kept


def test_a_card_of_another_encoding_is_none(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert origin_of(tmp_path) == {}


def test_a_downloaded_teacher_is_the_base_model(tmp_path):
    """A path into the client's own cache says which commit of which repository it is."""
    folder = tmp_path / "models--some--bert" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    assert origin_of_teacher(str(page(folder)))["base_model"] == "some/bert"


def test_what_models_made_from_one_in_a_folder_say(tmp_path):
    """Of a student its own origin; any other is itself the base, where the hub has it."""
    student = page(tmp_path / "1x32")
    (student / "training.json").write_text("{}")
    whole = origin_of_model(student)
    assert (whole["base_model"], whole["license"]) == ("some/older", "other")
    assert whole.pop("datasets") == ["some/text"]
    assert origin_of_model(page(tmp_path / "model")) == whole
    folder = tmp_path / "models--a--b" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    assert origin_of_model(page(folder)) == {**whole, "base_model": "a/b"}


def test_models_made_from_a_caches_teacher_say_what_it_is_of():
    values = {"environment": {"card": {**ORIGIN, "example": "a [MASK]"}}}
    plain = {name: value for name, value in ORIGIN.items() if name != "datasets"}
    assert origin_in_cache(values, 1) == plain
    assert origin_in_cache(values, 2) == {n: v for n, v in plain.items() if n != "base_model"}


def test_metadata_are_those_that_hubs_read():
    text = str(card("# A model\n", pipeline_tag="fill-mask", tags=["bert"], origin=ORIGIN))
    assert front(text) == {
        **ORIGIN,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["distilcache", "bert"],
    }
    assert text.endswith("---\n\n# A model\n")
    alone = str(card("# A model\n", pipeline_tag="fill-mask", tags=[], origin={}))
    assert "base_model" not in alone


def test_what_a_cache_says_of_its_origin_is_text_or_nothing():
    """A cache may come from somebody else, and be older."""
    values = {"license": {"a": 1}, "language": ["en", 3], "example": "a [MASK]", "more": "x"}
    assert recorded_origin({"environment": {"card": values}}) == {"example": "a [MASK]"}
    for provenance in ({}, {"environment": {}}, {"environment": {"card": [1]}}):
        assert recorded_origin(provenance) == {}


def test_the_example_is_held_out_and_comes_back_token_for_token(tmp_path, small_tokenizer):
    """The held-out text has words that no training text has."""
    (tmp_path / "held.txt").write_text("\n\n".join(["silver timber under valley winter"] * 20))
    corpus = Corpus.open(
        build_corpus_of(
            [" ".join(WORDS[:9])] * 20,
            tmp_path,
            small_tokenizer,
            heldout_sources=(str(tmp_path / "held.txt"),),
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    line = masked_line(corpus, tokenizer)
    words = line.split()
    assert words.count("[MASK]") == 1
    assert set(words) - {"[MASK]"} <= {"silver", "timber", "under", "valley", "winter"}
    ids = tokenizer.encode(line, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == line


def test_the_example_of_a_protein_model_is_a_protein(tmp_path):
    """Its tokenizer reads letters without spaces between them, and decodes them with some."""
    letters = "LAGVSERTIDPKQNFYMHWC"
    names = ["<cls>", "<pad>", "<eos>", "<unk>", *letters, "<mask>"]
    plain = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = Split("", "isolated")
    ends = [("<cls>", 0), ("<eos>", 2)]
    plain.post_processor = TemplateProcessing("<cls> $A <eos>", special_tokens=ends)
    roles = {f"{name}_token": f"<{name}>" for name in ("cls", "pad", "eos", "unk", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, sep_token="<eos>", **roles)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = random_texts(40, 30, 30, words=letters)
    proteins = [text.replace(" ", "") for text in texts]
    corpus = Corpus.open(build_corpus_of(proteins, tmp_path, tmp_path / "tokenizer"))
    line = masked_line(corpus, tokenizer)
    left, right = line.split("<mask>")
    assert {*left, *right} <= {*letters}
    assert any(left in protein and right in protein for protein in proteins)
    assert len(left + right) == 11


def test_the_example_masks_a_whole_word_where_ends_of_words_are_marked(tmp_path):
    tokenizer = marks_word_ends()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = random_texts(60)
    place = build_corpus_of(
        texts, tmp_path, tmp_path / "tokenizer", packing="lines", max_length=99, min_tokens=9
    )
    line = masked_line(Corpus.open(place), tokenizer)
    left, right = (re.escape(side.strip()) for side in line.split("<mask>"))
    assert any(re.search(rf"\b{left} \w+ {right}\b", text) for text in texts)


def test_without_held_out_text_there_is_no_example(small_corpus, small_tokenizer):
    corpus = Corpus.open(small_corpus(heldout_fraction=0.0))
    assert masked_line(corpus, AutoTokenizer.from_pretrained(small_tokenizer)) == ""


def test_figures_are_added_and_replaced(tmp_path):
    text = card(
        "# 1x32 (student)\n\nMine.\n\n## Evaluation protocol\n\nOurs.\n\n## Training\n\nLoss.\n",
        pipeline_tag="fill-mask",
        tags=[],
        origin=ORIGIN,
    )
    folder = page(tmp_path / "1x32", str(text))
    add_results(folder, [result(value=4.5)], ["| loss |", "|---|", "| 4.5 |"])
    first = (folder / "README.md").read_text()
    assert first.index("## Evaluation\n") < first.index("## Training")
    (folder / "README.md").write_text(first, "utf-8-sig")  # by an editor that marks UTF-8
    add_results(folder, [result("text-classification", 80.0)], ["| tasks |"])
    add_results(folder, [result(value=4.4)], ["| loss |", "|---|", "| 4.4 |"])
    last = (folder / "README.md").read_text()
    assert last.count("## Evaluation\n") == 1
    assert "## Evaluation protocol\n\nOurs.\n" in last
    assert "4.5" not in last
    assert last.split("## Training")[1] == first.split("## Training")[1]
    assert "Mine." in last
    (index,) = front(last)["model-index"]
    assert index["name"] == "1x32"
    found = {r["task"]["type"]: r["metrics"][0]["value"] for r in index["results"]}
    assert found == {"fill-mask": 4.4, "text-classification": 80.0}
    assert ModelCard(last).data.license == "mit"
    assert {name: front(last)[name] for name in ORIGIN} == ORIGIN


def test_a_card_that_people_have_taken_away_or_broken_stays_so(tmp_path, capsys):
    add_results(tmp_path, [result()], ["figures"])
    assert not list(tmp_path.iterdir())
    folder = page(tmp_path / "model", "---\nlicense: [\n---\n# Mine\n")
    add_results(folder, [result()], ["figures"])
    assert (folder / "README.md").read_text() == "---\nlicense: [\n---\n# Mine\n"
    assert "must begin with metadata in YAML" in capsys.readouterr().err


def test_datasets_of_the_hub_are_named(tmp_path, small_corpus):
    corpus = Corpus.open(small_corpus())
    assert corpus.datasets == []
    named = ["hf:some/text:train[:1%]", "a.txt", "hf:some/text/en:train", "hf:plain:train"]
    named += [f"hf://datasets/{name}" for name in ("some/text/a.txt", "other/text@main/*.txt")]
    named += ["hf://buckets/not/one/a.txt"]
    (tmp_path / "build.json").write_text(json.dumps({"sources": named}))
    assert Corpus(tmp_path, corpus.manifest).datasets == ["some/text", "plain", "other/text"]
