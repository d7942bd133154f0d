"""Shapes of teacher and students, and the FLOPs and parameters that follow from them.

Only matrix products count; a multiply-add is two FLOPs. A layer takes ``4 D^2 + 2 D F + 2 L D``
multiply-adds per token; in the last layer, ``D^2 + 2 D F`` of them are needed at signal positions
only. The LM head takes ``D E + E V`` per signal position. A backward pass costs two forward passes.

Shapes: ``L`` positions of a sequence, ``D`` width, ``F`` feed-forward width, ``E`` width of the
embeddings, ``V`` vocabulary.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError, require
from distilcache.pipeline.check_recipe import made_teacher
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.models.families import shape_of

POSITIONS = 512
"""Of a BERT."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A masked LM of the BERT kind."""

    layers: int
    width: int
    ffn: int
    vocabulary: int
    embedding: int = 0
    """Width of the embeddings; 0: that of the layers."""
    counted: int = 0
    """Parameters of the model itself; 0: those of a BERT."""

    def body(self, length: float, fraction: float) -> float:
        """FLOPs of the layers for one token, forward.

        Args:
            length: Tokens of a sequence.
            fraction: Of the positions, those that need the last layer's feed-forward.
        """
        layer = self.width * (4 * self.width + 2 * self.ffn + 2 * length)
        spared = (1 - fraction) * self.width * (self.width + 2 * self.ffn)
        return 2 * (self.layers * layer - spared)

    @property
    def lm_head(self) -> float:
        """FLOPs of the LM head for one position, forward."""
        embedding = self.embedding or self.width
        return 2.0 * (self.width * embedding + embedding * self.vocabulary)

    @property
    def parameters(self) -> int:
        """Of the model, or of a BERT of this size: layers, embeddings and LM head, tied."""
        if self.counted:
            return self.counted
        width, ffn, embedding = self.width, self.ffn, self.embedding or self.width
        layer = 4 * width * (width + 1) + 2 * width * ffn + ffn + 5 * width  # 4 of two norms
        inputs = embedding * (self.vocabulary + POSITIONS + 4)  # token types, and a norm
        head = embedding * (width + 3) + self.vocabulary
        return self.layers * layer + inputs + head


def _base(vocabulary: int, layers: int = 12) -> Shape:
    return Shape(layers=layers, width=768, ffn=3072, vocabulary=vocabulary)


def _large(vocabulary: int) -> Shape:
    return Shape(layers=24, width=1024, ffn=4096, vocabulary=vocabulary)


PUBLISHED = {
    "bert-base-uncased": _base(30522),
    "bert-base-cased": _base(28996),
    "bert-base-multilingual-cased": _base(119547),
    "bert-large-uncased": _large(30522),
    "bert-large-cased": _large(28996),
    "distilbert-base-uncased": _base(30522, 6),
    "roberta-base": _base(50265),
    "roberta-large": _large(50265),
    "distilroberta-base": _base(50265, 6),
    "camembert-base": _base(32005),
    "xlm-roberta-base": _base(250002),
    "xlnet-base-cased": _base(32000),
    "xlnet-large-cased": _large(32000),
}
"""From the configurations on the hub, so no network is needed to plan with them."""
GIVE_A_SHAPE = (
    "pass --set teacher.model=PATH, or its shape: --set teacher.model= --set teacher.size=12x768 "
    "--set corpus.vocab_size=30522"
)


def teacher_shape(recipe: Recipe) -> Shape:
    """Shape of the recipe's teacher, without loading its weights.

    Raises:
        UserError: It is no folder, no well-known name, and the hub does not know it.
    """
    model = recipe.teacher.model
    if not model:
        require(
            bool(recipe.teacher.size),
            "plan: teacher must be named, got none; pass --set teacher.model=PATH, or "
            "--set teacher.size=12x768 and --set corpus.vocab_size=30522 for its shape alone",
        )
        return _shape(made_teacher(recipe))
    if is_published(recipe):
        return PUBLISHED[model.rpartition("/")[2]]
    return _configured(model, recipe.teacher.revision)


def shape_in(cache: Cache) -> Shape:
    """Shape of a finished cache's teacher; its vocabulary alone where it has none."""
    if cache.encoding.mask_only:
        return Shape(layers=0, width=0, ffn=0, vocabulary=cache.encoding.vocab_size)
    return _configured(str(cache.teacher_dir))


def is_published(recipe: Recipe) -> bool:
    """Whether the teacher is a well-known one that is not a local folder."""
    model = recipe.teacher.model
    return not Path(model).is_dir() and model.rpartition("/")[2] in PUBLISHED


def published_config(recipe: Recipe) -> Any:
    """A configuration of a well-known teacher's size; None where the teacher is another one."""
    from transformers import AutoConfig

    if not is_published(recipe):
        return None
    name = recipe.teacher.model.rpartition("/")[2]
    shape, kind = PUBLISHED[name], name.partition("-")[0]
    kinds = {"distilroberta": "roberta", "xlm": "xlm-roberta"}
    return AutoConfig.for_model(
        kinds.get(kind, kind),
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.width // 64,
        vocab_size=shape.vocabulary,
    )


def _configured(model: str, revision: str = "") -> Shape:
    from distilcache.stages.models.checkpoints import open_config

    config = open_config(model, where="plan: teacher", revision=revision, needs=GIVE_A_SHAPE)
    try:
        return _shape(config)
    except AttributeError:
        raise UserError(
            f"plan: teacher must be of a known kind, got {model!r} of type {config.model_type!r}; "
            f"{GIVE_A_SHAPE}"
        ) from None


def _shape(config: Any) -> Shape:
    shape = shape_of(config)
    return Shape(
        layers=shape.layers,
        width=shape.width,
        ffn=shape.ffn,
        vocabulary=config.vocab_size,
        embedding=getattr(config, "embedding_size", 0),
        counted=_parameters_of(config),
    )


def _parameters_of(config: Any) -> int:
    """Parameters of a model of this configuration, which is not made; 0: it cannot be."""
    import torch

    from distilcache.stages.models.encoder import from_config

    try:
        with torch.device("meta"):
            return int(from_config(config).num_parameters())
    except Exception:  # of code that needs numbers
        return 0


def student_shape(recipe: Recipe, config: Any) -> Shape:
    """Shape of a student of the recipe, with the teacher's vocabulary or the number it keeps.

    Of a share the number is not known, so it counts as all. ``config`` has the whole vocabulary.
    """
    kept = int(recipe.student.vocabulary)
    if 1 < kept < config.vocab_size:
        config = copy.deepcopy(config)
        config.vocab_size = kept
    return _shape(config)
