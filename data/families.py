"""Every family of masked LMs that teachers and students may be of, described once. No torch here.

What follows from an entry, for teacher and student alike:

    data.families.head_spec     names of the LM head's tensors, of one configuration
    data.codecs.lm_head         its formula
    data.encoder.RowEncoder     hidden states at some positions, whatever inputs the family takes
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.errors import UserError
from data.head import HeadSpec

MASKS = ("keys", "windows", "tokens", "permutation")
"""How a model is told what is padding:

``keys``          bool [B, 1, 1, L], which transformers hands on as it is
``windows``       a dictionary of such masks, one for global and one for local attention
``tokens``        int64 [B, L], always
``permutation``   XLNet: float [B, L], with ``perm_mask`` and ``target_mapping``
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What sets the models of one ``model_type`` apart from those of another.

    Names of tensors and modules are those of the model with its LM head, as in ``state_dict()``.
    Fields that name a field of the configuration use the name that transformers saves.
    """

    model_type: str
    model: str
    """Class in transformers with the LM head."""
    config: str
    """Class in transformers of its configuration."""
    encoder: str
    """Module without the LM head."""
    layers: str
    """Module list of the layers; layer i is ``{layers}.{i}``."""
    embedding: str
    """Tensor of the word embeddings [V, E], to which the decoder is usually tied."""
    head: Mapping[str, str]
    """Role (``data.head.ROLES``) to tensor; ones that a configuration leaves out are absent from
    :func:`head_spec`."""
    shared_layers: bool = False
    """Layers share their weights; ``layers`` then lists groups."""
    row_wise: str = ""
    """Module of the last layer from which on each position is computed on its own, all its
    arguments included; "": there is none, and positions are chosen after the encoder."""
    mask: str = "keys"
    """One of ``MASKS``."""
    activation: str = "hidden_act"
    """Field that names the head's activation."""
    fixed_activation: str = ""
    """The head's activation where no field names it."""
    eps: str = "layer_norm_eps"
    """Field with the epsilon of layer norms; "": it is 1e-12."""
    positions: str = "max_position_embeddings"
    """Field with the number of positions; "": relative ones, of any number."""
    positions_from_pad: bool = False
    """Positions are counted from the padding id on, so that fewer are left."""
    num_layers: str = "num_hidden_layers"
    """Field."""
    width: str = "hidden_size"
    """Field with the width D of the hidden states."""
    heads: str = "num_attention_heads"
    """Field."""
    ffn: str = "intermediate_size"
    """Field with the inner width of the feed-forward part."""
    inner_activation: str = "hidden_act"
    """Field that names the activation of the feed-forward part."""
    dropouts: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    """Fields with the dropout probabilities of the encoder."""
    embedding_width: str = ""
    """Field with the width E of the word embeddings; "": it is D."""


def _head(dense: str, norm: str, decoder: str) -> dict[str, str]:
    """Roles of dense, norm and decoder from the names of their modules."""
    parts = {"dense": dense, "norm": norm, "decoder": decoder}
    return {f"{k}.{end}": f"{v}.{end}" for k, v in parts.items() for end in ("weight", "bias")}


