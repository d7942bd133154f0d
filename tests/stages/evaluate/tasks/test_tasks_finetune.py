"""Examples as the library encodes them, and a model that is fine-tuned on them."""
# ruff: noqa: F811

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from distilcache.stages.evaluate.tasks.catalogue import TASKS
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import Split, read_task
from distilcache.stages.evaluate.tasks.features import Collate, Soft, encode
from distilcache.stages.evaluate.tasks.finetune import Place, fine_tune
from distilcache.stages.evaluate.tasks.predictions import predict
from distilcache.stages.evaluate.tasks.task_models import load_model, open_candidate
from distilcache.stages.evaluate.tasks.values import Answers
from tests.stages.evaluate.tasks.tasks_support import (
    FAST,
    OTHER,
    data,  # noqa: F401
    entries,  # noqa: F401
)


@pytest.fixture
def place(tmp_path):
    return Place(device=torch.device("cpu"), dtype=torch.float32, scratch=tmp_path)


def encoded(task, entries, data):
    """A task, and its examples for the student."""
    read, tokenizer = read_task(task, str(data)), open_candidate(entries[1]).tokenizer
    return read, *(encode(task, part, tokenizer, 32) for part in (read.train, read.dev[""]))


def test_a_student_follows_the_logits_example_by_example(entries, data, place):
    task = TASKS["sst2"]
    read, train, dev = encoded(task, entries, data)
    labels, right = np.array(read.train.labels), np.array(read.dev[""].labels)
    opposite = torch.nn.functional.one_hot(torch.tensor(1 - labels)).float() * 8
    config = TasksConfig(**{**FAST, "epochs": 10.0}, distil_alpha=1.0)
    model = load_model(entries[1], task, 0)
    soft = Soft(opposite, torch.ones(len(train)))
    fine_tune(model, task.kind, train, config, seed=0, place=place, soft=soft)
    said = predict(model, task.kind, dev, 16, place).argmax(-1)
    assert (said == 1 - right).mean() > 0.9


def test_what_scores_are_counted_in_changes_nothing(entries, data, place):
    task = TASKS["stsb"]
    _, train, dev = encoded(task, entries, data)
    said = []
    for labels in (train.labels, train.labels * 32 + 64, train.labels * 0 + 64):
        model = load_model(entries[1], task, 0)
        given = replace(train, labels=labels)
        fine_tune(model, task.kind, given, TasksConfig(**FAST), seed=0, place=place)
        said.append(predict(model, task.kind, dev, 16, place)[:, 0])
    np.testing.assert_allclose(said[1], said[0], rtol=1e-2, atol=1e-3)
    assert said[0].std() > 0.1
    assert abs(said[2]).max() < 3  # one score for all of them, 64


@pytest.mark.parametrize("earlier", ["multi_label_classification", "regression"])
def test_classes_are_read_as_classes_whatever_the_encoder_did_before(entries, tmp_path, earlier):
    folder = tmp_path / "encoder"
    shutil.copytree(entries[1].path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": earlier}))
    model = load_model(replace(entries[1], path=str(folder)), TASKS["sst2"], 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = pipeline("text-classification", model=model, tokenizer=tokenizer)("a", top_k=None)
    assert sum(score["score"] for score in scores) == pytest.approx(1)


def test_answers_have_a_first_and_a_last_token_whatever_the_encoder_did_before(entries, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(entries[1].path, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {str(i): name for i, name in enumerate(("no", "maybe", "yes"))}
    (folder / "config.json").write_text(json.dumps(config | {"id2label": names}))
    model = load_model(replace(entries[1], path=str(folder)), TASKS["squad"], 0)
    found = model(torch.ones(1, 7, dtype=torch.long))
    assert found.start_logits.shape == found.end_logits.shape == (1, 7)


def test_predictions_are_those_of_single_unpadded_examples(entries, data, place):
    for entry in entries[:2]:
        for name in ("rte", "squad"):
            task = TASKS[name]
            split = read_task(task, str(data)).train.sample(9)
            encoded = encode(task, split, open_candidate(entry).tokenizer, 28)
            model = load_model(entry, task, 0)
            found = predict(model, task.kind, encoded, 3, place)
            first, last = encoded.bounds[4:6]
            one = {"input_ids": torch.tensor(encoded.ids[None, first:last]).long()}
            if entry.role == "teacher":
                one["token_type_ids"] = torch.tensor(encoded.types[None, first:last]).long()
            with torch.no_grad():
                out = model(**one)
            if name == "rte":
                wanted = out.logits[0].numpy()
            else:
                wanted = torch.stack([out.start_logits[0], out.end_logits[0]]).numpy()
                found = found[..., : last - first]
            np.testing.assert_allclose(found[4], wanted, rtol=1e-4, atol=1e-5)


def test_batches_are_padded_as_the_library_pads_them(small_tokenizer, data):
    split = read_task(TASKS["rte"], str(data)).train
    for side in ("right", "left"):
        tokenizer = AutoTokenizer.from_pretrained(small_tokenizer, padding_side=side)
        encoded = encode(TASKS["rte"], split, tokenizer, 9)
        rows = [5, 0, 17, 3]
        batch = Collate(encoded, types=True)(rows)
        texts = [[column[i] for i in rows] for column in split.texts]
        wanted = tokenizer(
            *texts, truncation=True, max_length=9, padding=True, return_tensors="pt",
            return_token_type_ids=True,
        )  # fmt: skip
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert torch.equal(batch[name], wanted[name]), (side, name)
        assert batch["labels"].tolist() == [split.labels[i] for i in rows]
    # Never beyond the longest example, as a model may have no more positions.
    wide = encode(TASKS["rte"], split, tokenizer, 20)
    collate = Collate(wide, types=False, multiple=8)
    padded = {collate([i])["input_ids"].shape[1] for i in range(len(wide))}
    assert max(wide.lengths) == 18
    assert padded == {8, 16, 18}


def test_spans_of_tokens_are_the_answers(small_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    rng = random.Random(3)
    words = [rng.choice(OTHER) for _ in range(60)]
    words[40:40] = ["Amber", "bridge"]
    context = "  ".join(words)
    begin = context.index("Amber")
    split = Split((["cedar " * 40], [context]), [Answers(("Amber  bridge",), (begin,))])
    encoded = encode(TASKS["squad"], split, tokenizer, 32)
    assert len(encoded) > 3  # windows
    assert max(encoded.lengths) <= 32
    held = [i for i in range(len(encoded)) if encoded.labels[i, 0] != 0]
    assert 1 <= len(held) < len(encoded)
    for i in held:
        first, last = encoded.labels[i]
        places = encoded.windows.offsets[i]
        assert context[places[first, 0] : places[last, 1]] == "Amber  bridge"
    # Every word of the context is in some piece.
    seen = {int(at) for places in encoded.windows.offsets for at in places[:, 0] if at >= 0}
    assert {i for i in range(len(context)) if i == 0 or context[i - 1] == " " != context[i]} <= seen
