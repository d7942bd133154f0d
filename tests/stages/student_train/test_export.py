"""The exported folder is plain Hugging Face: it opens without this project."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.trainer_utils import IntervalStrategy

from distilcache.data.errors import UserError
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.export import (
    example_of,
    export_model,
    tokenizer_config,
)
from distilcache.stages.student_train.run import train_student
from tests.command_line import run_alone

ALONE = """
import sys
from transformers import AutoModelForMaskedLM, pipeline
model, loading = AutoModelForMaskedLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
fill = pipeline("fill-mask", sys.argv[1])
print(type(model).__name__, len(fill("amber [MASK] cedar")))
"""


@pytest.fixture(scope="module")
def exported(tiny_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "1x64"
    train_student(
        cache_dir=tiny_cache(hidden_dtype="float16"),
        out=out,
        size="1x64",
        student=StudentConfig(sizes=("1x64",)),
        train=TrainConfig(steps=3, batch_size=8),
        device="cpu",
        dtype="float32",
        recipe={
            "name": "tiny",
            "teacher": {"model": Path("/home/someone/teacher")},
            "corpus": {
                "sources": ("/home/someone/a.txt", "texts/b.txt", "s3://bucket/c.txt", "/"),
                "heldout_sources": ["file:///home/someone/d.txt", "../../home/someone/e.txt"],
                "text_field": "/text",
            },
            "train": {"steps": 3, "strategy": IntervalStrategy.STEPS, "dtype": torch.float32},
        },
    )
    return out


def test_opens_in_a_process_without_the_project(exported, tmp_path):
    assert run_alone(ALONE, exported, cwd=tmp_path) == "DistilBertForMaskedLM 5\n"


def test_weights_come_back_and_the_projection_stays_behind(exported):
    model = AutoModelForMaskedLM.from_pretrained(exported)
    assert model.config.dim == 64
    assert model.vocab_projector.weight is model.distilbert.embeddings.word_embeddings.weight
    assert not any("projection" in name for name in model.state_dict())
    tokens = AutoTokenizer.from_pretrained(exported)("amber bridge", return_tensors="pt")
    assert set(tokens) == {"input_ids", "attention_mask"}
    with torch.inference_mode():
        assert model(**tokens).logits.isfinite().all()


def test_model_card(exported):
    card = (exported / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: transformers" in front
    assert "pipeline_tag: fill-mask" in front
    settings = json.loads((exported / "training.json").read_text())["settings"]
    assert settings["cache"] in card
    assert "5 L_ce" in card
    assert "2 L_mlm" in card
    assert "1 L_cos" in card
    assert "signals of a teacher (BERT, 2 layers x 32) with distilcache" in card
    assert '"name": "tiny"' in card
    assert "| tokens_per_s |" in card


@pytest.mark.parametrize(
    ("size", "init", "random"),
    [("1x32", "teacher", False), ("1x64", "teacher", True), ("1x32", "random", True)],
)
def test_the_card_of_a_control(size, init, random, small_cache, tmp_path, monkeypatch):
    """A wider student starts at random, whatever is asked for: nothing of the teacher is in it."""
    origin = {"base_model": "some/bert", "license": "mit"}
    monkeypatch.setattr(
        "distilcache.stages.student_train.run.recorded_origin", lambda _: dict(origin)
    )
    train_student(
        cache_dir=small_cache(),
        out=tmp_path / "control",
        size=size,
        student=StudentConfig(sizes=(size,), init=init),
        train=TrainConfig(steps=1, batch_size=8, alpha_ce=0, alpha_cos=0),
        device="cpu",
        dtype="float32",
        role="control",
    )
    page = (tmp_path / "control" / "README.md").read_text()
    data = ModelCard(page).data.to_dict()
    assert {name: data[name] for name in origin if name in data} == ({} if random else origin)
    assert "trained by masked language modelling with distilcache. It is the control: the" in page
    assert "the same student, first weights, data and steps, without the teacher's signals." in page
    assert "up to 32 tokens, trained on sequences of up to 16;" in page


def test_a_card_names_no_folder_of_this_machine(exported):
    settings = json.loads((exported / "README.md").read_text().split("```json")[1].split("```")[0])
    assert settings["teacher"] == {"model": "teacher"}
    assert settings["corpus"] == {
        "sources": ["a.txt", "texts/b.txt", "s3://bucket/c.txt", "/"],
        "heldout_sources": ["d.txt", "e.txt"],
        "text_field": "/text",
    }
    assert settings["train"] == {"steps": 3, "strategy": "steps", "dtype": "torch.float32"}


def test_the_example_of_a_card_is_a_masked_line_of_held_out_text(exported, tiny_cache):
    """Its text is not that of the training blocks; the pipeline takes it as it stands."""
    page = (exported / "README.md").read_text()
    line = json.loads(re.search(r"^fill\((.*)\)$", page, re.M)[1])
    provenance = json.loads((tiny_cache(hidden_dtype="float16") / "provenance.json").read_text())
    assert line == provenance["environment"]["card"]["example"]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer.tokenize(line)
    assert tokens.count(tokenizer.mask_token) == 1
    assert tokenizer.unk_token not in tokens
    assert 3 <= len(tokens) <= 12


def test_without_held_out_text_the_example_is_of_the_tokenizers_own_words(exported):
    """One that knows no English gets none, and no text of the corpus either."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer.tokenize(example_of(tokenizer))
    assert tokens.count(tokenizer.mask_token) == 1
    assert tokenizer.unk_token not in tokens
    assert len(tokens) == 9


def test_tokenizer_settings_fit_the_model(exported, tmp_path):
    config = AutoModelForMaskedLM.from_pretrained(exported).config
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 10, "mask_token": "#"}')
    values = tokenizer_config(tmp_path, config)
    assert values["model_max_length"] == 10
    assert values["mask_token"] == "#"
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizer_config(tmp_path, config)["model_max_length"] == 24


def test_missing_tokenizer_is_refused(exported, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(exported)
    with pytest.raises(UserError, match=r"must hold tokenizer\.json"):
        export_model(model, tokenizer_dir=tmp_path, out=tmp_path / "out", facts=None)
    assert not (tmp_path / "out").exists()