_CLS = "cls.predictions"
_BERT_HEAD = _head(f"{_CLS}.transform.dense", f"{_CLS}.transform.LayerNorm", f"{_CLS}.decoder")
_BERT = Family(
    model_type="bert",
    model="BertForMaskedLM",
    config="BertConfig",
    encoder="bert",
    layers="bert.encoder.layer",
    embedding="bert.embeddings.word_embeddings.weight",
    head=_BERT_HEAD,
    row_wise="attention.output",
)
_ROBERTA = replace(
    _BERT,
    model_type="roberta",
    model="RobertaForMaskedLM",
    config="RobertaConfig",
    encoder="roberta",
    layers="roberta.encoder.layer",
    embedding="roberta.embeddings.word_embeddings.weight",
    head=_head("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    activation="",
    fixed_activation="gelu",
    positions_from_pad=True,
)
_ENTRIES = (
    _BERT,
    _ROBERTA,
    replace(
        _ROBERTA,
        model_type="xlm-roberta",
        model="XLMRobertaForMaskedLM",
        config="XLMRobertaConfig",
    ),
    replace(
        _ROBERTA, model_type="camembert", model="CamembertForMaskedLM", config="CamembertConfig"
    ),
    Family(
        model_type="distilbert",
        model="DistilBertForMaskedLM",
        config="DistilBertConfig",
        encoder="distilbert",
        layers="distilbert.transformer.layer",
        embedding="distilbert.embeddings.word_embeddings.weight",
        head=_head("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        row_wise="sa_layer_norm",
        activation="activation",
        eps="",
        num_layers="n_layers",
        width="dim",
        heads="n_heads",
        ffn="hidden_dim",
        inner_activation="activation",
        dropouts=("dropout", "attention_dropout"),
    ),
    replace(
        _BERT,
        model_type="electra",
        model="ElectraForMaskedLM",
        config="ElectraConfig",
        encoder="electra",
        layers="electra.encoder.layer",
        embedding="electra.embeddings.word_embeddings.weight",
        head=_head(
            "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"
        ),
        activation="",
        fixed_activation="gelu",
        embedding_width="embedding_size",
    ),
    replace(
        _BERT,
        model_type="albert",
        model="AlbertForMaskedLM",
        config="AlbertConfig",
        encoder="albert",
        layers="albert.encoder.albert_layer_groups",
        embedding="albert.embeddings.word_embeddings.weight",
        head=_head("predictions.dense", "predictions.LayerNorm", "predictions.decoder"),
        shared_layers=True,
        row_wise="",
        embedding_width="embedding_size",
    ),
    replace(
        _BERT,
        model_type="mobilebert",
        model="MobileBertForMaskedLM",
        config="MobileBertConfig",
        encoder="mobilebert",
        layers="mobilebert.encoder.layer",
        embedding="mobilebert.embeddings.word_embeddings.weight",
        # The embeddings are narrower than the head; a matrix of its own adds the other columns.
        head={**_BERT_HEAD, "decoder.columns": f"{_CLS}.dense.weight"},
        row_wise="",  # a residual connection leads around the whole layer
        embedding_width="embedding_size",
    ),
    replace(
        _BERT,
        model_type="deberta-v2",
        model="DebertaV2ForMaskedLM",
        config="DebertaV2Config",
        encoder="deberta",
        layers="deberta.encoder.layer",
        embedding="deberta.embeddings.word_embeddings.weight",
        mask="tokens",
    ),
    Family(
        model_type="modernbert",
        model="ModernBertForMaskedLM",
        config="ModernBertConfig",
        encoder="model",
        layers="model.layers",
        embedding="model.embeddings.tok_embeddings.weight",
        head=_head("head.dense", "head.norm", "decoder"),
        mask="windows",
        activation="classifier_activation",
        eps="norm_eps",
        inner_activation="hidden_activation",
        dropouts=("embedding_dropout", "mlp_dropout", "attention_dropout"),
    ),
    Family(
        model_type="xlnet",
        model="XLNetLMHeadModel",
        config="XLNetConfig",
        encoder="transformer",
        layers="transformer.layer",
        embedding="transformer.word_embedding.weight",
        head={"decoder.weight": "lm_loss.weight", "decoder.bias": "lm_loss.bias"},
        mask="permutation",
        activation="",
        fixed_activation="gelu",
        positions="",
        num_layers="n_layer",
        width="d_model",
        heads="n_head",
        ffn="d_inner",
        inner_activation="ff_activation",
        dropouts=("dropout",),
    ),
)
FAMILIES: Mapping[str, Family] = {entry.model_type: entry for entry in _ENTRIES}
"""By ``model_type`` of a configuration."""


def family_of(config: Any, where: str) -> Family:
    """The family of a configuration.

    Args:
        config: Anything with a ``model_type``.
        where: Stage and what is asked for, for the error: ``teacher: model``.

    Raises:
        UserError: It is none of the families.
    """
    kind = getattr(config, "model_type", None)
    family = FAMILIES.get(str(kind))
    if family is None:
        raise UserError(
            f"{where} must be of a known family ({', '.join(sorted(FAMILIES))}), got {kind!r}"
        )
    return family


def max_length(config: Any) -> int | None:
    """Longest sequence that a model of this configuration takes; None: of any length."""
    family = FAMILIES[config.model_type]
    if not family.positions:
        return None
    positions = int(getattr(config, family.positions))
    return positions - int(config.pad_token_id) - 1 if family.positions_from_pad else positions


def head_spec(config: Any) -> HeadSpec:
    """Where the LM head lies in ``state_dict()`` of a model of this configuration."""
    family = FAMILIES[config.model_type]
    tensors = dict(family.head)
    if family.model_type == "modernbert":
        has = {
            "dense.bias": config.classifier_bias,
            "norm.bias": config.norm_bias,
            "decoder.bias": config.decoder_bias,
        }
        tensors = {role: name for role, name in tensors.items() if has.get(role, True)}
    if family.model_type == "deberta-v2" and not config.legacy:
        own = "lm_predictions.lm_head"
        tensors = _head(f"{own}.dense", f"{own}.LayerNorm", own)
        tensors["decoder.weight"] = family.embedding
    named = getattr(config, family.activation) if family.activation else family.fixed_activation
    eps = float(getattr(config, family.eps)) if family.eps else 1e-12
    return HeadSpec(tensors=tensors, activation=str(named), eps=eps)
