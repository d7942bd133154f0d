"""Every family with heads for tasks: no padding shows in what it says, and a step changes it."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from distilcache.data.errors import UserError
from distilcache.stages.evaluate.masked_lms import ModelEntry
from distilcache.stages.evaluate.tasks import one_run
from distilcache.stages.evaluate.tasks.catalogue import TASKS, OwnTask
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.features import encode
from distilcache.stages.evaluate.tasks.finetune import Place, fine_tune
from distilcache.stages.evaluate.tasks.predictions import predict
from distilcache.stages.evaluate.tasks.run import run_tasks
from distilcache.stages.evaluate.tasks.task_models import (
    load_model,
    open_candidate,
    reads_the_end,
    takes_types,
)
from distilcache.stages.evaluate.tasks.values import Answers
from tests.builders import WORDS
from tests.refusals import refused
from tests.stages.evaluate.tasks.tasks_support import write_csv
from tests.stages.models.families_support import FAMOUS, save_teacher

FIRST = ["amber bridge", "cedar", "delta ember forest", "garden"]
SECOND = [" ".join(WORDS[i : i + n]) for i, n in ((3, 2), (7, 1), (9, 3), (12, 2))]


def test_a_type_without_a_head_for_a_task_is_named(tmp_path):
    entry = ModelEntry(name="gte", role="teacher", path=save_teacher("gte", tmp_path))
    load_model(entry, TASKS["rte"], 0)
    with pytest.raises(UserError, match="a head of squad for, got type 'gte'"):
        load_model(entry, TASKS["squad"], 0)


def test_models_that_read_an_end_token_are_timed(tmp_path):
    entry = ModelEntry(name="bart", role="teacher", path=save_teacher("bart", tmp_path / "m"))
    file = write_csv(tmp_path / "a.csv", [{"text": t, "label": i % 2} for i, t in enumerate(WORDS)])
    config = TasksConfig(names=("x",), own={"x": OwnTask(train=file)}, seeds=(0,), epochs=0.1)
    result = run_tasks([entry], config, tmp_path / "out", "cpu", "float32")
    assert result["models"][0]["latency_ms"] > 0


@pytest.mark.parametrize("part", ["train", "validation"])
def test_end_tokens_within_texts_are_refused_before_the_first_step(part, tmp_path, monkeypatch):
    entry = ModelEntry(name="mine", role="teacher", path=save_teacher("bart", tmp_path / "m"))
    candidate = open_candidate(entry)
    end = candidate.tokenizer.convert_ids_to_tokens(candidate.config.eos_token_id)
    texts = [f"{text} {i}" for i in range(4) for text in WORDS]
    for name in ("train", "validation"):
        made = [f"{text} {end}" if i < 3 and name == part else text for i, text in enumerate(texts)]
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(made)]
        write_csv(tmp_path / f"{name}.csv", rows)
    task = OwnTask(train=str(tmp_path / "train.csv"), validation=str(tmp_path / "validation.csv"))
    config = TasksConfig(names=("x",), own={"x": task}, seeds=(0,), epochs=0.1)
    monkeypatch.setattr(one_run, "fine_tune", None)
    line = refused(run_tasks, [entry], config, tmp_path / "out", "cpu", "float32")
    assert line == (
        f"tasks: text must not hold {end!r}, by which mine knows where a text ends, got 3 such "
        "texts in x; remove it from them"
    )


@pytest.mark.parametrize("kind", FAMOUS)
def test_family(kind, tmp_path):
    entry = ModelEntry(name=kind, role="teacher", path=save_teacher(kind, tmp_path / kind))
    candidate = open_candidate(entry)
    if kind == "xlnet":
        assert candidate.positions > 10**6
    else:
        from_pad = kind in ("roberta", "xlm-roberta", "camembert")
        assert candidate.positions == 40 - (2 if from_pad else 0)
    place = Place(device=torch.device("cpu"), dtype=torch.float32, scratch=tmp_path)
    config = TasksConfig(batch_size=2, epochs=0.5, lr=1e-2)
    answers = [Answers((text.split()[0],), (0,)) for text in SECOND]
    for name, labels in (("rte", [0, 1, 1, 0]), ("squad", answers)):
        task = TASKS[name]
        split = Split((FIRST, SECOND), labels)
        encoded = encode(task, split, candidate.tokenizer, 36, pad_left=kind == "xlnet")
        assert len(encoded) == 4
        model = load_model(entry, task, 0)
        if kind == "mobilebert":  # It reads a token's neighbours, padding as well; as trained: 0.
            with torch.no_grad():
                model.get_input_embeddings().weight[candidate.tokenizer.pad_token_id] = 0
        found = predict(model, task.kind, encoded, 1, place)
        for row in range(4):
            first, last = encoded.bounds[row : row + 2]
            inputs = {"input_ids": torch.tensor(encoded.ids[None, first:last]).long()}
            if takes_types(model):
                types = torch.tensor(encoded.types[None, first:last]).long()
                inputs["token_type_ids"] = types
            with torch.no_grad():
                out = model(**inputs)
            if name == "rte":
                np.testing.assert_allclose(found[row], out.logits[0], rtol=1e-3, atol=1e-4)
            else:
                both = torch.stack([out.start_logits[0], out.end_logits[0]])
                ours = found[row][:, : last - first]
                np.testing.assert_allclose(ours, both, rtol=1e-3, atol=1e-4)
        figures = fine_tune(model, task.kind, encoded, config, seed=0, place=place)
        assert figures["steps"] == 1
        changed = predict(model, task.kind, encoded, 1, place)
        assert np.isfinite(changed).all()
        assert not np.allclose(changed, found)


@pytest.mark.parametrize("kind", ["fnet", "convbert", "bert"])
def test_what_a_model_says_of_a_text_does_not_depend_on_its_batch(kind, tmp_path):
    """Some read padding; tokenizers of others pad on the left, which only XLNet's heads expect."""
    folder = save_teacher(kind, tmp_path / kind)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    entry = ModelEntry(name=kind, role="teacher", path=folder)
    texts = [" ".join(WORDS[:n]) for n in (1, 9, 4, 4, 2)]
    split = Split((texts,), [0, 1, 1, 0, 1])
    candidate = open_candidate(entry)
    left = reads_the_end(candidate.config)
    encoded = encode(TASKS["sst2"], split, candidate.tokenizer, 30, pad_left=left)
    model = load_model(entry, TASKS["sst2"], 0)
    place = Place(device=torch.device("cpu"), dtype=torch.float32, scratch=tmp_path)
    together = predict(model, "class", encoded, 8, place)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, logits in zip(texts, together, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
        np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_was_fine_tuned_gets_a_new_head(tmp_path):
    folder = save_teacher("bert", tmp_path / "bert")
    entry = ModelEntry(name="bert", role="teacher", path=folder)
    tuned = load_model(entry, TASKS["sst2"], 0)
    torch.nn.init.constant_(tuned.classifier.weight, 7.0)
    tuned.config.id2label = {0: "good", 1: "bad"}
    tuned.save_pretrained(folder)
    drawn = [load_model(entry, TASKS["sst2"], seed) for seed in (0, 0, 1)]
    weights = [model.classifier.weight for model in drawn]
    assert weights[0].abs().max() < 2
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    words = [model.get_input_embeddings().weight for model in (tuned, drawn[0])]
    assert torch.equal(*words)
    assert drawn[0].config.id2label == dict(enumerate(TASKS["sst2"].labels))
