"""Checkpoints in the layouts that people publish: opened right, or refused with what helps."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from distilcache.data.errors import UserError
from distilcache.stages.evaluate.masked_lms import read_model
from distilcache.stages.models.checkpoints import (
    check_head,
    configuration,
    open_config,
    open_model,
)
from distilcache.stages.models.encoder import RowEncoder, from_config, model_class
from distilcache.stages.models.families import shape_of, student_values
from distilcache.stages.models.hub import quiet
from distilcache.stages.models.tokenizers import load_tokenizer
from distilcache.stages.student_train.weights import config_in
from distilcache.stages.teacher_cache.teacher import load_teacher
from tests.refusals import refused
from tests.stages.models.families_support import FAMOUS, make_model, make_tokenizer, same_logits

WHERE = "teacher: model"


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    with quiet():
        yield


def opened(folder):
    config = open_config(str(folder), where=WHERE)
    check_head(config, str(folder), where=WHERE)
    model, _ = open_model(model_class(config), config, str(folder), where=WHERE)
    return model


def failure(folder, look=opened):
    line = refused(look, folder)
    assert line.startswith(WHERE)
    return line


def looked_at(folder):
    return open_config(str(folder), where=WHERE)


def saved(folder, kind="bert", **more):
    """A model and its folder."""
    model = make_model(kind, 60, **more)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["is_decoder", "add_cross_attention"])
def test_a_decoder_is_refused_by_what_makes_it_one(tmp_path, name):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: True}))
    assert f"got {name} true; set it to false" in failure(tmp_path)


def rewrite(folder, change):
    """Put other tensors into the file: ``change(tensors)`` returns them."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    there = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in there.items() if v is not None}))


@pytest.mark.parametrize("kind", FAMOUS)
def test_every_family_opens_as_transformers_opens_it(kind, tmp_path, capsys):
    model = saved(tmp_path, kind)
    there = opened(tmp_path).state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in model.state_dict().items())
    assert capsys.readouterr().err == ""


def test_several_files_open_as_one(tmp_path):
    model = make_model("bert", 60)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    same_logits(opened(tmp_path), model)


def test_old_names_of_norms_open(tmp_path):
    """Checkpoints that were converted from TensorFlow."""
    model = saved(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(name):
        for new, former in old.items():
            name = name.replace(new, former)
        return name

    rewrite(tmp_path, lambda tensors: {renamed(name): t for name, t in tensors.items()})
    assert any("gamma" in name for name in load_file(tmp_path / "model.safetensors"))
    same_logits(opened(tmp_path), model)


def deberta_v3(folder, kind="deberta-v2"):
    """As published: DeBERTa's own head, and a configuration that does not mention it."""
    model = saved(folder, kind, legacy=False)
    edit_config(folder, legacy=None)
    assert "legacy" not in json.loads((folder / "config.json").read_text())
    return model


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2"])
def test_debertas_own_head_is_found_by_its_tensors(kind, tmp_path, capsys):
    model = deberta_v3(tmp_path, kind)
    assert "lm_predictions.lm_head.dense.weight" in load_file(tmp_path / "model.safetensors")
    same_logits(opened(tmp_path), model)
    assert capsys.readouterr().err == ""
    plain = transformers.AutoConfig.from_pretrained(tmp_path)
    assert plain.legacy is True  # what the library would fill at random


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2"])
@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ("mask_predictions.dense.weight", "a discriminator of replaced tokens"),
        ("deberta.embeddings.position_embeddings.weight", "head reads those of a mask decoder"),
    ],
)
def test_debertas_own_head_of_other_states_is_refused(kind, tensor, reason, tmp_path):
    """Of v3 it is the generator's; of v1 and v2 it reads a decoder's states, not the encoder's."""
    saved(tmp_path, kind, legacy=False, position_biased_input=False)
    opened(tmp_path)
    rewrite(tmp_path, lambda t: {**t, tensor: torch.ones(40, 32)})
    assert reason in failure(tmp_path)
    trained = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, legacy=False)
    trained.save_pretrained(tmp_path)  # as after training
    opened(tmp_path)


def test_a_head_of_berts_kind_is_found_where_the_configuration_says_otherwise(tmp_path):
    model = saved(tmp_path, "deberta-v2", legacy=True)
    edit_config(tmp_path, legacy=False)
    same_logits(opened(tmp_path), model)


@pytest.mark.parametrize("kind", FAMOUS)
def test_a_head_that_lacks_any_tensor_is_refused(kind, tmp_path):
    """Whichever it is, and by its name alone where the tensor has one name."""
    model = saved(tmp_path / "whole", kind)
    prefix = f"{model.base_model_prefix}."
    names = [n for n in load_file(tmp_path / "whole" / "model.safetensors") if prefix not in n]
    assert names
    for number, name in enumerate(names):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        rewrite(folder, lambda tensors, name=name: {k: v for k, v in tensors.items() if k != name})
        text = failure(folder)
        assert "must hold a trained masked-LM head" in text
        assert name in text or (names == [name] and "none among its" in text)


