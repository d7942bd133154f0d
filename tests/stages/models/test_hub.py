"""Checkpoints on the hub, by its own client: looked at by their headers, downloaded when opened."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from distilcache.pipeline.convert import convert_command
from distilcache.stages.models.checkpoints import check_head, open_config, open_model
from distilcache.stages.models.hub import quiet
from distilcache.stages.models.tokenizers import find_tokenizer, load_tokenizer
from tests.command_line import run
from tests.hub import hub_in
from tests.refusals import refused
from tests.stages.models.families_support import open_model as plain_model
from tests.stages.models.families_support import same_logits, save_teacher
from tests.stages.models.layouts import by_code, counted_merges

WHERE = "teacher: model"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with the teacher ``some/bert``; what is downloaded goes to a place of its own."""
    home = tmp_path_factory.mktemp("hub")
    with quiet(), hub_in(home, tmp_path_factory.mktemp("downloads")) as server:
        save_teacher("bert", home / "some" / "bert")
        yield server


def test_a_teacher_is_looked_at_without_its_weights(hub):
    config = open_config("some/bert", where=WHERE)
    check_head(config, "some/bert", where=WHERE)
    parts = [asked for method, name, asked in hub.asked if method == "GET" and "safe" in name]
    assert parts
    assert None not in parts  # never the whole file
    assert config.model_type == "bert"


def test_a_teacher_is_opened(hub):
    config = open_config("some/bert", where=WHERE, revision="main")
    model, _ = open_model(
        transformers.BertForMaskedLM, config, "some/bert", where=WHERE, revision="main"
    )
    folder = hub.folder / "some" / "bert"
    same_logits(model, plain_model(folder))
    own = transformers.AutoTokenizer.from_pretrained(folder)
    assert load_tokenizer("some/bert").get_vocab() == own.get_vocab()
    line = refused(open_config, "some/bert", where=WHERE, revision="v9")
    assert "can be reached, got 'some/bert' at revision 'v9'" in line


def test_what_the_hub_lacks_is_said(hub, tmp_path):
    folder = shutil.copytree(hub.folder / "some" / "bert", hub.folder / "some" / "old")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    line = refused(open_config, "some/old", where=WHERE)
    assert "got pytorch_model.bin alone in 'some/old', which could run code" in line
    assert "distilcache convert some/old OUT, and" in line
    line = refused(open_config, "some/old", where=WHERE, revision="main")
    assert "distilcache convert some/old OUT --revision main, and pass OUT" in line
    done = run("convert", "some/old", tmp_path / "new")
    assert done.exit_code == 0, done.stderr
    same_logits(plain_model(tmp_path / "new"), plain_model(hub.folder / "some" / "bert"))
    assert find_tokenizer("some/old") is None
    assert "hub id that can be reached" in refused(open_config, "some/none", where=WHERE)


def test_what_the_hub_has_in_place_of_weights_is_said(hub, tmp_path):
    folder = shutil.copytree(hub.folder / "some" / "bert", hub.folder / "some" / "other")

    def lines():
        looked = refused(open_config, "some/other", where=WHERE)
        return looked, refused(convert_command, "some/other", tmp_path / "new")

    line = refused(convert_command, "some/other", tmp_path / "new")
    assert "with weights in safetensors; pass it as it is" in line
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    for line in lines():
        assert "got some/other/model.fp16.safetensors; download it and rename it to model.s" in line
    (folder / "model.fp16.safetensors").rename(folder / "tf_model.h5")
    for line in lines():
        assert "got tf_model.h5 alone in some/other; open the model with the library" in line
    (folder / "adapter_config.json").write_text("{}")
    for line in lines():
        assert "adapter in its weights, got some/other with adapter_config.json; save" in line
    (folder / "tf_model.h5").rename(folder / "model.safetensors")  # of the base, beside it
    assert "adapter in its weights" in lines()[0]


def test_a_tokenizer_in_python_comes_with_its_files(hub, tmp_path):
    slow, files = by_code("PhobertTokenizer", counted_merges)()
    folder = shutil.copytree(hub.folder / "some" / "bert", hub.folder / "some" / "pho")
    (folder / "tokenizer.json").unlink()
    for name, content in files.items():
        (folder / name).write_text(content)
    found = load_tokenizer("some/pho")
    assert found("amber bridge")["input_ids"] == slow("amber bridge")["input_ids"]
    found.save_pretrained(tmp_path)
    assert (tmp_path / "bpe.codes").read_text() == files["bpe.codes"]


def test_what_the_hub_has_and_nobody_can_use_is_said(hub):
    folder = shutil.copytree(hub.folder / "some" / "bert", hub.folder / "some" / "slow")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PhobertTokenizer"}')
    (folder / "vocab.txt").write_text("amber 1\n")
    line = refused(load_tokenizer, "some/slow")
    assert "got 'some/slow'" in line
    assert line.endswith("PhobertTokenizer reads bpe.codes, vocab.txt")
    (folder / "config.json").unlink()
    line = refused(open_config, "some/slow", where=WHERE, revision="main")
    assert "can be read on the hub, got 'some/slow'" in line
