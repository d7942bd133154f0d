"""What transformers 4 and the programs of its time look for is in the files, and 5 reads the same.

That they give the same answers there was seen with transformers 4.44 to 4.57 (docs/design.md).
"""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from distilcache.stages.models.saving import (
    config_json,
    global_distance,
    save_tokenizer,
    with_first_names,
    write_weights,
)
from tests.builders import random_texts
from tests.stages.models.families_support import FAMOUS, make_model, make_tokenizer, same_logits

FAR, NEAR = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("types", "given", "distance"),
    [
        ([FAR, NEAR, NEAR, FAR, NEAR, NEAR], 3, 3),
        ([FAR, NEAR, NEAR, FAR], 7, 3),
        ([FAR, NEAR], 3, 3),
        ([FAR, NEAR], 0, 2),
        ([FAR], 3, 3),
        ([FAR, FAR, FAR], 3, 1),
        ([FAR, NEAR, FAR, FAR], 3, 0),
        ([FAR, NEAR, NEAR, FAR, NEAR, NEAR, NEAR], 3, 0),
        ([NEAR, NEAR, FAR], 3, 0),
    ],
)
def test_the_distance_of_global_layers(types, given, distance):
    assert global_distance(types, given) == distance
    if distance:  # as transformers 4 reads it
        assert types == [NEAR if at % distance else FAR for at in range(len(types))]


def test_a_modernbert_is_written_by_old_and_new_names(tmp_path):
    rope = {
        FAR: {"rope_type": "default", "rope_theta": 5000.0},
        NEAR: {"rope_type": "default", "rope_theta": 70.0},
    }
    settings = {"layers": 4, "layer_types": [FAR, NEAR, FAR, NEAR], "local_attention": 8}
    model = make_model("modernbert", 60, rope_parameters=rope, **settings)
    content = config_json(model)
    found = json.loads(content)
    assert found["global_rope_theta"] == 5000.0
    assert found["local_rope_theta"] == 70.0
    assert found["global_attn_every_n_layers"] == 2
    (tmp_path / "config.json").write_bytes(content)
    write_weights(model, tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    assert opened.config.rope_parameters == rope
    assert opened.config.layer_types == settings["layer_types"]
    same_logits(model, opened)
    assert {**json.loads(config_json(opened)), "dtype": None} == found
    for new in ("rope_parameters", "layer_types"):  # as published ones are
        del found[new]
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters[NEAR]["rope_theta"] == 70.0
    same_logits(model, type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", ["general", *FAMOUS])
def test_a_tokenizer_is_written_by_first_names(kind, tmp_path):
    tokenizer = make_tokenizer("bert" if kind == "general" else kind)
    if kind == "general":
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, mask_token="[MASK]", unk_token="[UNK]",
            pad_token="[PAD]", extra_special_tokens=["[unused0]", "[unused1]"],
        )  # fmt: skip
    save_tokenizer(tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] != "TokenizersBackend"
    assert not isinstance(settings.get("extra_special_tokens"), list)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert type(opened) is type(tokenizer)
    assert opened.extra_special_tokens == tokenizer.extra_special_tokens
    assert opened.all_special_ids == tokenizer.all_special_ids
    for texts in (random_texts(9), [f"of {name} of" for name in tokenizer.all_special_tokens]):
        assert dict(opened(texts)) == dict(tokenizer(texts))
    if settings["tokenizer_class"] == "PreTrainedTokenizerFast":  # 4 adds token types by itself
        assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_names_that_both_know_stay():
    settings = {"tokenizer_class": "BertTokenizer", "extra_special_tokens": {"image": "<image>"}}
    assert with_first_names(settings) == settings
    given = {"tokenizer_class": "TokenizersBackend", "model_input_names": ["input_ids"]}
    assert with_first_names(given)["model_input_names"] == ["input_ids"]


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "bert", "modernbert"])
def test_tied_biases_are_written_by_each_name(kind, tmp_path):
    model = make_model(kind, 60)
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    write_weights(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    tied = {name for name in model.all_tied_weights_keys if name.endswith(".bias")}
    assert (tied == set()) == (kind == "modernbert")
    for name, tensor in model.state_dict().items():
        if name.endswith(".bias"):
            assert torch.equal(found[name], tensor)
    (tmp_path / "config.json").write_bytes(config_json(model))
    opened, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_logits(model, opened)


def test_what_is_no_tokenizer_is_saved_as_it_is(tmp_path):
    other = SimpleNamespace(save_pretrained=lambda folder: (folder / "own.json").write_text("{}"))
    save_tokenizer(other, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["own.json"]
