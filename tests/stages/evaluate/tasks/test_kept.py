"""Kept models: plain checkpoints that answer as the fine-tuned ones, whole or absent."""
# ruff: noqa: F811

import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, pipeline

from distilcache.data.errors import UserError
from distilcache.stages.evaluate.masked_lms import ModelEntry
from distilcache.stages.evaluate.tasks import finetune, kept, one_run
from distilcache.stages.evaluate.tasks.catalogue import SCORE, TAGS, OwnTask
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.run import run_tasks
from distilcache.stages.evaluate.tasks.task_models import HEADS
from tests.builders import WORDS
from tests.stages.evaluate.tasks.tasks_support import (
    FAST,
    data,  # noqa: F401
    entries,  # noqa: F401
    run_on,
    sentence,
    write_csv,
)
from tests.stages.models.families_support import (
    make_model,
    make_tokenizer,
    save_teacher,
    save_with_tokenizer,
)
from tests.stages.models.layouts import by_code, japanese


@pytest.fixture
def tuned(monkeypatch):
    """Names of the runs that trained, each with its predictions for the held-out examples."""
    found = {}
    original = one_run._metrics

    def noted(model, job, token_ids, config, place):
        encoded = token_ids.dev[""]
        logits = one_run.predict(model, job.data.task.kind, encoded, 16, place)
        found[f"{job.name} {job.seed}"] = (job, encoded, logits)
        return original(model, job, token_ids, config, place)

    monkeypatch.setattr(one_run, "_metrics", noted)
    return found


def opened(folder, kind):
    return HEADS[kind].from_pretrained(folder).eval()


