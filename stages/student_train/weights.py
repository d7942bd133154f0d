"""The weights that a student starts from, by its own names."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from distilcache.data.errors import UserError, require
from distilcache.stages.models import checkpoints
from distilcache.stages.models.anatomy import layer_lists
from distilcache.stages.models.encoder import model_class, unused_parameters
from distilcache.stages.models.families import SILENT_FIELDS, family_of
from distilcache.stages.models.trimmed_ids import TrimmedIds, read_tokenizer
from distilcache.stages.models.trimmed_tokenizer import ids_of
from distilcache.stages.student_train.layers import pick_layers
from distilcache.stages.student_train.output import require_sound

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
"""Parts of the names of a DistilBERT's tensors, and their names in a BERT."""
POSITIONS = "distilbert.embeddings.position_embeddings.weight"
TYPES = "bert.embeddings.token_type_embeddings.weight"
NORM = "attn_norm.weight"
"""Of ModernBERT's layers, all but the first."""
RANDOM = "--set student.init=random"
OF_TRAINING = re.compile(
    r"(?<!token_)dropout|layerdrop|_index$|^(init|embed_init|sinusoidal|summary|pooler)"
    r"|^(start_n_top|end_n_top|classifier_pooling|use_cache|chunk_size_feed_forward)$"
    r"|^(lang_id|n_langs|use_lang_emb)$"
)
"""Fields that do not change what weights say: of training, of other heads, and of languages, which
are in the weights once these are open."""
UNDECLARED = frozenset(
    ("position_buckets", "share_att_key", "norm_rel_ebd", "talking_head", "attention_head_size")
    + ("conv_kernel_size", "conv_act", "conv_groups")
)
"""Fields that DeBERTas read, and their configurations do not declare."""


def config_in(folder: Path, where: str = "student: teacher") -> Any:
    """The configuration of a checkpoint, None where the folder holds none.

    ``where`` is the stage and what is read, for errors.
    """
    there = (folder / "config.json").is_file()
    return checkpoints.configuration(folder, where) if there else None


def teacher_tensors(
    student: PreTrainedModel, teacher: PreTrainedModel, named: Sequence[int]
) -> dict[str, Tensor]:
    """The teacher's tensor for each tensor of the student, whatever its shape; tied ones as well.

    The student may have fewer layers: see :func:`pick_layers`. A DistilBERT's position embeddings
    get the BERT's embedding of token type 0 added, as a BERT adds it at every position of a single
    text: so the outputs of the embeddings are equal.

    Args:
        student: DistilBERT for a BERT, else a model of the teacher's own family.
        teacher: The teacher.
        named: Its layers that the student starts from; empty: see :func:`pick_layers`.
    """
    from_bert = student.config.model_type == "distilbert" and teacher.config.model_type == "bert"
    own = student.state_dict()
    names = {name: _bert_name(name) if from_bert else name for name in own}
    lists = layer_lists(student).items()
    ours = {_bert_name(name) if from_bert else name: length for name, length in lists}
    lengths, theirs = layer_lists(teacher), teacher.state_dict()
    # ModernBERT's first layer has no norm before its attention: elsewhere it gets a new one.
    sources = {name: _at_layer(source, ours, lengths, named) for name, source in names.items()}
    found = {
        name: own[name] if source.endswith(NORM) and source not in theirs else theirs[source]
        for name, source in sources.items()
    }
    if from_bert:
        found[POSITIONS] = found[POSITIONS] + theirs[TYPES][0]
    return found


def cut_rows(
    student: PreTrainedModel, state: Mapping[str, Tensor], rows: int, kept_n: NDArray[np.int64]
) -> dict[str, Tensor]:
    """The teacher's tensors with the ids alone that the student has: embeddings, decoder, biases.

    Args:
        student: Has n ids.
        state: From :func:`teacher_tensors`.
        rows: The teacher's ids.
        kept_n: Those that the student has.
    """
    wanted, own = torch.from_numpy(kept_n), student.state_dict()
    cut = dict(state)
    for name, tensor in state.items():
        for axis, size in enumerate(tensor.shape):
            if size == rows and own[name].shape[axis] == len(wanted):
                cut[name] = cut[name].index_select(axis, wanted)
    return cut


def _bert_name(name: str) -> str:
    for ours, theirs in DISTILBERT_FROM_BERT.items():
        name = name.replace(ours, theirs)
    return name


