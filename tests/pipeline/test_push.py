"""``distilcache push``: a model on the hub, by the hub's own client, is the one in the folder."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from distilcache.stages.models.hub import quiet
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student
from tests.command_line import refusal, run
from tests.damage import flip_at
from tests.hub import TOKEN, hub_in

PUSHED = ["README.md", "config.json", "model.safetensors", "tokenizer.json",
          "tokenizer_config.json"]  # fmt: skip


@pytest.fixture(scope="module")
def student(small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("push") / "1x32"
    train_student(
        cache_dir=small_cache(),
        out=out,
        size="1x32",
        student=StudentConfig(sizes=("1x32",)),
        train=TrainConfig(steps=1, batch_size=8),
        device="cpu",
        dtype="float32",
    )
    return out


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with quiet(), hub_in(tmp_path / "hub", tmp_path / "downloads") as server:
        yield server


def test_what_is_pushed_opens_by_its_name(hub, student):
    done = run("push", student, "me/small", "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    values = json.loads(done.stdout)
    assert values["files"] == PUSHED
    assert (values["repo"], values["commit"]) == ("me/small", hub.heads["me/small"])
    assert hub.commits == [("me/small", "main", "1x32 by distilcache", PUSHED)]
    here, there = (AutoModelForMaskedLM.from_pretrained(p) for p in (student, "me/small"))
    assert all(
        torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True)
    )
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (student, "me/small")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    card = (hub.folder / "me" / "small" / "README.md").read_text()
    assert 'model="me/small"' in card
    assert 'model="PATH/TO/THIS/FOLDER"' in (student / "README.md").read_text()


def test_modules_of_a_model_go_with_it(hub, student, tmp_path):
    done = run("export", student, "--sentence-transformers", tmp_path / "sentences")
    assert done.exit_code == 0, done.stderr
    modules = json.loads((tmp_path / "sentences" / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": "Normalize"})
    (tmp_path / "sentences" / "modules.json").write_text(json.dumps(modules))
    done = run("push", tmp_path / "sentences", "me/sentences", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["files"]
    assert {"1_Pooling/config.json", "modules.json", "model.safetensors"} <= set(found)


def test_onnx_files_go_with_it(hub, student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "tuned")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    (folder / "onnx" / "model.onnx.data").write_bytes(b"weights")
    done = run("push", folder, "me/tuned", "--json")
    assert done.exit_code == 0, done.stderr
    assert {"onnx/model.onnx", "onnx/model.onnx.data"} <= set(json.loads(done.stdout)["files"])


def test_a_branch_and_a_private_repository(hub, student):
    done = run("push", student, "small", "--private", "--revision", "trial")
    assert done.exit_code == 0, done.stderr
    assert hub.branches == ["trial"]
    assert [commit[:2] for commit in hub.commits] == [("me/small", "trial")]
    assert hub.private == {"me/small"}


def test_a_public_repository_does_not_get_what_is_private(hub, student):
    """The hub leaves a repository that is there as it is, and says nothing."""
    (hub.folder / "me" / "small").mkdir(parents=True)
    line = refusal(run("push", student, "me/small", "--private"))
    assert "must be private, got me/small, which everybody sees" in line
    assert not hub.commits


@pytest.mark.parametrize("name", ["a b/c", "me/small/er", "me/small.git", "-me", "me/a--b", ""])
def test_a_name_that_the_hub_would_refuse(hub, student, name):
    line = refusal(run("push", "--", student, name))
    assert "REPO must be OWNER/NAME or NAME of letters, digits, - _ . (at most 96" in line
    assert repr(name) in line
    assert not hub.folder.exists()


def test_who_is_unknown_or_has_no_rights_is_told(hub, student, monkeypatch, tmp_path):
    line = refusal(run("push", student, "other/small"))
    assert "hub must take other/small, got: HfHubHTTPError" in line
    assert "You don't have the rights" in line
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "hub must take me/small, got: " in refusal(run("push", student, "me/small"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    line = refusal(run("push", student, "me/small"))
    assert "got no token; run hf auth login, or set HF_TOKEN" in line
    assert not hub.commits


def test_offline_is_said(student, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal(run("push", student, "me/small"))
    assert "got: OfflineModeIsEnabled" in line


def test_what_is_no_finished_model_stays_here(hub, student, tmp_path):
    line = refusal(run("push", tmp_path, "me/small"))
    assert "STUDENT must be the folder of a finished model" in line
    copy = shutil.copytree(student, tmp_path / "copy")
    flip_at(copy / "model.safetensors")
    assert "model.safetensors must have the content" in refusal(run("push", copy, "me/small"))
    record = json.loads((student / "training.json").read_text())
    (copy / "training.json").write_text(json.dumps({"settings": record["settings"]}))
    assert "training has not ended" in refusal(run("push", copy, "me/small"))
    (copy / "training.json").unlink()
    (copy / "modules.json").write_text("[3]")
    assert "must list modules with their paths" in refusal(run("push", copy, "me/small"))
    assert not hub.commits
