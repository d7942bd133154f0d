"""``distilcache export``: the ONNX file gives the student's own logits, or is not there."""

import json
import shutil

import pytest
import torch

from distilcache.pipeline import export_onnx as export
from tests.command_line import refusal, run
from tests.stages.models.families_support import make_model

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")

VOCABULARY = 60


def run_export(student, folder):
    """The values that the command prints; the student's folder and file lie in ``folder``."""
    student.save_pretrained(folder / "student")
    done = run("export", folder / "student", "--onnx", folder / "x.onnx", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def same_logits(file, student):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    for batch, length in ((1, 1), (4, 40)):
        ids = torch.randint(2, VOCABULARY, (batch, length))
        mask = torch.ones_like(ids)
        (found,) = session.run(
            ["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        )
        with torch.no_grad():
            own = student(input_ids=ids, attention_mask=mask).logits
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
    assert "file must be a new one, got" in refusal(run(*words, file))
    assert run(*words, tmp_path / "y.onnx").exit_code == 0
    file.rename(tmp_path / "mine")
    assert run(*words, file).exit_code == 0


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
    headless = make_model("distilbert", VOCABULARY, layers=1).distilbert
    headless.save_pretrained(tmp_path / "headless")
    assert "got none for vocab_layer_norm" in fails(tmp_path / "headless", "--onnx", file)
    assert not file.exists()
    assert "folder of the file must exist" in fails(tmp_path, "--onnx", tmp_path / "a" / "x.onnx")
    file.write_text("mine")
    assert "file must be a new one" in fails(tmp_path, "--onnx", file)
    assert file.read_text() == "mine"
    monkeypatch.setattr(export, "NEEDED", ("no_such_package",))
    assert "pip install -e '.[onnx]'" in fails(tmp_path, "--onnx", file)