def _at_layer(
    name: str, ours: Mapping[str, int], theirs: Mapping[str, int], named: Sequence[int]
) -> str:
    """The name with the numbers of the student's layers replaced by the teacher's.

    Args:
        name: Of a tensor of the student.
        ours: Lists of layers of the student and their lengths.
        theirs: The same of the teacher.
        named: See :func:`pick_layers`.
    """
    own, source = "", ""
    for part in name.split("."):
        if own in ours:
            layer = pick_layers(theirs[source], ours[own], named)[int(part)]
            source = f"{source}.{layer}"
        else:
            source = f"{source}.{part}".lstrip(".")
        own = f"{own}.{part}".lstrip(".")
    return source


def open_model(folder: Path, otherwise: str) -> PreTrainedModel:
    """A checkpoint's model, on the CPU.

    Args:
        folder: The checkpoint.
        otherwise: Option that does without it, for the error.

    Raises:
        UserError: It is damaged, or lacks weights.
    """
    where = "student: weights to start from"
    try:
        config = checkpoints.open_config(folder, where=where)
        opened: PreTrainedModel
        opened, _ = checkpoints.open_model(
            model_class(config), config, folder, where=where, dtype=torch.float32
        )
    except UserError as error:
        raise UserError(f"{error}; or use {otherwise}") from None
    return opened


def check_start(config: PretrainedConfig, path: Path, *, with_ids: bool) -> None:
    """Check that a folder holds a checkpoint of the student's architecture.

    Args:
        config: The student's.
        path: Folder with ``config.json`` and ``model.safetensors``.
        with_ids: Whether the number of the student's ids is known.

    Raises:
        UserError: There is none, it is damaged, or a field of its configuration differs.
    """
    require_sound(path, "student")
    require(
        (path / "config.json").is_file(),
        f"student: init must be 'teacher', 'random' or a folder with config.json and "
        f"model.safetensors, got {str(path)!r}",
    )
    ours = config.to_dict()
    theirs = checkpoints.open_config(path, where="student: init").to_dict()
    declared = type(config)().to_dict().keys() | UNDECLARED
    names = [n for n in {**ours, **theirs} if n in declared and _counts(n, config, with_ids)]
    for name in ("model_type", *names):
        own, found = ours.get(name), theirs.get(name)
        require(
            own == found,
            f"student: init {str(path)!r} must have the student's {name} {own!r}, got {found!r}",
        )


def _counts(name: str, config: PretrainedConfig, with_ids: bool) -> bool:
    """Whether a field changes what the same weights say."""
    if name == "vocab_size":
        return with_ids
    if name.endswith("_token_id"):
        from_pad = family_of(config).positions_from_pad or config.model_type == "mbart"
        used = {
            "decoder_start_token_id": True,
            "pad_token_id": from_pad,
            "mask_token_id": getattr(config, "token_dropout", False),  # ESM's: it counts them
        }
        return with_ids and used.get(name, False)
    return name not in SILENT_FIELDS and OF_TRAINING.search(name) is None


def check_ids(start: Path, teacher_dir: Path, trimmed: TrimmedIds | None) -> None:
    """A checkpoint that a student starts from must mean the same tokens by its ids."""
    if not (start / "tokenizer.json").is_file():
        return
    ids = ids_of(read_tokenizer(teacher_dir) if trimmed is None else trimmed.own)
    require(
        ids.items() <= ids_of(read_tokenizer(start)).items(),
        f"student: init {str(start)!r} must have the student's token ids, got others of the same "
        f"number; start from a student of this cache, or use {RANDOM}",
    )


def load_checkpoint(model: PreTrainedModel, path: Path) -> None:
    """Start from a checkpoint that :func:`check_start` has found to be of the same architecture."""
    set_tensors(model, open_model(path, RANDOM).state_dict(), path)


def set_tensors(model: PreTrainedModel, state: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors into a model; all that its logits depend on must be there and fit.

    Raises:
        UserError: One is missing or has another shape.
    """
    unused = unused_parameters(model)
    for name, own in model.state_dict().items():
        tensor = state.get(name)
        if tensor is not None and tensor.shape == own.shape:
            own.copy_(tensor)  # a view of the parameter, without a gradient
        elif name not in unused:  # ESM's contact head depends on the number of layers
            raise UserError(
                f"student: weights in {source} must hold {name} of shape {tuple(own.shape)}, got "
                f"{None if tensor is None else tuple(tensor.shape)}"
            )
