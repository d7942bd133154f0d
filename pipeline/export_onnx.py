"""``distilcache export``: a model as ONNX, float32 and int8, compared with the model itself."""

import contextlib
import importlib.util
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, require, to_install
from distilcache.data.storage.files import temporary_of
from distilcache.data.storage.locks import require_new, sole_writer
from distilcache.pipeline.onnx_graph import Graph, open_graph
from distilcache.pipeline.report.text import short_bytes

TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest: float32 sums in another order."""
INT8_TOLERANCE = 0.5
"""The same for int8, root mean squares, relative to the spread of the outputs. Models came to 0.1
to 0.2; outputs that have nothing in common come to 1.4."""
SHAPES = ((1, 3), (2, 7), (3, 16))
"""Batch sizes and lengths that are compared; the traced one is not among them."""
INT8_SHAPES = ((16, 16), (16, 40))
"""The same for int8, cut to the model's positions."""
NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """One ONNX file."""

    path: str
    bytes: int
    latency_ms: float
    """Median of one sequence in ONNX Runtime."""
    difference: float
    """From the model: the largest (float32), or the root mean square (int8)."""
    agreement: float | None
    """Fraction of int8's choices that are the model's; None: there are none, or float32."""


def export_command(
    student: Path, file: Path | None, int8: Path | None, features: bool
) -> tuple[dict[str, Any], str]:
    """Write a masked LM or a task model as ONNX and compare the outputs.

    Inputs are ``input_ids`` and ``attention_mask``, int64 [B, L], and ``token_type_ids`` for models
    that tell first and second texts apart, of masked LMs those whose tokenizer does so as well;
    B and L are free up to the model's positions.
    The output is ``logits`` ([B, L, V] of a masked LM, [B, C] of a classifier, [B, L, C] of
    tagging), ``start_logits`` and ``end_logits``, or ``last_hidden_state`` [B, L, D]. Files appear
    only once ONNX Runtime gives the model's own outputs, with int8 approximately.

    Args:
        student: Folder of a trained student, of a fine-tuned model, or of any checkpoint of
            their kinds.
        file: A new file, weights included; those above 1.5 GiB lie in ``<file>.data``. None: none.
        int8: The same with weights and products in int8; None: none.
        features: Leave the head out.

    Returns:
        Values for JSON, and the text for people.

    Raises:
        UserError: Bad input, or outputs that differ.
    """
    files = [path for path in (file, int8) if path is not None]
    require(
        bool(files), "export: --onnx, --int8 or --sentence-transformers must be given, got none"
    )
    require_packages()
    for path in files:
        for made_new in (path, path.with_name(f"{path.name}.data")):
            require_new(made_new, "export: file")
        require(
            path.parent.is_dir(), f"export: folder of the file must exist, got {str(path.parent)!r}"
        )
    require(len({*files}) == len(files), f"export: --onnx and --int8 must differ, got {file} twice")
    graph = open_graph(student, features)
    made = write_files(graph, file, int8)
    values: dict[str, Any] = {
        "student": str(student),
        "outputs": list(graph.outputs),
        "compared": [f"{b}x{n}" for b, n in SHAPES],
        "model_latency_ms": graph.latency(graph.own),
        **{name: asdict(of_one) for name, of_one in made.items()},
    }
    if "float32" in made:
        plain = made["float32"]
        values |= {"path": plain.path, "bytes": plain.bytes, "largest_difference": plain.difference}
    return values, export_text(made, values["model_latency_ms"], graph)


def export_text(made: dict[str, Exported], model_ms: float, graph: Graph) -> str:
    """A line per file, and one on the model."""
    lines = []
    for kind, of_one in made.items():
        how = f"as the model's own to {of_one.difference:.1g}"
        if kind == "int8":
            how = f"{of_one.difference:.1%} off the model's own (root mean square)"
        if of_one.agreement is not None:
            how += f", the same choice at {of_one.agreement:.1%}"
        lines.append(
            f"export: {of_one.path}: {kind}, {short_bytes(of_one.bytes)}, "
            f"{of_one.latency_ms:.2f} ms; {' and '.join(graph.outputs)} {how}"
        )
    size, tokens = short_bytes(4 * graph.model.num_parameters()), graph.timed_tokens
    return "\n".join(
        [*lines, f"export: the model itself: {size}, {model_ms:.2f} ms; {tokens} random tokens"]
    )


