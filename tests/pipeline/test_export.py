"""``distilcache export``: ONNX files give the model's own outputs, or are not there."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from distilcache.pipeline import export_onnx as export
from tests.command_line import ROOT, refusal, run
from tests.stages.models.families_support import make_model, make_tokenizer

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")

VOCABULARY = 60


def run_export(student, folder):
    """The values that the command prints; the student's folder and file lie in ``folder``."""
    student.save_pretrained(folder / "student")
    done = run("export", folder / "student", "--onnx", folder / "x.onnx", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def same_logits(file, student, types=False):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = ["input_ids", "attention_mask", "token_type_ids"][: 3 if types else 2]
    assert [i.name for i in session.get_inputs()] == names
    for batch, length in ((1, 1), (4, 40)):
        ids = torch.randint(2, VOCABULARY, (batch, length))
        second = (torch.arange(length) > length // 2).long().expand(batch, -1).contiguous()
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": second}
        given = {name: given[name] for name in names}
        (found,) = session.run(["logits"], {name: t.numpy() for name, t in given.items()})
        with torch.no_grad():
            own = student(**given).logits
        torch.testing.assert_close(torch.from_numpy(found), own, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    student = make_model("distilbert", VOCABULARY, layers=2)
    return student, folder, run_export(student, folder)


def test_the_file_gives_the_students_logits_at_any_size(exported):
    student, folder, values = exported
    assert values["bytes"] == (folder / "x.onnx").stat().st_size
    assert sorted(p.name for p in folder.iterdir()) == ["student", "x.onnx"]
    same_logits(folder / "x.onnx", student)


@pytest.mark.parametrize(("kind", "types"), [("bert", True), ("roberta", False)])
def test_pairs_are_told_apart_where_the_tokenizer_does(kind, types, tmp_path):
    """RoBERTa's embeddings have two types by default, and its tokenizer gives none."""
    sizes = {"layers": 1, "type_vocab_size": 2, "max_position_embeddings": 80}
    student = make_model(kind, VOCABULARY, **sizes)
    make_tokenizer(kind).save_pretrained(tmp_path / "student")
    run_export(student, tmp_path)
    same_logits(tmp_path / "x.onnx", student, types)


def test_the_file_holds_no_paths_of_this_machine(exported):
    _, folder, values = exported
    content = (folder / "x.onnx").read_bytes()
    for path in (ROOT, Path(torch.__file__).parent, Path(transformers.__file__).parent):
        assert str(path).encode() not in content
    assert values["bytes"] < 1.5 * (folder / "student" / "model.safetensors").stat().st_size


def save_task_model(kind, head, folder):
    """A model of a task with random weights; larger ones, so that outputs differ."""
    config = make_model(kind, VOCABULARY, layers=1).config
    config.initializer_range = 0.3
    config.num_labels = 2 if "Question" in head.__name__ else 3
    torch.manual_seed(1)
    model = head.from_config(config).eval()
    model.save_pretrained(folder)
    return model


TASKS = [
    ("bert", transformers.AutoModelForSequenceClassification, ["logits"]),
    ("distilbert", transformers.AutoModelForTokenClassification, ["logits"]),
    ("distilbert", transformers.AutoModelForQuestionAnswering, ["start_logits", "end_logits"]),
]


@pytest.mark.parametrize(("kind", "head", "outputs"), TASKS)
def test_task_models_in_float32_and_int8(kind, head, outputs, tmp_path):
    model = save_task_model(kind, head, tmp_path / "m")
    done = run("export", tmp_path / "m", "--onnx", tmp_path / "x.onnx", "--int8",
               tmp_path / "y.onnx", "--json")  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    values = json.loads(done.stdout)
    assert values["outputs"] == outputs
    assert values["int8"]["bytes"] == (tmp_path / "y.onnx").stat().st_size
    assert values["int8"]["bytes"] < values["float32"]["bytes"]
    assert values["model_latency_ms"] > 0
    ids = torch.randint(2, VOCABULARY, (4, 20))
    types = (torch.arange(20) > 9).long().expand(4, -1).contiguous()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "bert":
        inputs["token_type_ids"] = types
    with torch.no_grad():
        own = model(**inputs)
    for file, room in (("x.onnx", 1e-4), ("y.onnx", 0.3)):
        session = onnxruntime.InferenceSession(str(tmp_path / file))
        assert [i.name for i in session.get_inputs()] == list(inputs)
        found = session.run(outputs, {name: t.numpy() for name, t in inputs.items()})
        for name, array in zip(outputs, found, strict=True):
            gap = (torch.from_numpy(array) - own[name]).square().mean().sqrt()
            assert gap <= room * own[name].std()


def test_a_task_model_asks_for_what_its_tokenizer_gives(tmp_path):
    """Tokenizers of ALBERT, BigBird and HerBERT give no token types, and their models take some."""
    save_task_model("bert", transformers.AutoModelForSequenceClassification, tmp_path / "m")
    make_tokenizer("bert").save_pretrained(tmp_path / "m")
    settings = tmp_path / "m" / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | names))
    done = run("export", tmp_path / "m", "--onnx", tmp_path / "x.onnx")
    assert done.exit_code == 0, (done.output, done.exception)
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    given = dict(
        transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("of", return_tensors="np")
    )
    assert sorted(i.name for i in session.get_inputs()) == sorted(given) == sorted(*names.values())
    session.run(None, {name: array % VOCABULARY for name, array in given.items()})


def test_features_and_int8_alone(tmp_path):
    student = make_model("distilbert", VOCABULARY, layers=2)
    student.save_pretrained(tmp_path / "m")
    done = run("export", tmp_path / "m", "--int8", tmp_path / "y.onnx", "--features")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "last_hidden_state" in done.stdout
    assert "random tokens" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "y.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "y.onnx"))
    ids = torch.randint(2, VOCABULARY, (2, 9))
    given = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    (found,) = session.run(["last_hidden_state"], given)
    with torch.no_grad():
        own = student.distilbert(input_ids=ids).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(found), own, dim=-1)
    assert cosine.min() > 0.95


