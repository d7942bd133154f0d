"""Student architecture and first weights.

The student of a BERT is a DistilBERT (Sanh et al. 2019, arXiv:1910.01108): a BERT without token
types and pooler. The student of any other teacher has the teacher's family, and so has a BERT's
where the recipe asks for it. Students start from some of the teacher's layers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DistilBertConfig, PretrainedConfig, PreTrainedModel

from distilcache.data.cache.schema import Encoding
from distilcache.data.errors import UserError, reason_of, require
from distilcache.stages.models.anatomy import find_head
from distilcache.stages.models.encoder import from_config
from distilcache.stages.models.families import (
    Shape,
    activation_field,
    family_of,
    shape_of,
    student_values,
)
from distilcache.stages.models.trimmed_ids import TrimmedIds, renumber
from distilcache.stages.student_train.advice import start_of
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.student_train.layers import (
    named_layers,
    pick_layers,
    tell_order,
)
from distilcache.stages.student_train.narrow import narrow
from distilcache.stages.student_train.ranks import say
from distilcache.stages.student_train.weights import (
    RANDOM,
    check_ids,
    check_start,
    config_in,
    cut_rows,
    load_checkpoint,
    open_model,
    set_tensors,
    teacher_tensors,
)

DISTILBERT_TEACHERS = ("bert", "distilbert")
"""Types whose students are DistilBERTs."""
DISTILBERT_EPS = 1e-12
"""Epsilon of a DistilBERT's layer norms; its configuration has no field for it."""


def build_student(
    *,
    size: str,
    student: StudentConfig,
    seed: int,
    encoding: Encoding,
    teacher_dir: Path,
    trimmed: TrimmedIds | None = None,
    old: bool = False,
) -> PreTrainedModel:
    """Make a student and its first weights.

    Args:
        size: ``LAYERSxWIDTH`` or a preset's name.
        student: Recipe section.
        seed: Of everything that is drawn at random.
        encoding: Of the cache: vocabulary, longest sequence, padding.
        teacher_dir: The teacher's checkpoint in the cache; only a tokenizer in mask-only caches.
        trimmed: The student's ids, where it has fewer than its teacher.
        old: It was begun before 0.3.0, when a ModernBERT's layers were spaced otherwise.

    Raises:
        UserError: The size does not fit the teacher, or the weights it starts from are not there
            or have another architecture.
    """
    teacher = config_in(teacher_dir)
    config = student_config(size, student, encoding, teacher, trimmed, old=old)
    if config.model_type == "bert" and student.family == "usual":
        say(
            f"student: a BERT, as its teacher's layer_norm_eps is {teacher.layer_norm_eps:g} and a "
            f"DistilBERT's is always {DISTILBERT_EPS:g}",
        )
    shape = _shape(size, student, teacher)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not those of GPUs
        model: PreTrainedModel = _made(config, shape, teacher)
    tell_order(config)
    if student.init == "teacher":
        named = named_layers(student, teacher, shape.layers, old)
        _start_from_teacher(model, shape, shape_of(teacher), teacher_dir, trimmed, named)
    elif student.init != "random":
        check_ids(Path(student.init), teacher_dir, trimmed)
        load_checkpoint(model, Path(student.init))
    return model


def student_config(
    size: str,
    student: StudentConfig,
    encoding: Encoding,
    teacher: Any,
    trimmed: TrimmedIds | None = None,
    *,
    old: bool = False,
) -> PretrainedConfig:
    """The student's configuration, from that of its teacher; no weights are read.

    Arguments and errors are those of :func:`build_student`; ``teacher`` is the teacher's
    configuration, None for a mask-only cache.
    """
    for name, plain in (("init", "random"), ("family", "usual")):
        require(
            getattr(student, name) != "teacher" or teacher is not None,
            f"student: {name} must be {plain!r} where the cache holds no teacher, got 'teacher'; "
            f"use --set student.{name}={plain}",
        )
    shape = _shape(size, student, teacher)
    if teacher is None or _becomes_distilbert(teacher, student):
        config = _distilbert_config(shape, student, encoding, teacher)
    else:
        config = _family_config(shape, student, teacher, old)
    if student.init_layers:
        _check_layers(student.init_layers, size, config, teacher)
    if trimmed is not None:
        renumber(config, trimmed)
    if student.init not in ("teacher", "random"):
        known = student.vocabulary == 1 or trimmed is not None
        check_start(config, Path(student.init), with_ids=known)
    return config


def check_model(config: PretrainedConfig, size: str, student: StudentConfig, teacher: Any) -> None:
    """Check that a model of a student's configuration can be made; its weights are not.

    Raises:
        UserError: It cannot.
    """
    try:
        with torch.device("meta"):
            from_config(config)
    except (ValueError, TypeError, AssertionError) as error:
        raise _unfit(_shape(size, student, teacher), teacher, error) from None
    except Exception:  # of code that needs numbers
        return


