"""``distilcache finetune``: labelled texts to a fine-tuned model, and to its ONNX files."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilcache.data.storage.files import make_folder, sync_folder, sync_tree
from distilcache.data.storage.locks import locked, require_new
from distilcache.pipeline import export_onnx
from distilcache.pipeline.onnx_graph import Graph, open_graph
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.evaluate.tasks.catalogue import SCORE, TAGS, TASKS, OwnTask
from distilcache.stages.evaluate.tasks.config import TasksConfig

if TYPE_CHECKING:
    from distilcache.stages.evaluate.tasks.features import Encoded

LEAST_STEPS = 300
"""Steps where neither the recipe nor the size of the file asks for more: a few hundred lines need
many passes."""
ONNX = {"float32": "onnx/model.onnx", "int8": "onnx/model_int8.onnx"}
"""Where hubs and their libraries look for ONNX files."""
ASKED = 1000
"""Held-out examples at most for which answers are compared, one by one as they will come."""


def finetune_command(
    recipe: Recipe, student: Path, out: Path, own: OwnTask, kinds: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Fine-tune a student on a task of one's own, and export the result.

    Args:
        recipe: Settings of the section ``[tasks]``, device and type.
        student: Folder of a masked LM.
        out: A new folder; it appears when it is complete.
        own: The task.
        kinds: ONNX files that are made: some of ``ONNX``.

    Returns:
        Values for JSON, and the text for people.

    Raises:
        UserError: Bad input.
    """
    require_new(out, "finetune: OUT")
    from distilcache.stages.student_train.output import require_sound

    require_sound(student, "finetune")
    config = _settings(recipe.tasks, out, own)
    from distilcache.stages.evaluate.masked_lms import ModelEntry
    from distilcache.stages.evaluate.tasks.run import run_tasks

    if kinds:
        export_onnx.require_packages()
    entry = ModelEntry(name=student.resolve().name, role="student", path=student)
    (name,) = config.names
    work = out.with_name(f".{out.name}.finetune")
    runs = work / "tasks"
    make_folder(work)
    try:
        with locked(work, "finetune"):
            result = run_tasks([entry], config, runs, recipe.device, recipe.dtype)
            made = runs / name / f"{entry.name}-seed{config.keep[0]}"
            exported, lines = _export(made, out, config, kinds) if kinds else ({}, [])
            sync_tree(made)
            made.rename(out)
            sync_folder(out.parent)
    finally:
        # What was trained is kept until it is in its place: the same command goes on from there.
        if out.exists() or not any(runs.glob("*/*.json")):
            shutil.rmtree(work, ignore_errors=True)
    facts, scores = result["tasks"][name], result["models"][0]["tasks"][name]
    values = {
        "path": str(out),
        "student": str(student),
        "train": facts["train"],
        "heldout": facts["dev"],
        "metrics": scores["metrics"],
        "majority": facts["majority"],
        **exported,
    }
    return values, "\n".join([_line(out, values), *lines])


def _line(out: Path, values: Mapping[str, Any]) -> str:
    """How well the model does."""
    found = ", ".join(f"{metric} {value:.3f}" for metric, value in values["metrics"].items())
    line = f"finetune: {out}: {found} on {values['heldout']:,} held-out examples, "
    line += f"{values['train']:,} trained on"
    if values["majority"]:  # scores have no most frequent label
        line += f" (the most frequent label alone: {values['majority']:.3f})"
    return line


def _settings(tasks: TasksConfig, out: Path, own: OwnTask) -> TasksConfig:
    """The recipe's, for this task, one seed and labels alone."""
    name = re.sub(r"[/.,]+", "-", out.name) or "own"
    name = f"{name}-own" if name in TASKS else name
    plain = TasksConfig()
    names = (
        "distil",
        "distil_copies",
        "distil_epochs",
        "distil_min_steps",
        "distil_cos",
        "distil_dropout",
    )
    return replace(
        tasks,
        names=(name,),
        own={name: own},
        seeds=tasks.seeds[:1],
        keep=tasks.seeds[:1],
        min_steps=tasks.min_steps or LEAST_STEPS,
        **{field: getattr(plain, field) for field in names},
    )


def _export(
    made: Path, out: Path, config: TasksConfig, kinds: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Write ONNX files into a model's folder, and compare their answers to held-out examples."""
    from distilcache.stages.evaluate.tasks.examples import read_task
    from distilcache.stages.evaluate.tasks.features import encode
    from distilcache.stages.models.tokenizers import load_tokenizer

    task = read_task(config.tasks()[0], config.data)
    tokenizer = load_tokenizer(made)
    graph = open_graph(made)
    length = min(config.max_length, tokenizer.model_max_length, graph.positions)
    dev = encode(task.task, task.dev[""], tokenizer, length).first(ASKED)
    make_folder(made / "onnx")
    files = {kind: made / ONNX[kind] if kind in kinds else None for kind in ONNX}
    found = export_onnx.write_files(graph, files["float32"], files["int8"])
    shown = {kind: replace(of_one, path=str(out / ONNX[kind])) for kind, of_one in found.items()}
    model_ms = graph.latency(graph.own)
    lines = [export_onnx.export_text(shown, model_ms, graph)]
    values: dict[str, Any] = {"model_latency_ms": model_ms}
    for kind, of_one in shown.items():
        same, answers = _same_answers(graph, made / ONNX[kind], dev, task.task.kind)
        values[kind] = {**asdict(of_one), "same_answers": same}
        lines.append(f"finetune: {kind} {answers} of {len(dev):,} held-out examples")
    return values, lines


def _same_answers(graph: Graph, file: Path, dev: "Encoded", kind: str) -> tuple[float, str]:
    """The fraction of held-out examples with the model's own answer; for scores the correlation."""
    import numpy as np

    from distilcache.stages.evaluate.tasks.features import NO_TAG, Collate

    session = export_onnx.open_session(file)
    collate = Collate(dev, types="token_type_ids" in graph.inputs)
    pairs, labels = [], []
    for row in range(len(dev)):
        batch = collate([row])
        tensors = [batch[name] for name in graph.inputs]
        pairs.append((graph.ask(session, tensors)[0][0], graph.own(tensors)[0][0]))
        labels.append(batch["labels"][0])
    if kind == SCORE:
        both = np.array([[float(x) for x in pair] for pair in pairs])
        constant = not both.std(0).all()
        same = float(np.allclose(*both.T) if constant else np.corrcoef(both.T)[0, 1])
        return same, f"correlates at {same:.4f} with the model's own scores"
    if kind == TAGS:
        alike = [a.argmax(-1) == b.argmax(-1) for a, b in pairs]
        tagged = [row[of != NO_TAG] for row, of in zip(alike, labels, strict=True)]
        hits = [float(row.float().mean()) for row in tagged if len(row)]
    else:
        hits = [float(a.argmax() == b.argmax()) for a, b in pairs]
    same = sum(hits) / len(hits)
    return same, f"gives the model's own answers for {same:.1%}"