def require_packages() -> None:
    """Refuse to begin without the packages of the extra ``onnx``."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    require(
        not absent,
        f"export: packages onnx, onnxscript and onnxruntime must be installed, got no "
        f"{', '.join(absent)}; {to_install('onnx')}",
    )


def write_files(graph: Graph, file: Path | None, int8: Path | None) -> dict[str, Exported]:
    """Write and compare the files that are named; they appear together.

    Returns:
        By ``float32`` and ``int8``, those that were asked for.

    Raises:
        UserError: Outputs differ from the model's.
    """
    asked = {"float32": file, "int8": int8}
    targets = {kind: target for kind, target in asked.items() if target is not None}
    with contextlib.ExitStack() as stack:
        for target in targets.values():
            stack.enter_context(sole_writer(target, "export"))
        parts = {kind: stack.enter_context(_part_of(target)) for kind, target in targets.items()}
        plain = parts.get("float32") or stack.enter_context(_part_of(targets["int8"]))
        _write(graph, plain)
        if "int8" in parts:
            _quantize(plain, parts["int8"])
        made = {
            kind: _compare(graph, parts[kind], target, kind == "int8")
            for kind, target in targets.items()
        }
        for kind, target in targets.items():
            found = parts[kind].parent.iterdir()
            for part in sorted(found, key=lambda part: part.name == target.name):  # weights first
                os.replace(part, target.with_name(part.name))
    return made


@contextlib.contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """A file of that name in a temporary folder beside it: a graph names the file of its weights.

    Above 1.5 GiB torch writes weights into a file of their own.
    """
    folder = temporary_of(target)
    try:
        folder.mkdir()
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(graph: Graph, part: Path) -> None:
    """Trace the model with free batch and length, and save it.

    Without what the exporter notes at each node: among it are paths of this machine.
    """
    import torch
    from onnx_ir.traversal import RecursiveGraphIterator
    from torch.export import Dim

    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _wrapped(graph),
                graph.batch(2, 11),
                dynamo=True,
                verbose=False,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=((free,) * len(graph.inputs),),
            )
            assert program is not None
            for node in RecursiveGraphIterator(program.model.graph):
                node.metadata_props.clear()
            program.save(str(part), external_data=False)
    except torch.onnx.OnnxExporterError:
        raise UserError(
            f"export: student must be a model that torch can export, got a "
            f"{type(graph.model).__name__}, in which it found what it cannot; run it with "
            "transformers"
        ) from None


def _quantize(plain: Path, part: Path) -> None:
    """Weights in int8, a scale per row; activations when they come.

    Weights have 7 of the 8 bits: processors without VNNI would let sums overflow with 8.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            plain, part, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
        )


def open_session(path: Path) -> Any:
    """ONNX Runtime with as many threads as torch has."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _compare(graph: Graph, part: Path, target: Path, int8: bool) -> Exported:
    """How far the outputs are from the model's; too far is refused."""
    import torch

    session = open_session(part)
    gaps: list[Any] = []
    same: list[Any] = []
    for size, length in INT8_SHAPES if int8 else SHAPES:
        tensors = graph.batch(size, length)
        kept = tensors[1].bool()
        for found, own in zip(graph.ask(session, tensors), graph.own(tensors), strict=True):
            a, b = (found[kept], own[kept]) if graph.by_token else (found, own)
            if len(graph.outputs) > 1:  # a span: what stands at padding has no meaning
                a, b = a.masked_fill(~kept, 0), b.masked_fill(~kept, 0)
            if int8:
                gap, most = (a - b).square().mean().sqrt(), b.std()
                if graph.classes is not None:
                    same.append((a.argmax(graph.classes) == b.argmax(graph.classes)).flatten())
            else:
                gap, most = (a - b).abs().max(), b.abs().max()
            gaps.append(gap / most if gap else gap)
    worst = float(torch.stack(gaps).max())  # NaN if one is
    limit = INT8_TOLERANCE if int8 else TOLERANCE
    require(
        worst <= limit,
        f"export: outputs of {target.name} must be the student's own, got {graph.outputs[0]} that "
        f"differ by {worst:.2g} of the largest; nothing was written",
    )
    return Exported(
        path=str(target),
        bytes=sum(file.stat().st_size for file in part.parent.iterdir()),
        latency_ms=graph.latency(lambda inputs: graph.ask(session, inputs)),
        difference=worst,
        agreement=float(torch.cat(same).float().mean()) if same else None,
    )


def _wrapped(graph: Graph) -> Any:
    """The model as a function of its tensors in order."""
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = graph.model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = self.model(**dict(zip(graph.inputs, tensors, strict=True)))
            return tuple(out[name] for name in graph.outputs)

    return Wrapped().eval()


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
