"""Teachers and tokenizers that stage one refuses, before it writes a shard."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

from distilcache.data.errors import UserError
from distilcache.stages.models.families import max_length
from distilcache.stages.teacher_cache.teacher import load_teacher
from tests.stages.models.families_support import make_model
from tests.stages.teacher_cache.teacher_cache_support import V, one_line


def test_a_checkpoint_without_its_head_is_refused(
    build_cache_in, small_corpus, small_teacher, tmp_path
):
    """transformers would fill the head with random numbers and only print a table."""
    headless = shutil.copytree(small_teacher, tmp_path / "headless")
    BertModel.from_pretrained(small_teacher, add_pooling_layer=False).save_pretrained(headless)
    with pytest.raises(UserError, match="must hold a trained masked-LM head") as caught:
        build_cache_in(tmp_path / "c", small_corpus(), headless)
    text = one_line(caught)
    assert "with none among its" in text
    assert not (tmp_path / "c").exists()


def test_a_teacher_that_is_not_there_or_cannot_be_reached(
    build_cache_in, small_corpus, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="which does not exist; pass --set teacher.model") as error:
        build_cache_in(tmp_path / "c", small_corpus(), tmp_path / "nowhere")
    one_line(error)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hub id that can be reached, .*pass its path") as error:
        build_cache_in(tmp_path / "c", small_corpus(), "nobody/no-such-model")
    one_line(error)
    assert not (tmp_path / "c").exists()


def test_a_pickled_checkpoint_is_refused(build_cache_in, small_corpus, small_teacher, tmp_path):
    folder = shutil.copytree(small_teacher, tmp_path / "pickled")
    state = BertForMaskedLM.from_pretrained(small_teacher).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="distilcache convert") as error:
        build_cache_in(tmp_path / "c", small_corpus(), folder)
    one_line(error)


def test_another_tokenizer_is_refused(build_cache_in, small_corpus, small_teacher, tmp_path):
    folder = shutil.copytree(small_teacher, tmp_path / "teacher")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    first, second = list(vocab)[20:22]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="tokenizer must be the one the corpus was made") as error:
        build_cache_in(tmp_path / "c", small_corpus(), folder)
    one_line(error)
    tokenizer = AutoTokenizer.from_pretrained(small_teacher)
    tokenizer.add_tokens(["unheardof"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"at most the model's {V} ids, got {V + 1}") as error:
        build_cache_in(tmp_path / "c", small_corpus(), folder)
    one_line(error)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("mask_only", [False, True])
def test_a_corpus_with_another_tokenizer_is_refused(
    build_cache_in, small_corpus, small_teacher, tmp_path, mask_only
):
    """Students would read its ids as other words; nothing else holds the file."""
    corpus = shutil.copytree(small_corpus(), tmp_path / "corpus")
    path = corpus / "tokenizer" / "tokenizer.json"
    state = json.loads(path.read_text())
    ids = state["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="must be the tokenizer that the corpus was made with"):
        build_cache_in(tmp_path / "c", corpus, small_teacher, mask_only=mask_only)
    assert not (tmp_path / "c").exists()


def test_special_tokens_with_other_roles_are_refused(
    build_cache_in, small_corpus, small_teacher, tmp_path
):
    """The vocabulary is the same, and masks are not what the teacher takes for a mask."""
    other = shutil.copytree(small_teacher, tmp_path / "teacher")
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": "[UNK]"}))
    with pytest.raises(UserError, match="tokenizer must have the special ids .*'mask': 4") as error:
        build_cache_in(tmp_path / "c", small_corpus(), other)
    one_line(error)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_dtype": "coded"},
        {"hidden_dtype": "float32"},
        {"hidden_dtype": "none"},
        {"hidden_dtype": "float16", "hidden_layers": (1,), "residual_samples": 0},
    ],
    ids=["coded", "raw", "logits alone", "another layer"],
)
@pytest.mark.parametrize("place", ["encoder", "head"])
def test_a_teacher_that_says_nothing_finite_is_refused(
    build_cache_in, small_corpus, small_teacher, tmp_path, settings, place
):
    """A weight is nan, of the head or of a late position, where loading does not look: no shard
    of it is left behind."""
    model = BertForMaskedLM.from_pretrained(small_teacher)
    with torch.no_grad():
        if place == "encoder":
            model.bert.embeddings.position_embeddings.weight[13, 3] = torch.nan
        else:
            model.cls.predictions.bias[40] = torch.nan
    broken = shutil.copytree(small_teacher, tmp_path / "teacher")
    model.save_pretrained(broken)
    out = tmp_path / "c"
    with pytest.raises(UserError, match="teacher: .* must be") as error:
        build_cache_in(out, small_corpus(), broken, **settings)
    one_line(error)
    assert not list(out.glob("shards/*/*"))
    assert not list(out.glob("teacher/hidden_codec_*"))
    assert not (out / "manifest.json").exists()


def test_states_beyond_float16_are_refused(build_cache_in, small_corpus, small_teacher, tmp_path):
    """An outlier dimension, as real encoders have them, that only float32 holds."""
    model = BertForMaskedLM.from_pretrained(small_teacher)
    with torch.no_grad():
        model.bert.encoder.layer[2].output.LayerNorm.bias[3] = 1e5
    broken = shutil.copytree(small_teacher, tmp_path / "teacher")
    model.save_pretrained(broken)
    with pytest.raises(UserError, match="layer 3 must be finite, .*hidden_dtype=float32") as error:
        build_cache_in(tmp_path / "c", small_corpus(), broken, hidden_dtype="float16")
    one_line(error)
    build_cache_in(tmp_path / "d", small_corpus(), broken, hidden_dtype="float32")


def test_sequences_longer_than_the_teacher_takes(
    build_cache_in, small_corpus, small_teacher, tmp_path
):
    long = small_corpus(max_length=40)
    with pytest.raises(UserError, match="max_length must be at most the teacher's 32 positions"):
        build_cache_in(tmp_path / "c", long, small_teacher)


def test_roberta_counts_positions_from_its_padding_id(tmp_path):
    sizes = {"layers": 1, "max_position_embeddings": 12, "pad_token_id": 1}
    make_model("roberta", 20, **sizes).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)
    assert max_length(teacher.model.config) == 10
    teacher.encode(torch.full((1, 10), 5), None, (1,))
    with pytest.raises((IndexError, RuntimeError)):
        teacher.encode(torch.full((1, 11), 5), None, (1,))