@pytest.mark.slow
def test_another_family(tmp_path):
    student = make_model(
        "roberta", VOCABULARY, layers=2, max_position_embeddings=42, pad_token_id=1
    )
    run_export(student, tmp_path)
    same_logits(tmp_path / "x.onnx", student)


def test_a_file_is_written_once_the_old_one_is_away(exported, tmp_path, monkeypatch):
    student, file = exported[1] / "student", tmp_path / "x.onnx"
    file.write_text("mine")
    monkeypatch.setattr(export, "_write", lambda _, part: shutil.copy(exported[1] / "x.onnx", part))
    words = ("export", student, "--onnx")
    assert "file must be new, got" in refusal(run(*words, file))
    assert run(*words, tmp_path / "y.onnx").exit_code == 0
    file.rename(tmp_path / "mine")
    assert run(*words, file).exit_code == 0


def test_weights_in_a_file_of_their_own_lie_beside_the_graph(exported, tmp_path, monkeypatch):
    """As torch writes those above 1.5 GiB, whatever it is asked for."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    words = ("export", exported[1] / "student", "--onnx", tmp_path / "x.onnx", "--int8")
    (tmp_path / "x.onnx.data").write_text("mine")
    assert "x.onnx.data, which is there" in refusal(run(*words, tmp_path / "y.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx.data"]
    (tmp_path / "x.onnx.data").unlink()
    done = run(*words, tmp_path / "y.onnx", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(sizes) == ["x.onnx", "x.onnx.data", "y.onnx"]
    assert json.loads(done.stdout)["bytes"] == sizes["x.onnx"] + sizes["x.onnx.data"]
    assert sizes["x.onnx.data"] > 4 * exported[0].num_parameters() / 2
    same_logits(tmp_path / "x.onnx", exported[0])


def test_files_on_two_disks(exported, tmp_path, monkeypatch):
    disks = {tmp_path / "a", tmp_path / "b"}
    for disk in disks:
        disk.mkdir()
    rename = os.replace

    def within_a_disk(source, target):
        if not any(disk in Path(source).parents and disk in Path(target).parents for disk in disks):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(os, "replace", within_a_disk)
    monkeypatch.setattr(export, "_write", lambda _, part: shutil.copy(exported[1] / "x.onnx", part))
    files = (tmp_path / "a" / "x.onnx", tmp_path / "b" / "x.onnx")
    done = run("export", exported[1] / "student", "--onnx", files[0], "--int8", files[1])
    assert done.exit_code == 0, (done.output, done.exception)
    assert sorted(tmp_path.rglob("*")) == sorted([*disks, *files])
    assert files[0].read_bytes() == (exported[1] / "x.onnx").read_bytes() != files[1].read_bytes()


def test_outputs_that_are_no_numbers_are_refused(exported, tmp_path, monkeypatch):
    student = make_model("distilbert", VOCABULARY, layers=1)
    torch.nn.init.constant_(student.vocab_projector.bias, float("nan"))
    student.save_pretrained(tmp_path / "student")
    monkeypatch.setattr(export, "_write", lambda _, part: shutil.copy(exported[1] / "x.onnx", part))
    done = run("export", tmp_path / "student", "--onnx", tmp_path / "x.onnx")
    assert "logits that differ by nan of the largest; nothing was written" in refusal(done)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_other_outputs_are_refused_and_nothing_is_left(exported, tmp_path, monkeypatch):
    make_model("distilbert", VOCABULARY, layers=1).save_pretrained(tmp_path / "student")
    theirs = exported[1] / "x.onnx"
    monkeypatch.setattr(export, "_write", lambda model, part: shutil.copy(theirs, part))
    done = run("export", tmp_path / "student", "--onnx", tmp_path / "x.onnx")
    assert "must be the student's own" in refusal(done)
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    def fails(*arguments):
        done = run("export", *arguments)
        assert done.stderr.count("\n") == 1
        return refusal(done)

    file = tmp_path / "x.onnx"
    assert "student must be a folder with a config.json" in fails(tmp_path, "--onnx", file)
    make_model("xlnet", VOCABULARY, layers=1).save_pretrained(tmp_path / "xlnet")
    assert "got an XLNet" in fails(tmp_path / "xlnet", "--onnx", file)
    save_task_model("xlnet", transformers.AutoModelForSequenceClassification, tmp_path / "task")
    assert "that torch can export, got a XLNetForS" in fails(tmp_path / "task", "--onnx", file)
    headless = make_model("distilbert", VOCABULARY, layers=1).distilbert
    headless.save_pretrained(tmp_path / "headless")
    assert "without vocab_layer_norm" in fails(tmp_path / "headless", "--onnx", file)
    assert not file.exists()
    assert "folder of the file must exist" in fails(tmp_path, "--onnx", tmp_path / "a" / "x.onnx")
    file.write_text("mine")
    assert "file must be new" in fails(tmp_path, "--onnx", file)
    assert file.read_text() == "mine"
    assert "--onnx, --int8 or --sentence-transformers must be given" in fails(tmp_path)
    assert "must differ" in fails(tmp_path, "--onnx", tmp_path / "z", "--int8", tmp_path / "z")
    monkeypatch.setattr(export, "NEEDED", ("no_such_package",))
    assert "pip install 'onnx>=1.18' 'onnxruntime" in fails(tmp_path, "--onnx", file)
