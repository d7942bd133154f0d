"""``distilcache export --sentence-transformers``: an encoder that opens without a list of keys."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from tests.command_line import refusal, run
from tests.stages.models.families_support import make_model

TEXTS = ["amber bridge", "cedar delta ember forest garden harbor"]


@pytest.fixture(scope="module")
def student(small_teacher, tmp_path_factory):
    """A BERT: its masked LM has no pooler, its plain model has one."""
    folder = shutil.copytree(small_teacher, tmp_path_factory.mktemp("student") / "model")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: some/bert\n---\n# Mine\n")
    return folder


@pytest.fixture(scope="module")
def exported(student):
    folder = student.parent / "sentences"
    done = run("export", student, "--sentence-transformers", folder, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert json.loads(done.stdout)["width"] == 32
    assert sorted(path.name for path in student.parent.iterdir()) == ["model", "sentences"]
    return folder


def means(student):
    """The mean of the last hidden states of each text, by plain transformers."""
    model = AutoModelForMaskedLM.from_pretrained(student).base_model.eval()
    found = AutoTokenizer.from_pretrained(student)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**found).last_hidden_state
    mask = found["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def test_no_weight_is_missing_and_none_is_left_over(exported, student):
    model, told = AutoModel.from_pretrained(exported, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[2, 9, 11, 3]])
    own = AutoModelForMaskedLM.from_pretrained(student).base_model
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, own(ids).last_hidden_state)
    modules = json.loads((exported / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling"]
    card = (exported / "README.md").read_text()
    for line in ("license: mit", "base_model: some/bert", "library_name: sentence-transformers"):
        assert line in card


def test_a_downloaded_model_is_the_base_model(student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "models--a--b" / "snapshots" / ("a" * 40))
    done = run("export", folder, "--sentence-transformers", tmp_path / "sentences")
    assert done.exit_code == 0, done.stderr
    card = (tmp_path / "sentences" / "README.md").read_text()
    assert "base_model: a/b" in card
    assert "license: mit" in card


def test_sentence_transformers_gives_the_mean(exported, student, capfd):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    model = sentence_transformers.SentenceTransformer(str(exported), device="cpu")
    found = torch.from_numpy(model.encode(TEXTS))
    torch.testing.assert_close(found, means(student), rtol=1e-5, atol=1e-6)
    assert model.max_seq_length == 32
    told = capfd.readouterr()
    assert "UNEXPECTED" not in told.err + told.out
    assert "MISSING" not in told.err + told.out


def test_a_vocabulary_goes_along_in_whatever_file_it_lies(student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "model")
    words = AutoTokenizer.from_pretrained(folder)
    ids = sorted(words.get_vocab(), key=words.get_vocab().get)
    (folder / "vocab.txt").write_text("\n".join(ids))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    done = run("export", folder, "--sentence-transformers", tmp_path / "sentences")
    assert done.exit_code == 0, done.stderr
    found = AutoTokenizer.from_pretrained(tmp_path / "sentences")
    assert found(TEXTS)["input_ids"] == AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    assert found.unk_token_id not in found(TEXTS[0])["input_ids"]
    (folder / "vocab.txt").unlink()
    line = refusal(run("export", folder, "--sentence-transformers", tmp_path / "y"))
    assert "tokenizer must be a folder with a tokenizer" in line


def test_it_is_made_anew_and_of_encoders_alone(exported, student, tmp_path):
    line = refusal(run("export", student, "--sentence-transformers", exported))
    assert "folder must be new" in line
    assert "got none" in refusal(run("export", student))
    both = ("--onnx", tmp_path / "x", "--sentence-transformers", tmp_path / "y")
    assert "got both" in refusal(run("export", student, *both))
    make_model("bart", 60, layers=1).save_pretrained(tmp_path / "bart")
    line = refusal(run("export", tmp_path / "bart", "--sentence-transformers", tmp_path / "y"))
    assert "must be an encoder alone, got bart" in line
    make_model("flaubert", 60, pre_norm=True).save_pretrained(tmp_path / "flaubert")
    line = refusal(run("export", tmp_path / "flaubert", "--sentence-transformers", tmp_path / "y"))
    assert "norms first (pre_norm); export it to ONNX" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bart", "flaubert"]
