"""Pickled weights as safetensors: the same tensors under the same names, and no code run."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForMaskedLM

from tests.command_line import refusal, run
from tests.stages.models.families_support import make_model, same_logits, save_teacher
from tests.stages.models.test_checkpoints import in_hub_cache

OLD = {"weight": "gamma", "bias": "beta"}


class Runs:
    """Does something when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def pickled(tmp_path):
    """A BERT as libraries saved it for years: tied tensors twice, buffers, old names."""
    folder = save_teacher("bert", tmp_path / "pickled")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (folder / "own.py").write_text("# code that auto_map names\n")
    model = BertForMaskedLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = {
        re.sub("LayerNorm.(weight|bias)", lambda found: f"LayerNorm.{OLD[found[1]]}", name): tensor
        for name, tensor in model.state_dict().items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / "pytorch_model.bin")
    return folder, model, state


def convert(source, out):
    done = run("convert", source, out, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    return json.loads(done.stdout)


def test_the_same_tensors_under_the_same_names(pickled, tmp_path):
    folder, model, state = pickled
    said = convert(folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert said["tensors"] == len(state)
    assert found.keys() == state.keys()
    assert all(found[k].dtype == t.dtype and torch.equal(found[k], t) for k, t in state.items())
    same_logits(BertForMaskedLM.from_pretrained(tmp_path / "out"), model)
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (folder, tmp_path / "out")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "pickled"]
    for name in ("README.md", "own.py"):
        assert (tmp_path / "out" / name).read_text() == (folder / name).read_text()
    mode = (tmp_path / "out" / "config.json").stat().st_mode
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == mode


def test_half_precision_and_the_old_file_format_are_kept(pickled, tmp_path):
    folder, _, state = pickled
    half = {k: t.half() if t.is_floating_point() else t for k, t in state.items()}
    torch.save(half, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(found[k].dtype == t.dtype and torch.equal(found[k], t) for k, t in half.items())


def test_several_files_become_one(pickled, tmp_path):
    folder, model, state = pickled
    (folder / "pytorch_model.bin").unlink()
    files = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: state[name] for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    convert(folder, tmp_path / "out")
    assert not (tmp_path / "out" / index.name).exists()
    same_logits(BertForMaskedLM.from_pretrained(tmp_path / "out"), model)
    (folder / "pytorch_model-1.bin").unlink()
    line = refusal(run("convert", folder, tmp_path / "other"))
    assert "got no pytorch_model-1.bin" in line


def damage(folder, how):
    """Make the weights what they must not be."""
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "page":
        path.write_text("<html>Not found</html>")
    elif how == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    elif how == "code":
        torch.save({"x": torch.ones(2), "y": Runs(folder / "was-run")}, path)
    elif how == "nested":
        torch.save({"state_dict": {"x": torch.ones(2)}, "step": 3}, path)
    elif how == "sparse":
        torch.save({"x": torch.ones(2, 2).to_sparse()}, path)
    elif how == "index":
        path.rename(folder / "x.bin")
        (folder / "pytorch_model.bin.index.json").write_text('{"metadata": {}}')
    elif how == "safetensors":
        make_model("bert", 60).save_pretrained(folder)
    elif how == "type":
        (folder / "config.json").write_text("{}")
        torch.save({"electra.x": torch.ones(2), "cls.predictions.bias": torch.ones(2)}, path)
    elif how == "tensorflow":
        path.rename(folder / "tf_model.h5")
    elif how == "adapter":
        path.rename(folder / "adapter_model.bin")
        (folder / "adapter_config.json").write_text("{}")
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("cut", "cut off or damaged; download it again"),
        ("empty", "a file of another kind; download it again"),
        ("page", "a file of another kind; download it again"),
        ("pointer", "which is a Git LFS pointer"),
        ("code", "objects other than tensors, which would have to run code"),
        ("nested", "other things under state_dict, step; save the model's state_dict alone"),
        ("sparse", "one that safetensors can hold"),
        ("index", "an index with a weight_map"),
        ("safetensors", "with weights in safetensors; pass it as it is"),
        ("type", 'add "model_type": "bert"'),
        ("gone", "its weights in pytorch_model.bin, got none in"),
        ("tensorflow", "pytorch_model.bin, got tf_model.h5 alone in"),
        ("adapter", "got {folder} with adapter_config.json; save what PEFT's merge_and_unload"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(pickled, tmp_path, how, word):
    folder, *_ = pickled
    whole = shutil.copytree(folder, tmp_path / "whole")
    damage(folder, how)
    before = sorted(p.name for p in folder.iterdir())
    line = refusal(run("convert", folder, tmp_path / "out"))
    assert word.format(folder=folder) in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pickled", "whole"]
    assert sorted(p.name for p in folder.iterdir()) == before  # nothing was run
    if "download it again" in line:
        shutil.rmtree(folder)
        convert(whole.rename(folder), tmp_path / "out")


def test_the_type_of_a_bert_is_told_by_its_tensors(pickled, tmp_path):
    folder, model, _ = pickled
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"]
    (folder / "config.json").write_text(json.dumps(values))
    done = run("convert", folder, tmp_path / "out")
    assert "tensors are those of a bert, as config.json now says" in done.stderr
    same_logits(BertForMaskedLM.from_pretrained(tmp_path / "out"), model)
    wanted = {**values, "model_type": "bert"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == wanted


def test_a_revision_of_a_hub_id_is_converted(pickled, tmp_path, monkeypatch):
    """Of two that lie in the cache of the hub's client."""
    folder, *_ = pickled
    monkeypatch.setattr("distilcache.stages.models.hub.hub_answers", lambda *_: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for number, (commit, branch) in enumerate((("a" * 40, "main"), ("b" * 40, "v2"))):
        place = shutil.copytree(folder, in_hub_cache(tmp_path, "some/model", commit, branch))
        torch.save({"x": torch.full((2,), float(number))}, place / "pytorch_model.bin")
    convert("some/model", tmp_path / "out")
    done = run("convert", "some/model", tmp_path / "other", "--revision", "v2")
    assert done.exit_code == 0, done.output
    found = [load_file(tmp_path / n / "model.safetensors")["x"][0] for n in ("out", "other")]
    assert found == [0, 1]
    line = refusal(run("convert", folder, tmp_path / "new", "--revision", "v2"))
    assert "leave the revision out" in line


def test_out_is_a_new_folder(pickled, tmp_path):
    folder, *_ = pickled
    (tmp_path / "out").mkdir()
    assert "OUT must be new" in refusal(run("convert", folder, tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out").rename(tmp_path / "old")  # moved away, as it says
    convert(folder, tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "must be writable" in refusal(run("convert", folder, tmp_path / "file" / "out"))


def test_a_hub_id_is_downloaded(pickled, tmp_path, monkeypatch):
    folder, model, _ = pickled
    asked = []

    def download(name, **options):
        asked.append((name, options["allow_patterns"][0]))
        return str(folder)

    monkeypatch.setattr("distilcache.stages.models.hub.hub_answers", lambda *_: True)
    monkeypatch.setattr("distilcache.pipeline.convert.names_on_hub", lambda *_: os.listdir(folder))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert("some/model", tmp_path / "out")
    assert asked == [("some/model", "pytorch_model*")]
    same_logits(BertForMaskedLM.from_pretrained(tmp_path / "out"), model)
