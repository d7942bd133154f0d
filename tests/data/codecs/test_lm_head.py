"""The rebuilt head equals the model's own, for every family that is known."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from distilcache.data.codecs.lm_head import LMHead
from distilcache.data.codecs.lm_head_spec import LMHeadSpec
from distilcache.data.errors import UserError
from distilcache.stages.teacher_cache.teacher import load_teacher, saved_lm_head_spec
from tests.stages.models.families_support import FAMOUS, make_model, plain_outputs

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "initializer_range": 0.5,
}
DISTIL = {"vocab_size": 61, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "bert-relu": lambda: BertForMaskedLM(BertConfig(**SMALL, hidden_act="relu")),
    "bert-untied": lambda: BertForMaskedLM(BertConfig(**SMALL, tie_word_embeddings=False)),
    "bert-eps": lambda: BertForMaskedLM(BertConfig(**SMALL, layer_norm_eps=0.1)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, layer_norm_eps=1e-5)),
    "roberta-untied": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, tie_word_embeddings=False)),
    "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig(**DISTIL, initializer_range=0.5)),
    "bert-silu": lambda: BertForMaskedLM(BertConfig(**SMALL, hidden_act="silu")),
    "bert-gelu_new": lambda: BertForMaskedLM(BertConfig(**SMALL, hidden_act="gelu_new")),
    "bert-tanh": lambda: BertForMaskedLM(BertConfig(**SMALL, hidden_act="gelu_pytorch_tanh")),
}
FORMS = {
    "mobilebert": {},
    "mobilebert-untied": {"tie_word_embeddings": False},
    "mobilebert-norms": {"normalization_type": "layer_norm", "use_bottleneck": False},
    "modernbert": {},
    "modernbert-untied": {"tie_word_embeddings": False},
    "modernbert-biases": {"classifier_bias": True, "norm_bias": True},
    "modernbert-no-bias": {"decoder_bias": False, "classifier_activation": "relu"},
    "deberta-v2-own-head": {"legacy": False, "conv_kernel_size": 0},
    "deberta-v2-one-layer": {"layers": 1},
    "albert-groups": {"num_hidden_groups": 3},
    "electra-untied": {"tie_word_embeddings": False},
    "electra-wide": {"embedding_size": 32},
    "xlnet": {},
    "xlnet-untied": {"tie_word_embeddings": False},
}
"""Heads and encoders that checkpoints of a family may have."""


def make(kind):
    """A model none of whose parameters keeps its initial zeros and ones."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def teacher_and_head(model, folder):
    """A model as stage one opens it, and its head as a cache's reader does."""
    model.save_pretrained(folder / "given")
    teacher = load_teacher(str(folder / "given"), torch.device("cpu"), torch.float32)
    # Stage one stores the checkpoint again and names the tensors of that copy.
    teacher.model.save_pretrained(folder / "cache")
    spec = saved_lm_head_spec(teacher, folder / "cache")
    return teacher, spec, LMHead.load(folder / "cache", LMHeadSpec(**spec.to_dict()))


@pytest.mark.parametrize("kind", MODELS)
def test_equal_to_the_model_after_saving(kind, tmp_path):
    model = make(kind)
    teacher, _, head = teacher_and_head(model, tmp_path)
    ids = torch.randint(5, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = model.base_model(input_ids=ids).last_hidden_state
        found = head(hidden.reshape(-1, 16)).reshape(expected.shape)
        (same,) = teacher.encode(ids, None, (1,))
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same, hidden)
    assert list(head.parameters()) == []
    assert head.state_dict() == {}
    rows = head.transform(hidden.reshape(-1, 16))
    torch.testing.assert_close(
        rows @ head.decoder_weight.T + head.decoder_bias, found.reshape(-1, 61)
    )


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_families(form, tmp_path):
    kind = next(k for k in sorted(FAMOUS, key=len, reverse=True) if form.startswith(k))
    model = make_model(kind, 61, **FORMS[form])
    teacher, spec, head = teacher_and_head(model, tmp_path)
    assert spec.is_whole()
    ids = torch.randint(5, 61, (12,), generator=torch.Generator().manual_seed(1))
    expected, states = plain_outputs(model, ids, [2, 3, 9])
    assert expected.std() > 0.2
    found = teacher.encode(ids[None], None, (1, teacher.num_layers), torch.tensor([2, 3, 9]))
    torch.testing.assert_close(found[0], states[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(found[1]), expected, rtol=1e-5, atol=1e-5)


def test_heads_that_cannot_be_computed_are_refused():
    whole = {"decoder.weight": "a", "dense.weight": "b", "norm.weight": "c"}
    assert LMHeadSpec(tensors=whole).is_whole()
    for broken in (
        {"dense.weight": "b", "norm.weight": "c"},
        {"decoder.weight": "a", "dense.weight": "b"},
        {"decoder.weight": "a", "norm.bias": "b"},
        {**whole, "decoder.more": "d"},
    ):
        assert not LMHeadSpec(tensors=broken).is_whole()
    assert not LMHeadSpec(tensors=whole, activation="tanh").is_whole()


def test_half_precision_checkpoints_give_a_float32_head(tmp_path):
    make("bert").half().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)
    assert teacher.lm_head.decoder_weight.dtype == torch.float32


def test_a_missing_tensor_is_named(tmp_path):
    make("bert").save_pretrained(tmp_path)
    spec = LMHeadSpec(tensors={"dense.weight": "cls.nothing"})
    with pytest.raises(UserError, match="model.safetensors must hold the LM head"):
        LMHead.load(tmp_path, spec)
    with pytest.raises(UserError, match="model.safetensors must hold the LM head"):
        LMHead.load(tmp_path / "nowhere", spec)
