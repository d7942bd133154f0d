"""``distilcache export``: a student as one ONNX file, compared with the student itself."""

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distilcache.data.errors import require
from distilcache.pipeline.report.text import short_bytes

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest: float32 sums in another order."""
SHAPES = ((1, 3), (2, 7), (3, 16))
"""Batch sizes and lengths that are compared; the traced one is not among them."""
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def export_command(student: Path, file: Path) -> tuple[dict[str, Any], str]:
    """Write a masked LM as ``input_ids, attention_mask -> logits`` and compare the outputs.

    Both inputs are int64 [B, L], the output float32 [B, L, V]; B and L are free up to the
    student's positions. The file appears only once ONNX Runtime gives the student's own logits.

    Args:
        student: Folder of a trained student, or of any checkpoint of its kind.
        file: What is written, weights included; must not exist.

    Returns:
        Values for JSON, and the text for people.

    Raises:
        UserError: Bad input, or outputs that differ.
    """
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    require(
        not absent,
        f"export: packages onnx, onnxscript and onnxruntime must be installed, got no "
        f"{', '.join(absent)}; pip install -e '.[onnx]'",
    )
    require(
        not file.exists(),
        f"export: file must be a new one, got {file}; move it away or name another",
    )
    require(
        file.parent.is_dir(), f"export: folder of the file must exist, got {str(file.parent)!r}"
    )
    model = _load(student)
    part = file.with_name(f".{file.name}.part")
    try:
        _write(model, part)
        difference = _compare(model, part, file)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    values: dict[str, Any] = {
        "path": str(file),
        "student": str(student),
        "bytes": file.stat().st_size,
        "largest_difference": difference,
        "compared": [f"{b}x{n}" for b, n in SHAPES],
    }
    return values, (
        f"export: {file}: {short_bytes(values['bytes'])}, logits as the student's own to "
        f"{difference:.1g} (ONNX Runtime, {', '.join(values['compared'])} tokens)"
    )


def _load(student: Path) -> Any:
    """The masked LM in float32, for evaluation."""
    from distilcache.stages.evaluate.masked_lms import read_model
    from distilcache.stages.student_train.output import require_sound

    require_sound(student, "export")
    model = read_model(student, "export: student")
    require(
        model.config.model_type != "xlnet",
        f"export: student must take token ids and their mask alone, got an XLNet from {student}, "
        "which needs permutation masks; run it with transformers",
    )
    return model


def _write(model: Any, part: Path) -> None:
    """Trace the model with free batch and length, and save it as one file."""
    import torch
    from torch.export import Dim

    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            _wrapped(model),
            _batch(model, 2, 11),
            str(part),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(free, free),
        )


def _compare(model: Any, part: Path, file: Path) -> float:
    """Largest difference of a logit between both, relative to the largest logit.

    Raises:
        UserError: It is above ``TOLERANCE``.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(part), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, length in SHAPES:
        ids, mask = _batch(model, batch, length)
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            own = model(input_ids=ids, attention_mask=mask).logits
        kept = mask.bool()
        gap = (torch.from_numpy(found)[kept] - own[kept]).abs().max() / own[kept].abs().max()
        worst = max(worst, float(gap))
    require(
        worst <= TOLERANCE,
        f"export: outputs of {file.name} must be the student's own, got logits that differ by "
        f"{worst:.2g} of the largest; nothing was written",
    )
    return worst


def _batch(model: Any, batch: int, length: int) -> Any:
    """Token ids and mask; the last sequence ends early."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, length // 2 :] = 0
    return ids, mask


def _wrapped(model: Any) -> Any:
    """The model as a function of two tensors to one."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(
                input_ids=input_ids, attention_mask=attention_mask
            ).logits
            return logits

    return Logits().eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and notes; its errors still show."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
