"""Files of a checkpoint that are absent, damaged or of another kind: the reason in one line."""

import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file

from distilcache.stages.models.hub import quiet
from distilcache.stages.models.weight_files import read_config, tensors_in
from tests.command_line import run
from tests.refusals import refused
from tests.stages.models.families_support import make_model, open_model, same_logits

WHERE = "teacher: model"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture(autouse=True)
def _no_bars():
    with quiet():
        yield


def looked_at(folder):
    read_config(folder / "config.json", WHERE)
    return tensors_in(folder, WHERE)


def failure(folder):
    line = refused(looked_at, folder)
    assert line.startswith(WHERE)
    return line


def saved(folder):
    """A model and its folder."""
    model = make_model("bert", 60)
    model.save_pretrained(folder)
    return model


def test_names_and_shapes_are_those_of_the_tensors(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert looked_at(tmp_path) == {name: tuple(t.shape) for name, t in tensors.items()}


def test_several_files_are_one_checkpoint(tmp_path):
    model = make_model("bert", 60)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    names = {name for path in files for name in load_file(path)}
    assert looked_at(tmp_path).keys() == names
    files[0].unlink()
    text = failure(tmp_path)
    assert "all files that model.safetensors.index.json names" in text
    assert text.endswith("download it again")
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # as a download writes it
    assert looked_at(tmp_path).keys() == names


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"weight_map": 3}', POINTER])
def test_an_index_that_is_none_is_named(tmp_path, content):
    make_model("bert", 60).save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    whole = path.read_text()
    path.write_text(content)
    text = failure(tmp_path)
    assert re.search("JSON with a weight_map.*download it again|Git LFS pointer.*download", text)
    path.write_text(whole)
    assert looked_at(tmp_path)


def pickle_weights(folder, **torch_options):
    """pytorch_model.bin in place of safetensors."""
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin", **torch_options)
    path.unlink()


def test_pickled_weights_name_the_command_that_helps(tmp_path):
    model = saved(tmp_path / "old")
    pickle_weights(tmp_path / "old")
    text = failure(tmp_path / "old")
    command = re.search(r"distilcache (convert .*? OUT)", text)[1]
    done = run(*(str(tmp_path / "new") if w == "OUT" else w for w in shlex.split(command)))
    assert done.exit_code == 0, done.stderr
    same_logits(open_model(tmp_path / "new"), model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(POINTER)
    text = failure(tmp_path)
    assert f"{name}, which is a Git LFS pointer" in text
    assert "git lfs pull" in text


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_weights_that_are_cut_off_are_named(tmp_path, kept):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    text = failure(tmp_path)
    assert "must be a whole safetensors file" in text
    if kept == -1:
        assert f"{len(whole) - 1:,} bytes of {len(whole):,}" in text


def test_weights_of_other_libraries_are_named(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "tf_model.h5")
    assert "got tf_model.h5 alone" in failure(tmp_path)
    (tmp_path / "tf_model.h5").unlink()
    assert "got none" in failure(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00"])
def test_a_configuration_that_is_none_is_named(tmp_path, content):
    model = saved(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert "config.json must be" in failure(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "must be a folder with a config.json, got none" in failure(tmp_path)
    model.config.save_pretrained(tmp_path)  # as a download writes it
    assert looked_at(tmp_path)


def test_a_trainers_folder_names_its_last_checkpoint(tmp_path):
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        saved(tmp_path / f"checkpoint-{step}")
    assert f"such as {tmp_path / 'checkpoint-1000'}" in failure(tmp_path)


def test_an_adapter_alone_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in failure(tmp_path)


def test_a_configuration_without_its_type_says_what_to_add(tmp_path):
    model = saved(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["model_type"]
    path.write_text(json.dumps(values))
    text = failure(tmp_path)
    name, value = re.search(r'add "(\w+)": "(\w+)"', text).groups()
    path.write_text(json.dumps({**values, name: value}))
    same_logits(open_model(tmp_path), model)
