"""The weights that a student starts from, read tensor by tensor under its own names."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from data.errors import UserError, require
from data.families import FAMILIES, Family

DISTILBERT_FROM_BERT = {
    "distilbert.embeddings": "bert.embeddings",
    "distilbert.transformer.layer": "bert.encoder.layer",
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
    "vocab_transform": "cls.predictions.transform.dense",
    "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
    "vocab_projector": "cls.predictions.decoder",
}
"""Parts of a DistilBERT's names to those of the BERT that it is made from."""
POSITIONS = "distilbert.embeddings.position_embeddings.weight"
TYPES = "bert.embeddings.token_type_embeddings.weight"
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
"""Checkpoints converted from TensorFlow (bert-base-uncased among them) still carry these."""


class ReadTensor(Protocol):
    """Reads one tensor of a checkpoint by name."""

    def __call__(self, *names: str) -> Tensor:
        """The first of ``names`` that is there."""


def read_config(folder: Path) -> Any:
    """The configuration of a checkpoint, None where the folder holds none."""
    if not (folder / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"student: teacher in {folder} must have a readable config.json, got: "
            f"{str(error).splitlines()[0]}"
        ) from None


def teacher_tensors(
    student: PreTrainedModel, read: ReadTensor, teacher: Any, layers: Sequence[int]
) -> dict[str, Tensor]:
    """For every parameter of a student the teacher's tensor, of whatever shape.

    BERT adds the embedding of token type 0 at every position of a one-sentence input, so adding
    it to every position embedding of a DistilBERT reproduces the teacher's embedding output
    exactly.

    Args:
        student: DistilBERT for a BERT, else a model of the teacher's own family.
        read: The teacher's checkpoint.
        teacher: Its configuration.
        layers: The teacher's layer for each of the student's (group of layers where they share
            weights).
    """
    ours = FAMILIES[student.config.model_type]
    from_bert = ours.model_type == "distilbert" and teacher.model_type == "bert"
    found = {}
    for name, aliases in _names(student).items():
        sources = [_at_layer(alias, ours, layers) for alias in aliases]
        if from_bert:
            sources = [_bert_name(source) for source in sources]
            if name == "vocab_projector.bias":
                # Tying covers the bias too: the decoder's own counts only where nothing is tied.
                biases = ["cls.predictions.bias", *sources]
                sources = biases if teacher.tie_word_embeddings else biases[::-1]
        tensor = read(*sources)
        if from_bert and name == POSITIONS:
            tensor = tensor + read(TYPES)[0]
        found[name] = tensor
    return found


def _names(model: PreTrainedModel) -> dict[str, list[str]]:
    """Every parameter's name, and all the names that it is tied to; saved is any one of them."""
    aliases: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    return {names[0]: names for names in aliases.values()}


def _at_layer(name: str, family: Family, layers: Sequence[int]) -> str:
    """The name with the teacher's number of a layer in place of the student's."""
    prefix = f"{family.layers}."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{layers[int(number)]}.{rest}"


def _bert_name(name: str) -> str:
    for ours, theirs in DISTILBERT_FROM_BERT.items():
        name = name.replace(ours, theirs)
    return name


def load_checkpoint(model: PreTrainedModel, path: Path, fields: Sequence[str]) -> None:
    """Start from a checkpoint of the same architecture.

    Args:
        model: What is filled.
        path: Folder with ``config.json`` and ``model.safetensors``.
        fields: Of the configuration, that must agree.

    Raises:
        UserError: There is none, or a field of its configuration differs.
    """
    config = read_config(path)
    require(
        config is not None,
        f"student: init must be 'teacher', 'random' or a folder with config.json and "
        f"model.safetensors, got {str(path)!r}",
    )
    for name in fields:
        ours, theirs = getattr(model.config, name), getattr(config, name, None)
        require(
            ours == theirs,
            f"student: init {str(path)!r} must have the student's {name} {ours!r}, got {theirs!r}",
        )
    with open_checkpoint(path, "--set student.init=random") as read:
        set_parameters(model, {n: read(*all_) for n, all_ in _names(model).items()}, path)


@contextlib.contextmanager
def open_checkpoint(folder: Path, otherwise: str) -> Iterator[ReadTensor]:
    """Read single tensors of a safetensors checkpoint, sharded or not.

    Args:
        folder: The checkpoint.
        otherwise: Option that does without it, for the error.

    Raises:
        UserError: The weights or one of the tensors are missing or damaged.
    """
    try:
        index = folder / "model.safetensors.index.json"
        with contextlib.ExitStack() as stack:
            if index.is_file():
                files = set(json.loads(index.read_text())["weight_map"].values())
            else:
                files = {"model.safetensors"}
            where = {}
            for name in sorted(files):
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
                where.update(dict.fromkeys(file.keys(), file))

            def read(*names: str) -> Tensor:
                old = [n.replace(a, b) for n in names for a, b in OLD_NAMES.items() if a in n]
                found = next((name for name in (*names, *old) if name in where), None)
                require(
                    found is not None,
                    f"student: weights in {folder} must hold {names[0]}, got none; use {otherwise}",
                )
                tensor: Tensor = where[found].get_tensor(found)
                return tensor

            yield read
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"student: weights must be safetensors in {folder}, got: {error}; make the cache "
            f"again with its teacher, or use {otherwise}"
        ) from None


def set_parameters(model: PreTrainedModel, state: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors into the parameters; every one must be there and fit.

    Raises:
        UserError: One is missing or has another shape.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = state.get(name)
            require(
                tensor is not None and tensor.shape == parameter.shape,
                f"student: weights in {source} must hold {name} of shape "
                f"{tuple(parameter.shape)}, got {None if tensor is None else tuple(tensor.shape)}",
            )
            assert tensor is not None
            parameter.copy_(tensor)
