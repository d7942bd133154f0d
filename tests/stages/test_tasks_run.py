"""Fine-tuning on toy tasks: what is learned, what a second call still has to do, and the report."""

import json
import random

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM

from data.errors import UserError
from pipeline.cli import main
from pipeline.report.tasks_plot import draw_retention
from pipeline.report.tasks_table import format_tasks, tasks_page
from stages.evaluate.models import ModelEntry
from stages.tasks import run
from stages.tasks.config import TasksConfig
from stages.tasks.features import Collate, encode
from stages.tasks.finetune import Place, fine_tune, predict
from stages.tasks.models import load_model, open_candidate
from stages.tasks.readers import Answers, Split, read_task
from stages.tasks.run import run_tasks
from stages.tasks.soft import read_soft
from stages.tasks.table import TASKS
from tests.conftest import WORDS
from tests.stages.tasks_support import write_rte, write_squad, write_sst2, write_stsb

GOOD, BAD, OTHER = WORDS[:4], WORDS[4:8], WORDS[8:]
FAST = {"epochs": 5.0, "batch_size": 16, "lr": 3e-3, "seeds": (0,), "latency_repeats": 2}


def sentence(rng, label):
    words = rng.choices((BAD, GOOD)[label][:2], k=2) + rng.choices(OTHER, k=rng.randint(1, 4))
    return " ".join(words)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Separable toy tasks: the words tell the label."""
    root, rng = tmp_path_factory.mktemp("glue"), random.Random(0)
    rows = [(sentence(rng, i % 2), i % 2) for i in range(260)]
    write_sst2(root, rows[:200], rows[200:])
    pairs = [(rng.choice(GOOD), rng.choice(OTHER), float(rng.randint(0, 5))) for _ in range(24)]
    write_stsb(root, pairs)
    names = ("not_entailment", "entailment")
    write_rte(root, [(sentence(rng, i % 2), OTHER[0], names[i % 2]) for i in range(24)])
    answers = []
    for _ in range(120):
        words = rng.choices(OTHER, k=rng.randint(8, 14))
        words.insert(rng.randrange(len(words)), "amber bridge")
        text = " ".join(words)
        answers.append(("cedar delta", text, [("amber bridge", text.index("amber bridge"))]))
    write_squad(root, answers)
    return root


@pytest.fixture(scope="module")
def entries(tmp_path_factory, small_teacher, small_tokenizer):
    """A BERT as teacher; DistilBERTs of half its depth as student and control."""
    found = [ModelEntry(name="teacher", role="teacher", path=small_teacher)]
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    for seed, name in enumerate(("1x32", "1x32-control")):
        folder = tmp_path_factory.mktemp("students") / name
        torch.manual_seed(seed)
        config = DistilBertConfig(
            vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64,
            max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.3,
        )  # fmt: skip
        DistilBertForMaskedLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        role = "control" if name.endswith("control") else "student"
        found.append(ModelEntry(name=name, role=role, path=folder))
    return found


@pytest.fixture
def place(tmp_path):
    return Place(device=torch.device("cpu"), dtype=torch.float32, scratch=tmp_path)


def run_on(entries, data, out, **settings):
    config = TasksConfig(**{"data": str(data), "names": ("sst2",), **FAST, **settings})
    return run_tasks(entries, config, out, device="cpu", dtype="float32")


@pytest.fixture
def tuned(monkeypatch):
    """Names of the runs that really trained."""
    calls = []

    def counted(job, *rest):
        result = original(job, *rest)
        calls.append(f"{job.data.task.name} {job.name} {job.seed}")
        return result

    original = run._run
    monkeypatch.setattr(run, "_run", counted)
    return calls


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
    assert "(6/6, 0:00 left)" in shown.err
    assert shown.out == ""
    stored = json.loads((tmp_path / "sst2" / "1x32-control-seed1.json").read_text())
    assert control["tasks"]["sst2"]["seeds"]["1"] == stored["score"]
    assert stored["padding"] < 0.25


def test_an_interrupted_run_goes_on_and_ends_the_same(entries, data, tmp_path, tuned, monkeypatch):
    settings = {"names": ("sst2", "rte"), "epochs": 0.3}
    whole = run_on(entries, data, tmp_path / "whole", **settings)
    assert len(tuned) == 6
    tuned.clear()
    counted = run._run

    def killed(*arguments):
        if len(tuned) == 2:
            raise KeyboardInterrupt
        return counted(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_run", killed)
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
    logits = read_soft(tmp_path / "sst2" / "teacher-seed0.safetensors", key)
    assert logits.shape == (200, 2)
    assert read_soft(tmp_path / "sst2" / "teacher-seed0.safetensors", "other") is None
    tuned.clear()
    run_on(entries, data, tmp_path, epochs=0.5, distil=True, distil_temperature=3.0)
    assert tuned == ["sst2 1x32+distil 0", "sst2 1x32-control+distil 0"]


def test_a_student_follows_the_logits_example_by_example(entries, data, place):
    task = TASKS["sst2"]
    read = read_task(task, str(data))
    tokenizer = open_candidate(entries[1]).tokenizer
    train, dev = (encode(task, part, tokenizer, 32) for part in (read.train, read.dev[""]))
    labels, right = np.array(read.train.labels), np.array(read.dev[""].labels)
    opposite = torch.nn.functional.one_hot(torch.tensor(1 - labels)).float() * 8
    config = TasksConfig(**{**FAST, "epochs": 10.0}, distil_alpha=1.0)
    model = load_model(entries[1], task, 0)
    fine_tune(model, task.kind, train, config, seed=0, place=place, soft=opposite)
    said = predict(model, task.kind, dev, 16, place).argmax(-1)
    assert (said == 1 - right).mean() > 0.9


def test_predictions_are_those_of_single_unpadded_examples(entries, data, place):
    for entry in entries[:2]:
        for name in ("rte", "squad"):
            task = TASKS[name]
            split = read_task(task, str(data)).train.part(9)
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
        assert Collate(encoded, types=False, multiple=8)(rows)["input_ids"].shape[1] == 16


def test_spans_of_tokens_are_the_answers(small_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    rng = random.Random(3)
    words = [rng.choice(OTHER) for _ in range(60)]
    words[40:40] = ["Amber", "bridge"]
    context = "  ".join(words)
    begin = context.index("Amber")
    split = Split((["cedar " * 40], [context]), [Answers(("Amber  bridge",), (begin,))])
    encoded = encode(TASKS["squad"], split, tokenizer, 32)
    assert len(encoded) > 3  # pieces
    assert max(encoded.lengths) <= 32
    held = [i for i in range(len(encoded)) if encoded.labels[i, 0] != 0]
    assert 1 <= len(held) < len(encoded)
    for i in held:
        first, last = encoded.labels[i]
        places = encoded.pieces.offsets[i]
        assert context[places[first, 0] : places[last, 1]] == "Amber  bridge"
    # Every word of the context is in some piece.
    seen = {int(at) for places in encoded.pieces.offsets for at in places[:, 0] if at >= 0}
    assert {i for i in range(len(context)) if i == 0 or context[i - 1] == " " != context[i]} <= seen


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
        with pytest.raises(UserError) as caught:
            run_on(models, data, tmp_path / "out", **settings)
        message = str(caught.value)
        assert message.startswith("tasks: ")
        assert "\n" not in message
        return message

    assert "MNLI" in failure(entries, names=("sst2", "mnli"))
    assert "distil" in failure(entries[1:], distil=True)
    nowhere = ModelEntry(name="gone", role="student", path=tmp_path)
    assert "'gone'" in failure([entries[0], nowhere])
    assert not (tmp_path / "out" / "sst2").exists()
    assert "tasks.lr" in failure(entries[:1], lr=1e30)
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    assert "pip install -e '.[tasks]'" in failure(entries)


def test_command_table_page_and_picture(entries, data, tmp_path, tiny_cache, tiny_corpus):
    cache = tiny_cache()
    home = tmp_path / "runs" / "toy"
    tokenizer = AutoTokenizer.from_pretrained(tiny_corpus / "tokenizer")
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=16, n_layers=1, n_heads=2, hidden_dim=32,
        max_position_embeddings=24, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    DistilBertForMaskedLM(config).save_pretrained(home / "students" / "1x16")
    tokenizer.save_pretrained(home / "students" / "1x16")
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
    assert picture == draw_retention(result)
    again = CliRunner().invoke(main, ["evaluate", "--tasks", "rte,stsb", "--json", *options])
    assert "6 of 6 runs found" in again.stderr
    models = json.loads(again.stdout)["models"]
    assert [m["macro"] for m in models] == [m["macro"] for m in result["models"]]
    for names, word in (("rte,sts", "'stsb'"), ("", "at least one"), ("mnli", "MNLI")):
        bad = CliRunner().invoke(main, ["evaluate", "--tasks", names, *options])
        assert bad.exit_code == 2
        assert word in bad.stderr.splitlines()[-1]
        assert "Traceback" not in bad.stderr


def test_pages_without_a_teacher(entries, data, tmp_path):
    result = run_on(entries[1:2], data, tmp_path, epochs=0.1)
    assert result["models"][0]["retention"] is None
    assert format_tasks(result).splitlines()[-3].split()[-1] == "-"
    assert tasks_page(result, "toy", "command").startswith("# toy")
    assert draw_retention(result).startswith(b"\x89PNG")
