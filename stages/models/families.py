"""What sets some types of masked LM apart. No torch here.

Any masked LM that transformers knows may be a teacher, and a student. What a model is made of (LM
head, layers, unused parameters) is read off the model itself (``anatomy.py``); this table holds
what a model does not tell.

Names of configuration fields are the common ones, as ``config.hidden_size``: configurations with
names of their own translate them (``attribute_map``).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distilcache.data.errors import require

FFN_FIELDS = ("intermediate_size", "hidden_dim", "d_inner", "encoder_ffn_dim")
"""Fields that may hold the inner width of the feed-forward part."""
ACTIVATION_FIELDS = (
    "hidden_act",
    "activation",
    "hidden_activation",
    "ff_activation",
    "activation_function",
)
"""Fields that may name the activation of the feed-forward part."""
BY_LAYER = ("layer_types", "attention_window")
"""Fields that list something for each layer: a copied layer keeps it."""
SILENT_FIELDS = frozenset(
    ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
    + ("id2label", "label2id", "problem_type")
    + ("output_attentions", "output_hidden_states", "return_dict")
)
"""Fields of a configuration that do not change its masked-LM outputs."""
NO_RELATIONS = (
    *("bart", "convbert", "deberta", "fnet", "funnel", "ibert", "longformer", "mbart"),
    *("mobilebert", "mvp", "squeezebert", "xlnet"),
)
"""Types whose queries, keys and values are no linear maps, of the layer's width, of what the layer
reads."""
NO_DROPOUT_OF_LAYERS = ("classif", "summary", "pooler")
"""Parts of the names of dropout fields that belong to task heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What sets the models of one ``model_type`` apart from others."""

    mask: str = "tokens"
    """How a model is told what is padding:

    ``tokens``        int64 [B, L], always; most such models wait for the device once in a pass
    ``keys``          bool [B, 1, 1, L], which transformers hands on as it is
    ``windows``       a dictionary of such masks, one for global and one for local attention
    ``permutation``   XLNet: float [B, L], with ``perm_mask`` and ``target_mapping``
    """
    positions_from_pad: bool = False
    """Positions are counted from the padding id on, so that fewer are left."""
    even: str = ""
    """Why sequences of a batch must be of one length; "": they need not be."""
    refused: str = ""
    """Why such a model can be no teacher; "": it can."""
    bfloat16: bool = True
    """Its code in transformers runs in autocast, and with weights of that type."""


_KEYS = Family(mask="keys")
_ROBERTA = Family(mask="keys", positions_from_pad=True)
_FROM_PAD = Family(positions_from_pad=True)
_TWO_TEXTS = "text is one of two inputs of it, described by a configuration of its own"
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("bert", "distilbert", "electra", "albert", "mobilebert", "ernie"), _KEYS),
    **dict.fromkeys(("esmc", "eurobert", "gte", "nomic_bert", "roc_bert"), _KEYS),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "data2vec-text"), _ROBERTA),
    **dict.fromkeys(("roberta-prelayernorm", "xlm-roberta-xl"), _ROBERTA),
    **dict.fromkeys(("esm", "ibert", "longformer", "luke", "mpnet"), _FROM_PAD),
    "xmod": Family(mask="keys", positions_from_pad=True, bfloat16=False),
    "deberta": Family(bfloat16=False),
    "modernbert": Family(mask="windows"),
    "xlnet": Family(mask="permutation"),
    "fnet": Family(even="it mixes padding into every position", bfloat16=False),
    "convbert": Family(even="its convolutions read padding"),
    "funnel": Family(even="it pools padding with what stands beside it"),
    "yoso": Family(even="its sums over hash buckets hold padding"),
    "nystromformer": Family(even="its landmarks are means over padding, too"),
    "perceiver": Family(refused="its LM head reads latents, not the hidden states of positions"),
    "reformer": Family(refused="its LM head reads two streams of twice the width"),
    "mra": Family(refused="without a kernel for GPUs from the hub its attention is zero"),
    "neomme": Family(refused="its decoder is two matrices, one behind the other"),
    "ultrabert": Family(refused="its LM head has two hidden layers"),
    "modernvbert": Family(refused=_TWO_TEXTS),
    "ultravbert": Family(refused=_TWO_TEXTS),
}
"""By ``model_type`` of a configuration; what is not named has nothing that sets it apart."""


def family_of(config: Any, where: str = "model") -> Family:
    """The family of a configuration.

    ``where`` is the stage and what is asked for, for the error: ``teacher: model``.

    Raises:
        UserError: It is no masked LM, or one that cannot be a teacher.
    """
    kind = str(getattr(config, "model_type", None))
    family = FAMILIES.get(kind)
    if family is None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        require(
            kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            f"{where} must be a masked LM that transformers knows, got type {kind!r}; for example "
            "a BERT, RoBERTa, ELECTRA (generator), XLM-R or ModernBERT",
        )
        return Family()
    require(
        not family.refused,
        f"{where} must not be of type {kind!r}, whose signals cannot be kept: {family.refused}",
    )
    return family


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Size of a masked LM."""

    layers: int
    width: int
    """Of the hidden states, D."""
    heads: int
    ffn: int
    """Inner width of the feed-forward part."""

    def __str__(self) -> str:
        """``LAYERSxWIDTH``."""
        return f"{self.layers}x{self.width}"


def shape_of(config: Any) -> Shape:
    """Size of a model of this configuration; where no field tells the feed-forward width, 4 D."""
    width, ffn = int(config.hidden_size), ffn_field(config)
    return Shape(
        layers=int(config.num_hidden_layers),
        width=width,
        heads=int(config.num_attention_heads),
        ffn=int(getattr(config, ffn)) if ffn else 4 * width,
    )


