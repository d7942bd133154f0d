"""Toy tasks: what is learned, what a second call still has to do, and the report."""
# ruff: noqa: F811

import json
import shutil
from contextlib import closing
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from distilcache.pipeline.cli import main
from distilcache.pipeline.report.plot import as_png
from distilcache.pipeline.report.tasks_plot import retention_figure
from distilcache.pipeline.report.tasks_table import format_tasks, retention_table, tasks_page
from distilcache.stages.evaluate.masked_lms import ModelEntry
from distilcache.stages.evaluate.tasks import one_run, run
from distilcache.stages.evaluate.tasks.tensors import read_tensor
from tests.refusals import refused
from tests.stages.evaluate.tasks.tasks_support import (
    data,  # noqa: F401
    entries,  # noqa: F401
    run_on,
)
from tests.stages.models.families_support import make_model, save_with_tokenizer


@pytest.fixture
def tuned(monkeypatch):
    """Names of the runs that really trained."""
    calls = []

    def counted(job, *rest):
        result = original(job, *rest)
        calls.append(f"{job.data.task.name} {job.name} {job.seed}")
        return result

    original = run.run_job
    monkeypatch.setattr(run, "run_job", counted)
    return calls


def test_pairs_without_a_token_between_them_are_named(entries, data, tmp_path, capsys):
    """As a DNA model's and mBART's: what the model reads is then one text."""
    student = shutil.copytree(entries[1].path, tmp_path / "dna")
    state = json.loads((student / "tokenizer.json").read_text())
    ends = [(name, state["model"]["vocab"][name]) for name in ("[CLS]", "[SEP]")]
    template = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B [SEP]", special_tokens=ends
    )
    state["post_processor"] = json.loads(template.__getstate__())
    (student / "tokenizer.json").write_text(json.dumps(state))
    settings = json.loads((student / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (student / "tokenizer_config.json").write_text(json.dumps(settings))
    dna = ModelEntry(name="dna", role="student", path=student)
    run_on([entries[0], dna], data, tmp_path / "out", names=("sst2", "rte"), limit=8)
    told = [x for x in capsys.readouterr().err.splitlines() if "pairs of texts" in x]
    assert told == [
        "tasks: rte has pairs of texts, and the tokenizer of dna puts no token between the two: "
        "only token types may tell a model where the second begins"
    ]


def test_separable_sets_are_learned_and_retention_is_the_ratio(entries, data, tmp_path, capsys):
    result = run_on(entries, data, tmp_path, seeds=(0, 1))
    teacher, student, control = result["models"]
    assert [m["role"] for m in result["models"]] == ["teacher", "student", "control"]
    for model in result["models"]:
        assert model["tasks"]["sst2"]["score"] > 0.9
        assert model["tasks"]["sst2"]["low"] <= model["tasks"]["sst2"]["score"]
        assert set(model["tasks"]["sst2"]["metrics"]) == {"accuracy"}
        assert model["params"] > 0
        assert model["latency_ms"] > 0
    assert teacher["retention"] == 1
    assert student["retention"] == pytest.approx(student["macro"] / teacher["macro"])
    assert 0.45 < result["tasks"]["sst2"]["majority"] < 0.55
    assert student["params"] < teacher["params"]
    shown = capsys.readouterr()
    assert shown.err.count("tasks: sst2: ") == 6
    assert "(6/6, 00:00 left)" in shown.err
    assert shown.out == ""
    stored = json.loads((tmp_path / "sst2" / "1x32-control-seed1.json").read_text())
    assert control["tasks"]["sst2"]["seeds"]["1"] == stored["score"]
    assert stored["padding"] < 0.25


def test_an_interrupted_run_goes_on_and_ends_the_same(entries, data, tmp_path, tuned, monkeypatch):
    settings = {"names": ("sst2", "rte"), "epochs": 0.3}
    whole = run_on(entries, data, tmp_path / "whole", **settings)
    assert len(tuned) == 6
    tuned.clear()
    counted = run.run_job

    def killed(*arguments):
        if len(tuned) == 2:
            raise KeyboardInterrupt
        return counted(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_job", killed)
        with pytest.raises(KeyboardInterrupt):
            run_on(entries, data, tmp_path / "half", **settings)
    first = list(tuned)
    tuned.clear()
    result = run_on(entries, data, tmp_path / "half", **settings)
    assert len(tuned) == 4
    assert not set(first) & set(tuned)
    for ours, theirs in zip(result["models"], whole["models"], strict=True):
        assert ours["macro"] == theirs["macro"]
    tuned.clear()
    run_on(entries, data, tmp_path / "half", **settings)
    assert tuned == []


def test_what_has_changed_runs_again(entries, data, tmp_path, tuned, small_tokenizer):
    settings = {"epochs": 0.1, "seeds": (0, 1)}
    run_on(entries[:2], data, tmp_path / "out", **settings)
    tuned.clear()
    run_on(entries[:2], data, tmp_path / "out", **{**settings, "seeds": (1, 2)})
    assert tuned == ["sst2 teacher 2", "sst2 1x32 2"]
    tuned.clear()
    run_on(entries[:2], data, tmp_path / "out", **{**settings, "lr": 1e-3})
    assert len(tuned) == 4
    tuned.clear()
    # Another model under the name of the student.
    other = ModelEntry(name="1x32", role="student", path=entries[2].path)
    run_on([entries[0], other], data, tmp_path / "out", **{**settings, "lr": 1e-3})
    assert tuned == ["sst2 1x32 0", "sst2 1x32 1"]
    tuned.clear()
    (tmp_path / "out" / "sst2" / "teacher-seed0.json").write_text("{")
    run_on([entries[0], other], data, tmp_path / "out", **{**settings, "lr": 1e-3})
    assert tuned == ["sst2 teacher 0"]


def test_second_distillation_is_a_row_of_its_own(entries, data, tmp_path, tuned):
    run_on(entries, data, tmp_path, epochs=0.5)
    tuned.clear()
    result = run_on(entries, data, tmp_path, epochs=0.5, distil=True)
    # The teacher's logits are missing: it runs once more, its students do not.
    assert tuned == ["sst2 teacher 0", "sst2 1x32+distil 0", "sst2 1x32-control+distil 0"]
    names = ["teacher", "1x32", "1x32+distil", "1x32-control", "1x32-control+distil"]
    assert [m["name"] for m in result["models"]] == names
    assert [m["distilled"] for m in result["models"]] == [False, False, True, False, True]
    plain, distilled = result["models"][1:3]
    assert plain["latency_ms"] == distilled["latency_ms"]
    key = json.loads((tmp_path / "sst2" / "teacher-seed0.json").read_text())["key"]
    logits = read_tensor(tmp_path / "sst2" / "teacher-seed0.safetensors", "logits", key)
    assert logits.shape == (200, 2)
    assert read_tensor(tmp_path / "sst2" / "teacher-seed0.safetensors", "logits", "other") is None
    tuned.clear()
    run_on(entries, data, tmp_path, epochs=0.5, distil=True, distil_temperature=3.0)
    assert tuned == ["sst2 1x32+distil 0", "sst2 1x32-control+distil 0"]


def test_alpha_weighs_the_teacher_against_the_labels(entries, data, tmp_path):
    """With 0, a student learns from the labels alone, to the bit as without a teacher."""
    scores = {}
    for alpha in (0.0, 0.5, 1.0):
        settings = {"names": ("stsb",), "epochs": 2.0, "distil": True, "distil_alpha": alpha}
        _, plain, distilled = run_on(entries[:2], data, tmp_path, **settings)["models"]
        scores[alpha] = distilled["macro"]
    assert scores[0.0] == plain["macro"]
    assert len(set(scores.values())) == 3


def test_answers_are_found_in_texts(entries, data, tmp_path):
    result = run_on(
        entries[:2], data, tmp_path, names=("squad",), epochs=8.0, long_max_length=24, distil=True
    )
    teacher, student, distilled = result["models"]
    assert teacher["tasks"]["squad"]["metrics"]["exact_match"] > 0.8
    assert student["tasks"]["squad"]["metrics"]["f1"] > 0.8
    assert distilled["tasks"]["squad"]["metrics"]["f1"] > 0.8
    # Contexts come in pieces, so that there are more steps than questions tell.
    taken = {json.loads(path.read_text())["steps"] for path in tmp_path.glob("squad/*.json")}
    assert taken == {result["tasks"]["squad"]["steps"]}


def test_bad_input_is_one_line(entries, data, tmp_path, monkeypatch):
    def failure(models, **settings):
        line = refused(run_on, models, data, tmp_path / "out", **settings)
        assert line.startswith("tasks: ")
        return line

    assert "MNLI" in failure(entries, names=("sst2", "mnli"))
    assert "distil" in failure(entries[1:], distil=True)
    nowhere = ModelEntry(name="gone", role="student", path=tmp_path)
    assert "'gone'" in failure([entries[0], nowhere])
    assert not (tmp_path / "out" / "sst2").exists()
    assert "tasks.lr" in failure(entries[:1], lr=1e30)
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    assert "pip install 'scikit-learn>=1.4' 'scipy" in failure(entries)


def test_command_table_page_and_picture(entries, data, tmp_path, tiny_cache, tiny_corpus):
    cache = tiny_cache()
    home = tmp_path / "runs" / "toy"
    tokenizer = AutoTokenizer.from_pretrained(tiny_corpus / "tokenizer")
    student = make_model("distilbert", len(tokenizer), 1, dim=16, hidden_dim=32)
    save_with_tokenizer(student, tokenizer, home / "students" / "1x16")
    fields = {"name": "toy", "root": tmp_path / "runs", "cache_from": cache, "device": "cpu",
              "tasks.data": data, "tasks.epochs": 0.2, "tasks.latency_repeats": 1,
              "tasks.distil": "true", "tasks.seeds": "[7]"}  # fmt: skip
    options = [x for name, value in fields.items() for x in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(main, ["evaluate", "--tasks", "rte,stsb", *options])
    assert done.exit_code == 0, (done.output, done.exception)
    assert str(home / "report" / "tasks.md") in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "role", "rte", "stsb", "macro"]
    assert [line.split()[0] for line in lines[2:6]] == ["teacher", "1x16", "1x16+distil",
                                                        "majority"]  # fmt: skip
    result = json.loads((home / "report" / "tasks.json").read_text())
    assert format_tasks(result) in done.stdout
    page = (home / "report" / "tasks.md").read_text()
    assert "--tasks rte,stsb" in page
    assert page.count("| 1x16+distil |") == 2
    picture = (home / "report" / "tasks.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture == as_png(retention_figure(result))
    figure = retention_figure(result)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [model["name"] for model in result["models"]]
    assert not any(axes.texts for axes in figure.axes)
    again = CliRunner().invoke(main, ["evaluate", "--tasks", "rte,stsb", "--json", *options])
    assert "6 of 6 runs found" in again.stderr
    models = json.loads(again.stdout)["models"]
    assert [m["macro"] for m in models] == [m["macro"] for m in result["models"]]
    for names, word in (("rte,sts", "'stsb'"), ("", "at least one"), ("mnli", "MNLI")):
        bad = CliRunner().invoke(main, ["evaluate", "--tasks", names, *options])
        assert bad.exit_code == 2
        assert word in bad.stderr.splitlines()[-1]
        assert "Traceback" not in bad.stderr


def test_noise_between_equal_shapes_is_not_on_the_front():
    """ALBERT's layers share parameters: as many of them are not as fast."""
    shown = {"retention": None, "macro_low": 0, "macro_high": 0, "tasks": {}, "size_mb": 4.0}
    rows = [
        {"name": name, "role": role, "params": 10**6, "layers": layers, "latency_ms": ms,
         "macro": macro, **shown}
        for name, role, layers, ms, macro in (
            ("3", "student", 3, 5.01, 0.9), ("3-control", "control", 3, 5.0, 0.8),
            ("2", "student", 2, 4.0, 0.7), ("1", "student", 1, 3.0, 0.7),
        )
    ]  # fmt: skip
    _, table = retention_table({"tasks": {}, "models": rows})
    fronts = {row[0]: row[-1] for row in table}
    assert fronts == {"3": "latency, size", "3-control": "", "2": "", "1": "latency"}


def test_pages_without_a_teacher(entries, data, tmp_path):
    result = run_on(entries[1:2], data, tmp_path, epochs=0.1)
    assert result["models"][0]["retention"] is None
    last = format_tasks(result).splitlines()[-3]
    assert last.split()[-3:] == ["-", "latency,", "size"]
    assert tasks_page(result, "toy", "command").startswith("# toy")
    assert as_png(retention_figure(result)).startswith(b"\x89PNG")


def test_rate_and_time_left_are_those_of_the_steps(monkeypatch, capsys):
    """A run waits 200 s for its altered copies; then a step takes 2 s."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    with closing(one_run.Progress(runs=1, steps=101)) as progress:
        progress.start("sst2: teacher", 0)
        clock.now = 200.0
        progress.prepared()
        clock.now = 202.0
        progress.step()
    assert "1%, 1 of 101, 0.5 step/s, 03:20 left" in capsys.readouterr().err