def answers(folder, job, texts):
    """Logits of a kept model, with the tokenizer that lies beside it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = opened(folder, job.data.task.kind)
    inputs = tokenizer(*texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def test_each_row_leaves_its_model_for_the_chosen_seed(entries, data, tmp_path, tuned, monkeypatch):
    def add_projection(model, width):  # as where the teacher is wider
        model.add_module(finetune.PROJECTION, torch.nn.Linear(width, width, bias=False))

    monkeypatch.setattr(finetune, "add_projection", add_projection)
    settings = {"names": ("rte",), "seeds": (1,), "keep": (1,), "distil": True, "epochs": 0.1,
                "distil_cos": 1.0}  # fmt: skip
    run_on(entries[:2], data, tmp_path, **settings)
    there = sorted(path.name for path in (tmp_path / "rte").iterdir() if path.is_dir())
    assert there == ["1x32+distil-seed1", "1x32-seed1", "teacher-seed1"]
    for name, folder in (("teacher", there[2]), ("1x32", there[1]), ("1x32+distil", there[0])):
        job, _, logits = tuned[f"{name} 1"]
        folder = tmp_path / "rte" / folder
        found = answers(folder, job, job.data.dev[""].texts)
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
        config = json.loads((folder / "config.json").read_text())
        assert config["id2label"] == {"0": "entailment", "1": "not_entailment"}
        assert config["_name_or_path"] == ""
        assert "eager" not in json.dumps(config)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert not [key for key in file.keys() if "projection" in key]  # noqa: SIM118
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        assert tokenizer["truncation"] is None
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification")
        assert '{"text": "A text.", "text_pair": "Another."}' in card
        assert str(data) not in card
        figures = json.loads(folder.with_suffix(".json").read_text())
        result = ModelCard(card).data.eval_results[0]
        assert result.metric_value == pytest.approx(figures["metrics"]["accuracy"], abs=1e-5)
        assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", "rte")
    ask = pipeline("text-classification", str(folder))
    assert ask([{"text": "of", "text_pair": "of"}])[0]["label"] in config["label2id"]


def test_a_missing_or_damaged_model_is_made_again(entries, data, tmp_path, tuned):
    settings = {"names": ("rte",), "epochs": 0.1}
    run_on(entries[1:2], data, tmp_path, **settings)
    first = (tmp_path / "rte" / "1x32-seed0.json").read_text()

    def runs_again(**more):
        tuned.clear()
        run_on(entries[1:2], data, tmp_path, **settings, **more)
        return list(tuned)

    assert runs_again() == []
    assert runs_again(keep=(0,)) == ["1x32 0"]
    folder = tmp_path / "rte" / "1x32-seed0"
    weights = (folder / "model.safetensors").read_bytes()
    assert runs_again(keep=(0,)) == []
    (folder / "README.md").write_text("edited")
    assert runs_again(keep=(0,)) == []
    (folder / "model.safetensors").write_bytes(weights[:-8])
    assert runs_again(keep=(0,)) == ["1x32 0"]
    assert (folder / "model.safetensors").read_bytes() == weights
    (folder / "tokenizer.json").unlink()
    assert runs_again(keep=(0,)) == ["1x32 0"]
    shutil.rmtree(folder)
    assert runs_again() == []
    assert runs_again(keep=(0,)) == ["1x32 0"]
    assert runs_again(keep=(0,), seeds=(0, 1)) == ["1x32 1"]
    assert not (tmp_path / "rte" / "1x32-seed1").exists()
    metrics = [json.loads(text)["metrics"] for text in
               (first, (tmp_path / "rte" / "1x32-seed0.json").read_text())]  # fmt: skip
    assert metrics[0] == metrics[1]


def test_what_cannot_be_kept_leaves_nothing(entries, data, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_rescale", lambda *_: None)
    with pytest.raises(UserError, match="answers as the fine-tuned one, got logits of"):
        run_on(entries[1:2], data, tmp_path, names=("stsb",), epochs=0.1, keep=(0,))
    assert [path.name for path in (tmp_path / "stsb").iterdir()] == []


def test_other_weights_of_a_span_model_are_refused(entries, data, tmp_path, monkeypatch):
    plain = kept.write_weights

    def bent(model, folder):
        with torch.no_grad():
            model.qa_outputs.weight.mul_(1.01)
        plain(model, folder)

    monkeypatch.setattr(kept, "write_weights", bent)
    with pytest.raises(UserError, match="a model of squad that answers as the fine-tuned one"):
        run_on(entries[1:2], data, tmp_path, names=("squad",), epochs=0.1, keep=(0,))


def own(entries, out, rows, steps, **fields):
    task = OwnTask(train=write_csv(out / "rows.csv", rows), **fields)
    config = TasksConfig(
        **{**FAST, "names": ("mine",), "own": {"mine": task}, "keep": (0,), "min_steps": steps}
    )
    result = run_tasks(entries, config, out / "tasks", device="cpu", dtype="bfloat16")
    return result, out / "tasks" / "mine" / f"{entries[0].name}-seed0"


def test_scores_come_in_their_own_units(entries, tmp_path, tuned):
    rng = random.Random(0)
    rows = [{"text": text, "label": 300 + 100 * ("amber" in text)} for text in
            (" ".join(rng.choices(WORDS[:4], k=5)) for _ in range(120))]  # fmt: skip
    _, folder = own(entries[1:2], tmp_path, rows, kind=SCORE, steps=20)
    job, _, logits = tuned["1x32 0"]
    found = answers(folder, job, job.data.dev[""].texts)
    train = np.array(job.data.train.labels)
    np.testing.assert_allclose(found, logits * train.std() + train.mean(), rtol=1e-2)
    assert AutoConfig.from_pretrained(folder).problem_type == "regression"


def save_japanese(folder):
    """A BERT whose tokenizer is written in Python."""
    slow, files = by_code("BertJapaneseTokenizer", japanese)()
    make_model("bert", len(slow), pad_token_id=slow.pad_token_id).save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(content)


@pytest.mark.parametrize("kind", ["bert", "xlm", "flaubert", "japanese"])
def test_a_model_of_pairs_gets_the_token_types_that_it_was_taught(kind, tmp_path, tuned):
    """The general class and the Japanese one give none by themselves.

    XLM's are no types: it adds words in their place.
    """
    teacher = tmp_path / "teacher"
    if kind == "japanese":
        save_japanese(teacher)
    else:
        save_teacher(kind, teacher)
        settings = json.loads((teacher / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.pop("model_input_names", None)
        (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    rng = random.Random(0)
    rows = [{"a": sentence(rng, i % 2), "b": WORDS[i % 5], "label": i % 2} for i in range(40)]
    entry = ModelEntry(name="own", role="teacher", path=teacher)
    _, folder = own([entry], tmp_path, rows, steps=10, text=("a", "b"))
    job, _, logits = tuned["own 0"]
    found = answers(folder, job, job.data.dev[""].texts)
    np.testing.assert_allclose(found, logits, rtol=0.02, atol=0.02)


def test_tags_are_learned_and_kept(entries, tmp_path, tuned):
    rng = random.Random(0)
    rows = []
    for _ in range(100):
        words = rng.choices(WORDS[:12], k=rng.randint(2, 6))
        tags = ["B-G" if word in WORDS[:4] else "O" for word in words]
        rows.append({"text": " ".join(words), "label": " ".join(tags)})
    result, folder = own(entries[1:2], tmp_path, rows, kind=TAGS, steps=100)
    (model,) = result["models"]
    assert list(model["tasks"]["mine"]["metrics"]) == ["entity_f1"]
    assert model["macro"] > 0.9
    ask = pipeline("token-classification", str(folder), aggregation_strategy="first")
    found = ask(f"{WORDS[9]} {WORDS[0]} {WORDS[8]}")
    assert [entity["word"] for entity in found] == [WORDS[0]]
    assert "B-G" in (folder / "README.md").read_text()


def test_the_card_of_a_tagger_asks_as_its_tokenizer_can(tmp_path):
    save_japanese(tmp_path / "teacher")
    rows = [{"text": "amber of", "label": "B-G O"}, {"text": "of zebra", "label": "O B-G"}] * 12
    entry = ModelEntry("own", "teacher", tmp_path / "teacher", {"license": "cc-by-4.0"})
    _, folder = own([entry], tmp_path, rows, kind=TAGS, steps=4)
    card = (folder / "README.md").read_text()
    assert ModelCard(card).data.license == "cc-by-4.0"
    how = re.search(r'aggregation_strategy="(\w+)"', card)[1]
    pipeline("token-classification", str(folder), aggregation_strategy=how)("amber of zebra")
    assert how == "simple"


def test_padding_beyond_a_local_window_is_not_compared(tmp_path):
    teacher = save_teacher("modernbert", tmp_path / "teacher", layers=4, local_attention=8)
    rng = random.Random(0)
    texts = [rng.choices(WORDS, k=k) for k in (2, 20) * 12]
    rows = [{"text": " ".join(words), "label": " ".join("AB"[i % 2] for i in range(len(words)))}
            for words in texts]  # fmt: skip
    entry = ModelEntry(name="local", role="teacher", path=teacher)
    _, folder = own([entry], tmp_path, rows, kind=TAGS, steps=4)
    assert (folder / "model.safetensors").is_file()


def test_tags_are_learned_from_a_teacher(entries, tmp_path, tuned):
    rows = [{"text": sentence(random.Random(i), i % 2), "label": ""} for i in range(24)]
    for row in rows:
        row["label"] = " ".join("A" if w in WORDS[:4] else "B" for w in row["text"].split())
    task = OwnTask(train=write_csv(tmp_path / "rows.csv", rows), kind=TAGS)
    config = TasksConfig(**{**FAST, "names": ("mine",), "own": {"mine": task}, "min_steps": 12},
                         distil=True, distil_copies=1, distil_cos=1.0)  # fmt: skip
    result = run_tasks(entries[:2], config, tmp_path / "tasks", device="cpu", dtype="float32")
    assert [m["name"] for m in result["models"]] == ["teacher", "1x32", "1x32+distil"]
    # Logits of tokens are of no use where the tokens are others.
    shutil.copytree(entries[1].path, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["anew"])
    tokenizer.save_pretrained(tmp_path / "other")
    other = ModelEntry(name="other", role="student", path=tmp_path / "other")
    with pytest.raises(UserError, match="false for mine where students have another tokenizer"):
        run_tasks(
            [entries[0], other], replace(config, distil_copies=0), tmp_path / "x", "cpu", "float32"
        )
    assert all(m["macro"] > 0.6 for m in result["models"])


def test_other_names_of_the_same_classes_are_another_task(entries, tmp_path, tuned):
    for names in (("0", "1"), ("bad", "good")):
        rows = [{"text": sentence(random.Random(i), i % 2), "label": names[i % 2]}
                for i in range(40)]  # fmt: skip
        _, folder = own(entries[1:2], tmp_path, rows, steps=2)
        assert tuple(AutoConfig.from_pretrained(folder).id2label.values()) == names


def test_a_roberta_with_a_tokenizer_that_gives_token_types(tmp_path, tuned):
    tokenizer = make_tokenizer("bert")
    model = make_model("roberta", len(tokenizer), type_vocab_size=1)
    folder = save_with_tokenizer(model, tokenizer, tmp_path / "klue")
    rows = [{"a": sentence(random.Random(i), i % 2), "b": "of", "label": i % 2} for i in range(40)]
    entry = ModelEntry(name="klue", role="student", path=folder)
    _, made = own([entry], tmp_path, rows, steps=2, text=("a", "b"))
    job, _, logits = tuned["klue 0"]
    np.testing.assert_allclose(
        answers(made, job, job.data.dev[""].texts), logits, rtol=2e-2, atol=2e-2
    )
    ask = pipeline("text-classification", str(made))
    assert ask({"text": "of", "text_pair": "of"})
    card = (made / "README.md").read_text()
    assert "the model `klue`" in card
    assert "- student" not in card


def test_long_texts_are_cut_where_training_cut_them(entries, tmp_path, tuned, capsys):
    rows = [{"text": sentence(random.Random(i), i % 2), "label": i % 2} for i in range(40)]
    rows[0]["text"] = "of " * 50
    _, folder = own(entries[1:2], tmp_path, rows, steps=2)
    # The recipe asks for 128, and the student has 32 positions.
    told = "texts are longer than 32 tokens and are cut; 1x32 reads no more"
    assert f"mine: 1 of {len(tuned['1x32 0'][0].data.train)} {told}" in capsys.readouterr().err
    job, _, _ = tuned["1x32 0"]
    assert AutoTokenizer.from_pretrained(folder).model_max_length == job.max_length
    assert "truncation=True)" in (folder / "README.md").read_text()
    ask = pipeline("text-classification", str(folder))
    assert ask("of " * 500, truncation=True)
