"""Student architecture and first weights.

BERT teachers give DistilBERTs (Sanh et al. 2019, arXiv:1910.01108): BERT without token types and
pooler. Others give models of their own family, and so do BERTs where the recipe asks for it.
Students have fewer layers and start from layers of the teacher.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DistilBertConfig, PretrainedConfig, PreTrainedModel

from data.errors import require
from data.families import FAMILIES, Family
from data.schema import Encoding
from stages.student_train.config import StudentConfig, StudentSize
from stages.student_train.narrow import LAYOUTS, narrow
from stages.student_train.weights import (
    load_checkpoint,
    open_checkpoint,
    read_config,
    set_parameters,
    teacher_tensors,
)

DISTILBERT_TEACHERS = ("bert", "distilbert")
"""Types whose students are DistilBERTs."""
RANDOM = "--set student.init=random"


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
) -> PreTrainedModel:
    """Make a student and its first weights.

    Args:
        size: ``LAYERSxWIDTH`` or a preset's name.
        student: Recipe section.
        seed: Of everything that is drawn at random.
        encoding: Of the cache: vocabulary, longest sequence, padding.
        teacher_dir: The teacher's checkpoint in the cache; only a tokenizer in mask-only caches.

    Raises:
        UserError: The size does not fit the teacher, or the weights it starts from are not there
            or have another architecture.
    """
    teacher = read_config(teacher_dir)
    inherits = student.init == "teacher"
    require(
        not inherits or teacher is not None,
        f"student: init must be 'random' or a checkpoint where the cache holds no teacher, got "
        f"'teacher' and nothing in {teacher_dir}; use {RANDOM}",
    )
    require(
        student.family == "usual" or teacher is not None,
        f"student: family must be 'usual' where the cache holds no teacher, got {student.family!r} "
        f"and nothing in {teacher_dir}",
    )
    shape = _shape(size, student, teacher)
    own = student.family == "teacher" and teacher.model_type != "distilbert"
    if teacher is None or (teacher.model_type in DISTILBERT_TEACHERS and not own):
        config = _distilbert_config(shape, student, encoding, teacher)
    else:
        config = _family_config(shape, student, teacher)
    family = FAMILIES[config.model_type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, family.model)(config)
    if inherits:
        _start_from_teacher(model, shape, teacher_dir, teacher)
    elif student.init != "random":
        fields = ["model_type", "vocab_size", "tie_word_embeddings", family.num_layers]
        fields += [family.width, family.heads, family.ffn, family.inner_activation]
        fields += [family.positions] if family.positions else []
        load_checkpoint(model, Path(student.init), fields)
    return model


def _shape(size: str, student: StudentConfig, teacher: Any) -> StudentSize:
    """The size in full; a student that copies layers takes the teacher's heads and FFN."""
    shape = student.parse(size)
    family = FAMILIES.get(teacher.model_type) if teacher is not None else None
    if family is None:
        return shape
    width = int(getattr(teacher, family.width))
    heads, ffn = int(getattr(teacher, family.heads)), int(getattr(teacher, family.ffn))
    if shape.width == width and student.init == "teacher":
        return student.parse(size, heads=heads, ffn=ffn)
    if family.model_type not in DISTILBERT_TEACHERS:  # Each family has its own proportions.
        return student.parse(size, ffn=round(ffn * shape.width / width))
    return shape


def _distilbert_config(
    shape: StudentSize, student: StudentConfig, encoding: Encoding, teacher: Any
) -> PretrainedConfig:
    positions = encoding.max_length
    activation, tied, vocabulary = "gelu", True, encoding.vocab_size
    if teacher is not None:
        positions = teacher.max_position_embeddings
        activation = getattr(teacher, FAMILIES[teacher.model_type].inner_activation)
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


def _family_config(shape: StudentSize, student: StudentConfig, teacher: Any) -> PretrainedConfig:
    """The teacher's configuration with the student's size and dropout."""
    family = FAMILIES[teacher.model_type]
    values = teacher.to_dict()
    for name in ("architectures", "dtype", "d_head", "transformers_version", "_name_or_path"):
        values.pop(name, None)  # Those of the teacher's weights, and what follows from the rest.
    width = int(getattr(teacher, family.width))
    require(
        shape.width == width or family.model_type != "mobilebert",
        f"student: width must be the teacher's {width} for MobileBERT, whose layers have necks "
        f"of their own, got {shape.width}; for example SIZE={shape.layers}x{width}",
    )
    values |= {family.num_layers: shape.layers, family.width: shape.width}
    values |= {family.heads: shape.heads, family.ffn: shape.ffn}
    values |= dict.fromkeys(family.dropouts, student.dropout)
    if family.model_type == "modernbert":  # A copied layer keeps its reach.
        picked = pick_layers(len(teacher.layer_types), shape.layers)
        values["layer_types"] = [teacher.layer_types[i] for i in picked]
    if family.shared_layers:
        values["num_hidden_groups"] = min(teacher.num_hidden_groups, shape.layers)
    made: PretrainedConfig = type(teacher)(**values)
    return made


def _start_from_teacher(
    model: PreTrainedModel, shape: StudentSize, teacher_dir: Path, teacher: Any
) -> None:
    """Copy embeddings, every n-th layer and LM head; narrow them where they do not fit.

    Only the tensors that are needed are read. A line says what a student of another shape
    does not get.
    """
    ours, theirs = FAMILIES[model.config.model_type], FAMILIES[teacher.model_type]
    same = [
        (getattr(teacher, getattr(theirs, name)), getattr(model.config, getattr(ours, name)))
        for name in ("width", "heads", "ffn")
    ]
    fits = all(a == b for a, b in same)
    wider = same[0][1] > same[0][0]
    if not fits and (wider or ours.model_type not in LAYOUTS):
        print(
            f"student: {shape} has not the teacher's shape ({_described(teacher, theirs)}): its "
            "layers and embeddings start at random",
            file=sys.stderr,
        )
        return
    groups = (
        (teacher.num_hidden_groups, model.config.num_hidden_groups)
        if ours.shared_layers
        else (getattr(teacher, theirs.num_layers), shape.layers)
    )
    with open_checkpoint(teacher_dir, RANDOM) as read:
        state = teacher_tensors(model, read, teacher, pick_layers(*groups))
    if not fits:
        kept = narrow(model, state, int(same[1][0]))
        print(f"student: {shape} starts from {kept} of the teacher", file=sys.stderr)
    else:
        set_parameters(model, state, teacher_dir)


def _described(config: Any, family: Family) -> str:
    width, heads, ffn = (getattr(config, n) for n in (family.width, family.heads, family.ffn))
    return f"width {width}, {heads} heads, feed-forward {ffn}"