def ffn_field(config: Any) -> str:
    """Field of the feed-forward width; "": the model derives it."""
    return next((name for name in FFN_FIELDS if hasattr(config, name)), "")


def activation_field(config: Any) -> str:
    """Field of the activation in the feed-forward part; "": there is none."""
    return next((name for name in ACTIVATION_FIELDS if hasattr(config, name)), "")


def has_relations(config: Any) -> bool:
    """Whether queries, keys and values are linear maps, of its width, of what a layer reads."""
    shape = shape_of(config)
    return (
        config.model_type not in NO_RELATIONS
        and (getattr(config, "num_key_value_heads", None) or shape.heads) == shape.heads
        and (getattr(config, "head_dim", None) or shape.width // shape.heads) * shape.heads
        == shape.width
        and getattr(config, "inner_group_num", 1) == 1  # ALBERT: several layers in one
    )


def max_length(config: Any) -> int | None:
    """Longest sequence that a model of this configuration takes; None: of any length."""
    kind = config.model_type
    positions = getattr(config, "max_position_embeddings", None)
    if kind == "xlnet" or positions is None or positions < 1:
        return None
    if kind == "big_bird" and config.attention_type == "block_sparse":
        # Above this length attention is sparse and drawn at random; up to it, it is full.
        full = int((5 + 2 * config.num_random_blocks) * config.block_size)
        return min(int(positions), full)
    from_pad = family_of(config).positions_from_pad
    return int(positions) - (int(config.pad_token_id or 0) + 1 if from_pad else 0)


def student_values(config: Any, shape: Shape, dropout: float, picked: list[int]) -> dict[str, Any]:
    """Values of a configuration of the same type with another size.

    Args:
        config: The teacher's.
        shape: The student's.
        dropout: All dropout of the layers, whatever the teacher's is.
        picked: The teacher's layer for each of the student's: what a configuration lists by layer
            comes from there.
    """
    values = dict(config.to_dict())
    for name in ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"):
        values.pop(name, None)  # those of the teacher's weights, and of code that is not used
    theirs, names = shape_of(config), config.attribute_map
    for name, value in values.items():
        if name in BY_LAYER and isinstance(value, list):
            values[name] = [value[i] for i in picked]
        if name == "decoder_layers":  # as many for each layer of the encoder
            values[name] = max(1, value * shape.layers // theirs.layers)
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        if "dropout" in name and is_number and not any(x in name for x in NO_DROPOUT_OF_LAYERS):
            values[name] = dropout
        if "layerdrop" in name and is_number:
            values[name] = 0.0
    if "block_sizes" in values:  # Funnel: the layers of each block
        values["block_sizes"] = fewer_in_blocks(values["block_sizes"], shape.layers)
    else:
        values[names.get("num_hidden_layers", "num_hidden_layers")] = shape.layers
    if "num_hidden_groups" in values:  # ALBERT: layers of a group share their weights
        values["num_hidden_groups"] = min(values["num_hidden_groups"], shape.layers)
    sizes = {"hidden_size": "width", "num_attention_heads": "heads", ffn_field(config): "ffn"}
    require(
        "" not in sizes or shape.ffn == 4 * shape.width,
        f"student: feed-forward must be 4 times the width in a model of type "
        f"{config.model_type!r}, got {shape.ffn}; leave student.ffn at 0",
    )
    for name, ours in sizes.items():
        if name and getattr(shape, ours) != getattr(theirs, ours):
            values[names.get(name, name)] = getattr(shape, ours)
            for derived in ("d_head", "head_dim"):
                values.pop(derived, None)
    if shape.width != theirs.width and "pooler_hidden_size" in values:  # DeBERTa's
        values["pooler_hidden_size"] = shape.width
    if shape.heads != theirs.heads and "decoder_attention_heads" in values:
        values["decoder_attention_heads"] = shape.heads
    if "decoder_ffn_dim" in values:
        values["decoder_ffn_dim"] = max(1, values["decoder_ffn_dim"] * shape.ffn // theirs.ffn)
    shared = values.get("num_key_value_heads")
    if isinstance(shared, int) and shape.heads != theirs.heads:  # as many queries for each of them
        most = max(1, shape.heads * shared // theirs.heads)
        values["num_key_value_heads"] = next(n for n in range(most, 0, -1) if shape.heads % n == 0)
    return values


def fewer_in_blocks(sizes: list[int], layers: int) -> list[int]:
    """As many blocks, with that many layers in all; beyond one each in the same proportion."""
    more = layers - len(sizes)
    require(
        more >= 0,
        f"student: layers must be one at least for each of the teacher's {len(sizes)} blocks, got "
        f"{layers}",
    )
    beyond = [size - 1 for size in sizes]
    total = max(1, sum(beyond))
    ends = [sum(beyond[:i]) * more // total for i in range(len(sizes) + 1)]
    ends[-1] = more
    return [1 + end - start for start, end in zip(ends, ends[1:], strict=False)]


def check_dtype(name: str, configs: Iterable[Any]) -> str | None:
    """The first type of some models whose code does not run in bfloat16; None: all do.

    Raises:
        UserError: There is one, and ``name`` is ``bfloat16``.
    """
    kind = next((c.model_type for c in configs if not family_of(c).bfloat16), None)
    require(
        name != "bfloat16" or kind is None,
        f"recipe: dtype must be 'float32' for a model of type {kind!r}, whose code in transformers "
        "does not run in bfloat16, got 'bfloat16'; use --set dtype=float32",
    )
    return kind
