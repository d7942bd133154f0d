"""Student architecture and initialisation.

Students are DistilBERTs (Sanh et al. 2019, arXiv:1910.01108): BERT without token types and
pooler, fewer layers, started from layers of the teacher.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, DistilBertConfig, DistilBertForMaskedLM

from data.errors import UserError, require
from data.schema import Encoding
from stages.student_train.config import StudentConfig, StudentSize

BERT_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
BERT_HEAD = {
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
}
DISTILBERT_HEAD = ("vocab_transform", "vocab_layer_norm")
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
"""Checkpoints converted from TensorFlow (bert-base-uncased among them) still carry these."""


class ReadTensor(Protocol):
    """Reads one tensor of a checkpoint by name."""

    def __call__(self, *names: str) -> Tensor:
        """The first of ``names`` that is there."""


def pick_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Teacher layers that a student starts from: evenly spread, first and last included.

    ``round(i (n - 1) / (m - 1))``, halves down. 12 -> 6 gives DistilBERT's 0, 2, 4, 7, 9, 11;
    6 -> 3 gives 0, 2, 5; n -> n all of them; one layer is the first; more layers than the
    teacher's repeat some.
    """
    if student_layers == 1:
        return [0]
    span = student_layers - 1
    return [(2 * i * (teacher_layers - 1) + span - 1) // (2 * span) for i in range(student_layers)]


def build_student(
    *, size: str, student: StudentConfig, seed: int, encoding: Encoding, teacher_dir: Path
) -> DistilBertForMaskedLM:
    """Make a student and its first weights.

    Args:
        size: ``LAYERSxWIDTH``.
        student: Recipe section.
        seed: Of everything that is drawn at random.
        encoding: Of the cache: vocabulary, longest sequence, padding.
        teacher_dir: The teacher's checkpoint in the cache; only a tokenizer in mask-only caches.

    Raises:
        UserError: The size does not fit the teacher, or the weights it starts from are not there
            or have another architecture.
    """
    teacher = _teacher_config(teacher_dir)
    inherits = student.init == "teacher"
    require(
        not inherits or teacher is not None,
        f"student: init must be 'random' or a checkpoint where the cache holds no teacher, got "
        f"'teacher' and nothing in {teacher_dir}; use --set student.init=random",
    )
    same_width = teacher is not None and size.lower().endswith(f"x{teacher.hidden_size}")
    copies = inherits and same_width
    shape = _shape(size, student, teacher if copies else None)
    config = _distilbert_config(shape, student, encoding, teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DistilBertForMaskedLM(config)
    if copies:
        copy_from_teacher(model, teacher_dir, teacher)
    elif inherits:
        # A truncated SVD of the embeddings could carry some of the teacher over.
        print(
            f"student: {shape} is not as wide as the teacher ({teacher.hidden_size}): "
            "its layers and embeddings start at random",
            file=sys.stderr,
        )
    elif student.init != "random":
        load_checkpoint(model, Path(student.init))
    return model


def _teacher_config(teacher_dir: Path) -> Any:
    """The teacher's configuration, None where the cache holds only a tokenizer."""
    if not (teacher_dir / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(str(teacher_dir), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"student: teacher in {teacher_dir} must have a readable config.json, got: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _ffn_width(config: Any) -> int:
    return int(config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size)


def _shape(size: str, student: StudentConfig, teacher: Any) -> StudentSize:
    """The size in full; a student that copies layers takes the teacher's heads and FFN."""
    if teacher is None:
        return student.parse(size)
    heads, ffn = int(teacher.num_attention_heads), _ffn_width(teacher)
    for name, theirs in (("heads", heads), ("ffn", ffn)):
        ours = getattr(student, name)
        require(
            ours in (0, theirs),
            f"student: {name} must be the teacher's {theirs} where init is 'teacher', got {ours}; "
            f"use --set student.{name}=0 or --set student.init=random",
        )
    return student.parse(size, heads=heads, ffn=ffn)


def _distilbert_config(
    shape: StudentSize, student: StudentConfig, encoding: Encoding, teacher: Any
) -> DistilBertConfig:
    positions = encoding.max_length
    activation, tied, vocabulary = "gelu", True, encoding.vocab_size
    if teacher is not None:
        bert_like = teacher.model_type in ("bert", "distilbert")
        positions = teacher.max_position_embeddings if bert_like else positions
        if bert_like:
            name = "activation" if teacher.model_type == "distilbert" else "hidden_act"
            activation = getattr(teacher, name)
        tied, vocabulary = teacher.tie_word_embeddings, teacher.vocab_size
    return DistilBertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        n_layers=shape.layers,
        n_heads=shape.heads,
        dim=shape.width,
        hidden_dim=shape.ffn,
        dropout=student.dropout,
        attention_dropout=student.dropout,
        activation=activation,
        tie_word_embeddings=tied,
        pad_token_id=encoding.pad_id,
    )


def copy_from_teacher(model: DistilBertForMaskedLM, teacher_dir: Path, teacher: Any) -> None:
    """Copy embeddings, every n-th layer and the LM head, reading only those tensors.

    BERT adds the embedding of token type 0 at every position of a one-sentence input, so adding
    it to every position embedding reproduces the teacher's embedding output exactly.
    """
    require(
        teacher.model_type in ("bert", "distilbert"),
        f"student: init must be 'random' or a checkpoint for teachers of type "
        f"{teacher.model_type!r}, got 'teacher'; use --set student.init=random",
    )
    layers = pick_layers(teacher.num_hidden_layers, model.config.n_layers)
    with open_checkpoint(teacher_dir, "--set student.init=random") as read:
        copy = _from_bert if teacher.model_type == "bert" else _from_distilbert
        state = copy(read, layers, bool(teacher.tie_word_embeddings))
    _load(model, state, teacher_dir)


def _from_bert(read: ReadTensor, layers: list[int], tied: bool) -> dict[str, Tensor]:
    ends = ("weight", "bias")
    source, ours = "bert.embeddings", "distilbert.embeddings"
    state = {f"{ours}.word_embeddings.weight": read(f"{source}.word_embeddings.weight")}
    type_zero = read(f"{source}.token_type_embeddings.weight")[0]
    positions = read(f"{source}.position_embeddings.weight")
    state[f"{ours}.position_embeddings.weight"] = positions + type_zero
    for end in ends:
        state[f"{ours}.LayerNorm.{end}"] = read(f"{source}.LayerNorm.{end}")
        for i, layer in enumerate(layers):
            for theirs, name in BERT_LAYER.items():
                tensor = read(f"bert.encoder.layer.{layer}.{theirs}.{end}")
                state[f"distilbert.transformer.layer.{i}.{name}.{end}"] = tensor
        for theirs, name in BERT_HEAD.items():
            state[f"{name}.{end}"] = read(f"{theirs}.{end}")
    # Tying covers the bias too: the decoder's own counts only where nothing is tied.
    biases = ["cls.predictions.bias", "cls.predictions.decoder.bias"]
    state["vocab_projector.bias"] = read(*(biases if tied else reversed(biases)))
    if not tied:
        state["vocab_projector.weight"] = read("cls.predictions.decoder.weight")
    return state


def _from_distilbert(read: ReadTensor, layers: list[int], tied: bool) -> dict[str, Tensor]:
    names = ["distilbert.embeddings.word_embeddings.weight", "vocab_projector.bias"]
    names.append("distilbert.embeddings.position_embeddings.weight")
    names += [] if tied else ["vocab_projector.weight"]
    state = {name: read(name) for name in names}
    for end in ("weight", "bias"):
        for name in ("distilbert.embeddings.LayerNorm", *DISTILBERT_HEAD):
            state[f"{name}.{end}"] = read(f"{name}.{end}")
        for i, layer in enumerate(layers):
            for name in BERT_LAYER.values():
                tensor = read(f"distilbert.transformer.layer.{layer}.{name}.{end}")
                state[f"distilbert.transformer.layer.{i}.{name}.{end}"] = tensor
    return state


def load_checkpoint(model: DistilBertForMaskedLM, path: Path) -> None:
    """Start from a DistilBERT checkpoint of the same architecture.

    Raises:
        UserError: There is none, or a field of its configuration differs.
    """
    config = _teacher_config(path)
    require(
        config is not None,
        f"student: init must be 'teacher', 'random' or a folder with config.json and "
        f"model.safetensors, got {str(path)!r}",
    )
    fields = ("model_type", "vocab_size", "n_layers", "dim", "n_heads", "hidden_dim")
    for name in (*fields, "max_position_embeddings", "activation", "tie_word_embeddings"):
        ours, theirs = getattr(model.config, name), getattr(config, name, None)
        require(
            ours == theirs,
            f"student: init {str(path)!r} must have the student's {name} {ours!r}, got {theirs!r}",
        )
    names = [name for name, _ in model.named_parameters()]
    with open_checkpoint(path, "--set student.init=random") as read:
        _load(model, {name: read(name) for name in names}, path)


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


def _load(model: DistilBertForMaskedLM, state: dict[str, Tensor], source: Path) -> None:
    """Copy tensors into the parameters; every one must be there and fit."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = state.pop(name, None)
            require(
                tensor is not None and tensor.shape == parameter.shape,
                f"student: weights in {source} must hold {name} of shape "
                f"{tuple(parameter.shape)}, got {None if tensor is None else tuple(tensor.shape)}",
            )
            assert tensor is not None
            parameter.copy_(tensor)