def test_a_head_that_the_library_does_not_miss_is_refused(tmp_path):
    saved(tmp_path)

    class Careless(transformers.BertForMaskedLM):
        _keys_to_ignore_on_load_missing = ["cls.predictions.transform"]  # noqa: RUF012

    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if "transform.dense" not in k})
    config = looked_at(tmp_path)
    with pytest.raises(UserError, match="without cls.predictions.transform.dense.bias, cls.pred"):
        open_model(Careless, config, str(tmp_path), where=WHERE)


def test_a_model_of_its_own_code_is_called_that(tmp_path, capsys):
    """As DNABERT-2 and MosaicBERT: a BERT by its type, without positions, its layers its own."""
    saved(tmp_path)
    edit_config(tmp_path, auto_map={"AutoModelForMaskedLM": "some/m--bert_layers.BertForMaskedLM",
                                    "AutoModel": "bert_layers.BertModel"})  # fmt: skip
    opened(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{WHERE} {str(tmp_path)!r} has code of its own (bert_layers.py), which")
    assert "transformers' BertForMaskedLM;" in line
    own = "its code lies in the repository (bert_layers.py), which distilcache does not run; use a"
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if "position_emb" not in k})
    text = failure(tmp_path)
    assert "without bert.embeddings.position_embeddings.weight; use a checkpoint that" in text
    assert f"also, {own}" in text
    rewrite(tmp_path, lambda t: {**t, "bert.embeddings.position_embeddings.weight": torch.ones(2)})
    assert own in failure(tmp_path)
    edit_config(tmp_path, model_type="berd")
    assert own in failure(tmp_path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_with_a_prefix_are_shown(prefix, tmp_path):
    """As torch.compile and DataParallel write them."""
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors: {f"{prefix}{name}": t for name, t in tensors.items()})
    assert f"and with {prefix}bert.embeddings.LayerNorm.bias, {prefix}bert" in failure(tmp_path)


def test_a_bart_with_another_head_has_none_for_masks(tmp_path):
    """Its LM head is the word embeddings, so no name tells whether it was trained as one."""
    saved(tmp_path, "bart")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classification_head.out_proj.weight"] = torch.zeros(2, 32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert "must hold a trained masked-LM head" in failure(tmp_path)


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (("model.fp16.safetensors",), "fp16.safetensors; rename it to model.safetensors"),
        (("model-1.safetensors", "model-2.safetensors"), "must have model.safetensors.index.json"),
    ],
)
def test_weights_under_another_name(names, remedy, tmp_path):
    saved(tmp_path)
    for name in names:
        shutil.copy(tmp_path / "model.safetensors", tmp_path / name)
    (tmp_path / "model.safetensors").unlink()
    assert remedy in failure(tmp_path)


def test_a_head_that_was_filled_at_random_is_told(tmp_path, capsys):
    """Saved after the library had filled it: nothing is missing any more."""
    model = make_model("bert", 60)
    model.bert.save_pretrained(tmp_path / "headless")
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "headless").save_pretrained(tmp_path)
    opened(tmp_path)
    opened(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "LM head that looks untrained" in line


def test_tensors_of_another_shape_are_named(tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, vocab_size=64)
    text = failure(tmp_path)
    assert "word_embeddings.weight of [60, 32] in place of [64, 32]" in text
    edit_config(tmp_path, vocab_size=60, intermediate_size=50)
    assert "layer.0.intermediate.dense.bias of [48] in place of [50]" in failure(tmp_path)
    edit_config(tmp_path, intermediate_size=48)  # as the line says
    opened(tmp_path)


def test_a_new_head_may_lack_its_own_weights_alone(tmp_path):
    saved(tmp_path)
    config = looked_at(tmp_path)
    kind = transformers.AutoModelForSequenceClassification
    open_model(kind, config, str(tmp_path), where=WHERE, new_head=True)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if "layer.1.output.dense" not in k})
    with pytest.raises(UserError, match="without bert.encoder.layer.1.output.dense.bias"):
        open_model(kind, config, str(tmp_path), where=WHERE, new_head=True)


@pytest.mark.parametrize("values", [{"model_type": "berd"}, {"hidden_size": "wide"}])
def test_a_configuration_that_the_library_does_not_take(tmp_path, values):
    saved(tmp_path)
    edit_config(tmp_path, **values)
    assert "config.json must be one that transformers can read" in failure(tmp_path, looked_at)


def test_relative_positions_that_the_library_leaves_out_are_refused(tmp_path):
    saved(tmp_path, position_embedding_type="relative_key_query")
    assert "position_embedding_type 'relative_key_query'" in failure(tmp_path, looked_at)