def _check_layers(named: Sequence[int], size: str, config: Any, teacher: Any) -> None:
    ours, theirs = shape_of(config), shape_of(teacher)
    require(
        len(named) == ours.layers and all(-theirs.layers <= n < theirs.layers for n in named),
        f"student: init_layers must name {ours.layers} layers of the teacher for size {size}, each "
        f"from 0 to {theirs.layers - 1} (or -1 for the last), got {list(named)}",
    )
    require(
        start_of("teacher", ours, theirs, config.model_type) != "random",
        f"student: init_layers must be left out where a student of size {size} cannot start from "
        f"its teacher's layers (width {theirs.width}), got {list(named)}; take the teacher's width",
    )

    one_each = getattr(teacher, "num_hidden_groups", theirs.layers) == theirs.layers
    require(
        one_each and getattr(teacher, "block_sizes", None) is None,
        "student: init_layers must be left out where layers of the teacher share their weights, or "
        f"are of several kinds, got {list(named)} for one of type {teacher.model_type!r}",
    )
    require(
        config.model_type != "modernbert" or named[0] % theirs.layers == 0,
        "student: init_layers must begin with 0 for a teacher of type 'modernbert', got "
        f"{list(named)}; its first layer alone has no norm before its attention",
    )


def _shape(size: str, student: StudentConfig, teacher: Any) -> Shape:
    """The size in full; heads and FFN of what the student starts from, if it is as wide."""
    shape, start = student.parse(size), teacher
    if student.init != "teacher":
        start = None if student.init == "random" else config_in(Path(student.init), "student: init")
    if start is not None:
        family_of(start, f"student: init {student.init!r}")
        first = shape_of(start)
        if first.width == shape.width:
            return student.parse(size, heads=first.heads, ffn=first.ffn)
    if teacher is not None and teacher.model_type not in DISTILBERT_TEACHERS:
        theirs = shape_of(teacher)  # Each family has its own proportions.
        return student.parse(size, ffn=round(theirs.ffn * shape.width / theirs.width))
    return shape


def _becomes_distilbert(teacher: Any, student: StudentConfig) -> bool:
    """Whether the student is a DistilBERT: a BERT's only if it can compute the same."""
    if teacher.model_type == "distilbert":
        return True
    if teacher.model_type != "bert" or student.family == "teacher":
        return False
    return bool(teacher.layer_norm_eps == DISTILBERT_EPS)


def _distilbert_config(
    shape: Shape, student: StudentConfig, encoding: Encoding, teacher: Any
) -> PretrainedConfig:
    positions, vocabulary = encoding.max_length, encoding.vocab_size
    activation, tied = "gelu", True
    if teacher is not None:
        positions = teacher.max_position_embeddings
        activation = getattr(teacher, activation_field(teacher))
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


def _family_config(
    shape: Shape, student: StudentConfig, teacher: Any, old: bool
) -> PretrainedConfig:
    """The teacher's configuration with the student's size and dropout."""
    named = named_layers(student, teacher, shape.layers, old)
    picked = pick_layers(int(teacher.num_hidden_layers), shape.layers, named)
    values = student_values(teacher, shape, student.dropout, picked)
    try:
        made: PretrainedConfig = type(teacher)(**values)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _unfit(shape, teacher, error) from None
    return made


def _made(config: PretrainedConfig, shape: Shape, teacher: Any) -> PreTrainedModel:
    try:
        model: PreTrainedModel = from_config(config)
        if shape_of(config).width != shape_of(teacher or config).width:
            find_head(model)  # fails where some fields of the configuration kept the old width
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise _unfit(shape, teacher, error) from None
    return model


def _unfit(shape: Shape, teacher: Any, error: Exception) -> UserError:
    width = shape_of(teacher).width if teacher is not None else shape.width
    return UserError(
        f"student: size must be one that a model of type {getattr(teacher, 'model_type', '')!r} "
        f"can have, got {shape} ({reason_of(error)}); for example "
        f"SIZE={shape.layers}x{width}"
    )


def _start_from_teacher(
    model: PreTrainedModel,
    shape: Shape,
    theirs: Shape,
    teacher_dir: Path,
    trimmed: TrimmedIds | None,
    named: Sequence[int],
) -> None:
    """Copy embeddings, some layers and the LM head; narrow them where they do not fit.

    A line says what a student of another shape does not get.
    """
    ours = shape_of(model.config)
    start = start_of("teacher", ours, theirs, model.config.model_type)
    if start == "random":
        say(
            f"student: {shape} does not have the teacher's shape (width {theirs.width}, "
            f"{theirs.heads} heads, feed-forward {theirs.ffn}): its layers and embeddings start at "
            "random",
        )
        return
    teacher = open_model(teacher_dir, RANDOM)
    state = teacher_tensors(model, teacher, named)
    if trimmed is not None:
        state = cut_rows(model, state, teacher.config.vocab_size, trimmed.old_n)
    if start == "layers":
        set_tensors(model, state, teacher_dir)
        return
    kept = narrow(model, state, theirs.heads)
    say(f"student: {shape} starts from {kept} of the teacher")
