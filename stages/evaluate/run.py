"""Evaluation stage: teacher, students and controls side by side on held-out text."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from data.corpus import Corpus
from data.device import keep_freed_memory, resolve_device, resolve_dtype
from data.encoder import model_class
from data.errors import UserError, require
from data.families import FAMILIES
from data.families import max_length as longest
from data.masking import MaskingConfig
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.latency import measure_speed, throughput_batch_size
from stages.evaluate.mlm import measure_quality, quality_batch_size, read_heldout

ROLES = ("teacher", "student", "control")


@dataclass(frozen=True)
class ModelEntry:
    """One model to evaluate."""

    name: str
    """How tables and plots call it."""
    role: str
    """``teacher``, ``student`` or ``control``."""
    path: Path
    """Folder in Hugging Face layout, weights in safetensors."""

    def __post_init__(self) -> None:
        """Check the role."""
        require(
            self.role in ROLES,
            f"evaluate: role of {self.name} must be one of {', '.join(ROLES)}, got {self.role!r}",
        )


def evaluate_models(
    entries: Sequence[ModelEntry],
    corpus_dir: Path,
    masking: MaskingConfig,
    config: EvaluateConfig,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Measure quality, agreement with the teacher, size and speed of every model.

    Args:
        entries: Models; at most one of them is the teacher.
        corpus_dir: Corpus with a held-out split.
        masking: Masking policy; its seed is replaced by ``config.seed``.
        config: How much is measured.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``bfloat16`` or ``float32``.

    Returns:
        ``heldout`` (what was measured on), ``machine`` (where) and ``models`` (one flat dictionary
        per entry, in order). Agreement is None where no entry is a teacher.

    Raises:
        UserError: No held-out text, or a model that cannot be measured on this corpus.
    """
    require(bool(entries), "evaluate: models must name at least one model, got none")
    teachers = [index for index, entry in enumerate(entries) if entry.role == "teacher"]
    require(len(teachers) <= 1, f"evaluate: teacher must be one model, got {len(teachers)}")
    teacher = teachers[0] if teachers else None
    where = resolve_device(device)
    keep_freed_memory(where)
    kind = resolve_dtype(dtype, where)
    corpus = Corpus.open(corpus_dir)
    manifest = corpus.manifest
    heldout = read_heldout(corpus, masking, sequences=config.sequences, seed=config.seed)
    models = [_load(entry, manifest.vocab_size, manifest.max_length).to(where) for entry in entries]

    quality = measure_quality(
        models,
        teacher,
        heldout,
        batch_size=quality_batch_size(heldout, manifest.vocab_size, config.batch_size),
        pad_id=max(0, manifest.special_ids["pad"]),  # -1: none; any id does below a mask
        device=where,
        dtype=kind,
    )
    batch = throughput_batch_size(config.batch_size, manifest.max_length, manifest.vocab_size)
    # Casting the weights once is what a deployed model does; autocast would cast them every pass.
    speed = measure_speed(
        [model.to(kind) for model in models],
        max_length=manifest.max_length,
        vocab_size=manifest.vocab_size,
        batch_size=batch,
        repeats=config.latency_repeats,
        device=where,
    )
    return {
        "heldout": {
            "sequences": len(heldout.lengths),
            "tokens": int(heldout.lengths.sum()),
            "masked_positions": len(heldout.labels),
            "masking": {**asdict(masking), "seed": config.seed},
            "corpus_fingerprint": manifest.fingerprint,
        },
        "machine": _machine(where, kind, manifest.max_length, batch),
        "models": [
            {
                "name": entry.name,
                "role": entry.role,
                "params": sum(p.numel() for p in model.parameters()),
                "size_mb": sum(f.stat().st_size for f in _weight_files(entry.path)) / 1e6,
                **asdict(scored),
                **asdict(timed),
            }
            for entry, model, scored, timed in zip(entries, models, quality, speed, strict=True)
        ],
    }


def _machine(
    device: torch.device, dtype: torch.dtype, max_length: int, batch: int
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    plain = dtype == torch.float32
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": name,
        "quality_in": "float32" if plain else f"{name} autocast, losses in float32",
        "speed_in": f"{name} weights, whole masked LM",
        "max_length": max_length,
        "throughput_batch": batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _weight_files(path: Path) -> list[Path]:
    """The weights of a checkpoint: one file, or several with an index."""
    return sorted(path.glob("model*.safetensors"))


def _load(entry: ModelEntry, vocab_size: int, max_length: int) -> nn.Module:
    """Load a masked LM in float32 and refuse what would be measured wrongly."""
    where = f"evaluate: model {entry.name!r}"
    if not (entry.path / "config.json").is_file():
        raise UserError(
            f"{where} must be a folder with a config.json, got {str(entry.path)!r}; train it with "
            "distilcache student-train or correct the path"
        )
    if not _weight_files(entry.path):
        raise UserError(
            f"{where} must have its weights in model.safetensors, got none in {entry.path}; save "
            "it again with save_pretrained"
        )
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(entry.path, local_files_only=True)
            model, info = model_class(config).from_pretrained(
                entry.path,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{where} must be a masked LM that transformers can read, got {entry.path}: {reason}"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{where} must have all weights of {type(model).__name__}, got none for "
            f"{', '.join(missing)} in {entry.path}; pass a checkpoint with its masked-LM head"
        )
    size = model.config.vocab_size
    require(
        size == vocab_size,
        f"{where}: vocabulary must be the corpus's {vocab_size} tokens, got {size}; build the "
        "corpus with this model's tokenizer",
    )
    positions = _positions(model.config)
    require(
        positions is None or positions >= max_length,
        f"{where}: positions must reach the corpus's max_length {max_length}, got {positions}; "
        "build a corpus of shorter sequences",
    )
    evaluated: nn.Module = model.eval()
    return evaluated


def _positions(config: Any) -> int | None:
    """Longest sequence that a model takes, None where nothing limits it."""
    if config.model_type in FAMILIES:
        return longest(config)
    positions = int(getattr(config, "max_position_embeddings", 0))
    return positions if positions >= 1 else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence load tables and bars of transformers; what matters in them is checked."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