def test_tensors_that_are_not_read_are_told_in_one_line(tmp_path, capsys):
    saved(tmp_path, layers=3)
    edit_config(tmp_path, num_hidden_layers=2)
    adapter = "bert.encoder.layer.0.attention.output.adapters.x.down.weight"
    known = ("bert.pooler.dense.bias", "cls.seq_relationship.bias", "bert.embeddings.position_ids")
    extra = {name: torch.ones(2) for name in (adapter, "classifier.weight", *known)}
    rewrite(tmp_path, lambda tensors: {**tensors, **extra})
    opened(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(WHERE)
    assert "adapters (1), bert.encoder.layer.2 (16), classifier (1);" in line
    edit_config(tmp_path, num_hidden_layers=3)  # as the line says
    opened(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "adapters (1), classifier (1);" in line


def test_what_every_checkpoint_has_is_not_told(tmp_path, capsys):
    saved(tmp_path)
    known = ("bert.pooler.dense.bias", "cls.seq_relationship.bias", "bert.embeddings.position_ids",
             "bert.embeddings.token_type_ids")  # fmt: skip
    rewrite(tmp_path, lambda tensors: {**tensors, **{name: torch.ones(2) for name in known}})
    opened(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_folder_has_no_revision(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match="a hub id where a revision .*leave the revision out"):
        open_config(str(tmp_path), where=WHERE, revision="main")


def in_hub_cache(folder, name, commit, branch):
    """What the hub's client leaves of a download."""
    place = folder / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / branch).write_text(commit)
    return place / "snapshots" / commit


def test_a_hub_id_is_opened_without_the_hub_at_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("distilcache.stages.models.hub.hub_answers", lambda *_: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    saved(in_hub_cache(tmp_path, "some/model", "a" * 40, "main"), layers=2)
    saved(in_hub_cache(tmp_path, "some/model", "b" * 40, "v2"), layers=1)
    assert open_config("some/model", where=WHERE).num_hidden_layers == 2
    found = open_config("some/model", where=WHERE, revision="v2")
    assert found.num_hidden_layers == 1
    model, _ = open_model(
        transformers.BertForMaskedLM, found, "some/model", where=WHERE, revision="v2"
    )
    assert len(model.bert.encoder.layer) == 1
    with pytest.raises(UserError, match="can be reached, got 'some/model' at revision 'v3'"):
        open_config("some/model", where=WHERE, revision="v3")


def test_a_download_without_its_weights_is_called_that(tmp_path, monkeypatch):
    monkeypatch.setattr("distilcache.stages.models.hub.hub_answers", lambda *_: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = in_hub_cache(tmp_path, "some/part", "c" * 40, "main")
    saved(place)
    whole = (place / "model.safetensors").rename(tmp_path / "weights")
    line = refused(open_config, "some/part", where=WHERE)
    assert "where other files of 'some/part' alone are; download all of it where there" in line
    shutil.copy(whole, place / "tf_model.h5")
    assert "got tf_model.h5 alone" in refused(open_config, "some/part", where=WHERE)
    whole.rename(place / "model.safetensors")
    assert open_config("some/part", where=WHERE).num_hidden_layers == 3


@torch.no_grad()
def test_a_modernbert_without_a_local_theta_has_the_global_one(tmp_path):
    """As transformers 4 saved it."""
    rope = {kind: {"rope_type": "default", "rope_theta": 5000.0}
            for kind in ("full_attention", "sliding_attention")}  # fmt: skip
    model = saved(tmp_path, "modernbert", rope_parameters=rope)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["rope_parameters"]
    old = {"global_rope_theta": 5000.0, "local_rope_theta": None}
    path.write_text(json.dumps(settings | old))
    ids = torch.randint(5, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = model(ids).logits
    torch.testing.assert_close(opened(tmp_path).eval()(ids).logits, wanted)
    path.write_text(json.dumps(settings | old | {"local_rope_theta": 10.0}))
    assert (opened(tmp_path).eval()(ids).logits - wanted).abs().max() > 1e-4


@torch.no_grad()
def test_a_flaubert_with_norms_first_runs(tmp_path, capsys):
    """As the published large one is. Attention is that of the layers themselves."""
    model = saved(tmp_path, "flaubert", pre_norm=True)
    assert model.transformer.pre_norm
    assert "transformers 5 by itself does not" in capsys.readouterr().err
    body, ids = model.transformer, torch.arange(5, 17)[None]
    hidden = body.embeddings(ids) + body.position_embeddings.weight[: ids.shape[1]]
    hidden = body.layer_norm_emb(hidden)
    for attention, first, ffn, second in zip(
        body.attentions, body.layer_norm1, body.ffns, body.layer_norm2, strict=True
    ):
        hidden = hidden + attention(first(hidden), torch.ones_like(ids))[0]
        hidden = hidden + ffn(second(hidden))
    wanted = model.pred_layer(hidden)[0]
    for found in (opened(tmp_path), copy.deepcopy(opened(tmp_path))):
        torch.testing.assert_close(found.eval()(ids).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["xlm", "flaubert"])
@pytest.mark.parametrize("sinusoidal", [False, True])
@torch.no_grad()
def test_text_is_read_in_the_language_that_the_configuration_names(
    kind, sinusoidal, tmp_path, capsys
):
    """A tokenizer gives no languages, and without them the model would add none."""
    settings = {"n_langs": 3, "lang_id": 2, "sinusoidal_embeddings": sinusoidal}
    model = saved(tmp_path, kind, **settings, lang2id={"en": 0, "fr": 1, "de": 2})
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = model(ids, langs=torch.full_like(ids, 2)).logits
    assert (model(ids).logits - wanted).abs().max() > 0.1
    one = opened(tmp_path)
    assert "knows 3 languages, and all text is read as of one: 'de';" in capsys.readouterr().err
    one.save_pretrained(tmp_path / "again")
    for found in (one, opened(tmp_path / "again"), type(one).from_pretrained(tmp_path / "again")):
        torch.testing.assert_close(found.eval()(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().err == ""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lang_id": 3}))
    assert "must have a lang_id below its n_langs, 3, got 3" in failure(tmp_path)


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_the_attention_that_a_config_names_changes_nothing(kind, field, tmp_path):
    saved(tmp_path, kind)
    ids_BL = torch.randint(5, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    attention_BL = torch.ones_like(ids_BL)
    attention_BL[1, 8:] = 0
    rows_N = torch.tensor([1, 5, 13, 19])
    plain = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    wanted = plain.base_model(ids_BL, attention_mask=attention_BL).last_hidden_state
    edit_config(tmp_path, **{field: "eager"})
    made = from_config(config_in(tmp_path)).eval()  # as a student of that teacher
    made.load_state_dict(plain.state_dict())
    teacher = load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)
    for model in (teacher.model, read_model(tmp_path, "evaluate"), made):
        found = RowEncoder(model)(ids_BL, attention_BL, rows_N)
        torch.testing.assert_close(found, wanted.flatten(0, 1)[rows_N], rtol=1e-4, atol=1e-5)


def test_a_name_by_which_transformers_takes_another_tokenizer_is_left_out(tmp_path):
    """A student's tokenizer would be opened by the class of its teacher's name."""
    saved(tmp_path)
    edit_config(tmp_path, model_name="camembertv2-base")
    assert "model_name" not in looked_at(tmp_path).to_dict()


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer", "AutoModelForQuestionAnswering"])
def test_code_for_what_is_not_read_is_not_told(kind, tmp_path, capsys):
    saved(tmp_path)
    edit_config(tmp_path, auto_map={kind: "own.Own"})
    opened(tmp_path)
    assert capsys.readouterr().err == ""


def test_code_that_is_not_used_is_not_named_in_copies(tmp_path):
    """As EuroBERT's: opened with its code allowed, a copy would ask for a file that it lacks."""
    published, copies = tmp_path / "published", (tmp_path / "teacher", tmp_path / "student")
    saved(published)
    make_tokenizer("bert").save_pretrained(published)
    code = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoTokenizer": ["own.Own", None]}}
    edit_config(published, **code)
    path = published / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **code}))
    opened(published).save_pretrained(copies[0])
    config = configuration(published, WHERE)  # as in caches that name it
    type(config)(**student_values(config, shape_of(config), 0.0, [0, 1])).save_pretrained(copies[1])
    for copy_of in copies:
        load_tokenizer(published).save_pretrained(copy_of)
        found = transformers.AutoConfig.from_pretrained(copy_of, trust_remote_code=True)
        assert type(found) is transformers.BertConfig
        words = transformers.AutoTokenizer.from_pretrained(copy_of, trust_remote_code=True)
        assert words.get_vocab() == make_tokenizer("bert").get_vocab()


def test_a_padding_id_below_zero_stands_for_none(tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, pad_token_id=-1)
    load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("shared", "heads", "expected"), [(12, 6, 6), (4, 6, 2), (4, 12, 4), (4, 7, 1)]
)
def test_narrower_students_share_keys_among_as_many_queries(shared, heads, expected):
    config = transformers.EuroBertConfig(
        hidden_size=768, num_attention_heads=12, num_key_value_heads=shared, num_hidden_layers=2
    )
    shape = dataclasses.replace(shape_of(config), width=64 * heads, heads=heads)
    values = student_values(config, shape, 0.0, [0, 1])
    assert values["num_key_value_heads"] == expected
