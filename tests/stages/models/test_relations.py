"""Queries, keys and values of every family's layers, against its own states and weights."""

import pickle

import pytest
import torch

from distilcache.data.codecs.relations import RelationMaps
from distilcache.data.errors import UserError
from distilcache.stages.models.families import NO_RELATIONS
from distilcache.stages.models.relations import RelationTap
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.fit import check_settings
from tests.stages.models.families_support import FAMOUS, WORKING, make_model

PATHS = {
    "distilbert": "distilbert.transformer.layer.{}.attention.{}_lin",
    "albert": "albert.encoder.albert_layer_groups.{}.albert_layers.0.attention.{}",
    "deberta-v2": "deberta.encoder.layer.{}.attention.self.{}_proj",
}
SHORT = {"query": "q", "key": "k", "value": "v"}


def wanted_queries(model, kind, layer, states):
    """From the family's own tensors, by their full names."""
    if kind == "modernbert":
        own = model.model.layers[layer - 1]
        return own.attn.Wqkv(own.attn_norm(states)).chunk(3, -1)
    prefix = model.base_model_prefix
    path = PATHS.get(kind, prefix + ".encoder.layer.{}.attention.self.{}")
    # Two of this ALBERT's three layers are of its first group.
    at = (layer - 1) * 2 // 3 if kind == "albert" else layer - 1
    names = [SHORT[name] if "_lin" in path else name for name in SHORT]
    return [model.get_submodule(path.format(at, name))(states) for name in names]


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in FAMOUS if kind not in NO_RELATIONS])
def test_queries_keys_and_values(kind):
    model = make_model(kind, 90).eval()
    ids = torch.arange(20, 48).view(4, 7)
    states = model.base_model(ids, output_hidden_states=True).hidden_states
    layers = model.config.num_hidden_layers
    for layer in (-1, 2):
        tap = RelationTap(model, layer, "cache: relation_layer")
        number = layers if layer == -1 else layer
        assert tap.layer == number
        with tap:
            model.base_model(ids)
        wanted = torch.stack(list(wanted_queries(model, kind, number, states[number - 1])))
        torch.testing.assert_close(tap.gave(), wanted)
        with tap:
            model.base_model(ids)
        read = tap.read()
        if kind != "modernbert":
            torch.testing.assert_close(read, states[number - 1])
        model.base_model(ids)  # Without it nothing is kept.
        with pytest.raises(IndexError):
            tap.read()


SHARED = {"share_att_key": True, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}
"""As in the published DeBERTa-v2 and v3: the maps also read relative positions."""


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "more"),
    [*((kind, {}) for kind in WORKING if kind not in NO_RELATIONS), ("deberta-v2", SHARED)],
)
def test_the_maps_are_named_by_what_they_give(kind, more):
    """Of every type, whatever the order in which it calls them."""
    model = make_model(kind, 90, **more).eval()
    ids = torch.arange(20, 48).view(4, 7)
    for layer in (-1, 1):
        tap = RelationTap(model, layer, "cache: relation_layer")
        with tap:
            model.base_model(input_ids=ids)
            gave = tap.gave()
            model.base_model(input_ids=ids)
            read = tap.read()
        tensors = {role: model.state_dict()[name] for role, name in tap.tensors.items()}
        torch.testing.assert_close(RelationMaps(tensors)(read), gave)


def test_a_model_with_a_tap_can_be_sent_to_another_process():
    model = make_model("bert", 90).eval()
    RelationTap(model, -1, "train: alpha_rel")
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *((kind, {}) for kind in NO_RELATIONS),
        ("eurobert", {"num_key_value_heads": 1}),
        ("albert", {"inner_group_num": 2}),
    ],
)
def test_models_without_such_maps_are_refused(kind, more):
    """By the model itself, and by its configuration, before any text is read."""
    model = make_model(kind, 90, **more)
    message = f"cache: relation_layer must be 0 for a model of type {kind!r}, whose .* linear maps"
    with pytest.raises(UserError, match=message):
        RelationTap(model, -1, "cache: relation_layer")
    with pytest.raises(UserError, match=message):
        check_settings(model.config, 8, True, CacheConfig(relation_layer=-1))
