"""``distilcache finetune``: from a CSV of labelled lines to a classifier, and to int8."""
# ruff: noqa: F811

import importlib.util
import json
import random

import numpy as np
import pytest
from transformers import AutoTokenizer, pipeline

from distilcache.pipeline import export_onnx
from distilcache.pipeline import finetune as command
from distilcache.stages.evaluate.tasks.catalogue import OwnTask, own_task
from distilcache.stages.evaluate.tasks.examples import read_task
from tests.command_line import refusal, run
from tests.stages.evaluate.tasks.tasks_support import (
    entries,  # noqa: F401
    sentence,
    write_csv,
)

SETTINGS = [f"--set=tasks.{field}" for field in ("lr=3e-3", "min_steps=60", "latency_repeats=1")]
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in export_onnx.NEEDED),
    reason="the extra 'onnx' is not installed",
)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """200 lines whose words tell their label."""
    rng = random.Random(1)
    rows = [{"id": i, "review": sentence(rng, i % 2), "mood": ("bad", "good")[i % 2]}
            for i in range(200)]  # fmt: skip
    return write_csv(tmp_path_factory.mktemp("reviews") / "reviews.csv", rows)


def finetune(entries, file, out, *options):
    columns = ("--text", "review", "--label", "mood")
    return run("finetune", entries[1].path, file, out, *columns, *SETTINGS, "--set", "device=cpu",
               *options)  # fmt: skip


def test_a_csv_becomes_a_model_that_opens_everywhere(entries, reviews, tmp_path):
    done = finetune(entries, reviews, tmp_path / "mood", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    values = json.loads(done.stdout)
    assert (values["train"] + values["heldout"], values["path"]) == (200, str(tmp_path / "mood"))
    assert values["metrics"]["accuracy"] > 0.9
    assert "examples of" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mood"]
    ask = pipeline("text-classification", str(tmp_path / "mood"))
    held_out = read_task(own_task("x", OwnTask(train=reviews, text=("review",), label="mood")), "")
    texts, labels = held_out.dev[""].texts[0], held_out.dev[""].labels
    hits = [found["label"] == ("bad", "good")[label] for found, label in
            zip(ask(texts), labels, strict=True)]  # fmt: skip
    assert np.mean(hits) == pytest.approx(values["metrics"]["accuracy"])


@needs_onnx
def test_one_command_from_a_csv_to_an_int8_classifier(entries, reviews, tmp_path, monkeypatch):
    """The weights of model.onnx lie in a file of their own, as those above 1.5 GiB do."""
    import onnxruntime

    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    done = finetune(entries, reviews, tmp_path / "mood", "--onnx", "--int8", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    values = json.loads(done.stdout)
    assert values["int8"]["same_answers"] >= 0.99
    assert values["float32"]["same_answers"] == 1
    for kind, name in (("float32", "model.onnx"), ("int8", "model_int8.onnx")):
        file = tmp_path / "mood" / "onnx" / name
        size = sum(path.stat().st_size for path in file.parent.glob(f"{name}*"))
        assert (values[kind]["path"], values[kind]["bytes"]) == (str(file), size)
        onnxruntime.InferenceSession(str(file))
        assert values[kind]["latency_ms"] > 0
    # Asked apart from the command, one line after the other.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mood")
    ask = pipeline("text-classification", str(tmp_path / "mood"))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    held_out = read_task(own_task("x", OwnTask(train=reviews, text=("review",), label="mood")), "")
    texts = held_out.dev[""].texts[0]
    same = 0
    for text, own in zip(texts, ask(texts), strict=True):
        inputs = dict(tokenizer(text, return_tensors="np"))
        (logits,) = session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})
        same += ("bad", "good")[logits.argmax()] == own["label"]
    assert same / len(texts) >= 0.99


def test_what_was_trained_is_kept_when_the_export_stops(entries, reviews, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_onnx, "NEEDED", ())
    monkeypatch.setattr(command, "_export", stopped)
    done = finetune(entries, reviews, tmp_path / "mood", "--int8")
    assert done.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == [".mood.finetune"]
    monkeypatch.setattr(command, "_export", lambda *_: ({}, ["exported"]))
    done = finetune(entries, reviews, tmp_path / "mood", "--int8")
    assert done.exit_code == 0, done.output
    assert "1 of 1 runs found" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mood"]


def test_bad_input_is_one_line_and_leaves_nothing(entries, reviews, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def fails(*options, file=reviews):
        line = refusal(finetune(entries, file, out, *options))
        assert list(tmp_path.iterdir()) in ([], [tmp_path / "bad.csv"])
        return line

    assert "did you mean 'mood'" in fails("--label", "moods")
    assert "among id, review, mood" in fails("--label", "x")
    assert "set kind to regression" in fails("--label", "id")
    assert "set kind to classification" in fails("--kind", "regression")
    assert "which does not exist" in fails("--validation", tmp_path / "none.csv")
    other = write_csv(tmp_path / "bad.csv", [{"review": f"{i}", "mood": "fair"} for i in range(20)])
    assert "one of bad, good, as in" in fails("--validation", other)
    rows = [{"review": "" if i == 7 else f"{i}", "mood": ("bad", "good")[i % 2]} for i in range(20)]
    write_csv(tmp_path / "bad.csv", rows)
    assert "text must not be empty, got an empty review in" in fails(file=other)
    monkeypatch.setattr(export_onnx, "NEEDED", ("no_such_package",))
    assert "pip install 'onnx>=1.18' 'onnxruntime" in fails("--int8")
    out.mkdir()
    assert "OUT must be new" in refusal(finetune(entries, reviews, out))
