"""The commands for single models: ``convert``, ``finetune``, ``export`` and ``push``."""

from pathlib import Path
from typing import Any

import click

from distilcache.data.errors import require
from distilcache.pipeline.options import json_option, recipe_options, show
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, OWN_KINDS, OwnTask


@click.command(short_help="Write pickled weights of a model as safetensors.")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--revision", default="", help="Branch, tag or commit on the hub.  [default: main]")
@json_option
def convert(model: str, out: Path, revision: str, as_json: bool) -> None:
    """Write MODEL, a folder or hub id with pytorch_model.bin, to the new folder OUT.

    The tensors are written to model.safetensors unchanged; configuration and tokenizer files are
    copied. No code in the old file is run.
    """
    from distilcache.pipeline.convert import convert_command

    show(*convert_command(model, out, revision), as_json)


@click.command(short_help="Labelled texts to a fine-tuned model.")
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("file")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--text",
    multiple=True,
    default=("text",),
    show_default=True,
    metavar="COLUMN",
    help="Column with text; twice for pairs of texts.",
)
@click.option(
    "--label", default="label", show_default=True, metavar="COLUMN", help="Column with labels."
)
@click.option(
    "--kind",
    type=click.Choice(tuple(OWN_KINDS)),
    default=CLASSES,
    show_default=True,
    help="What a label is: a class, a number, or a tag for each word.",
)
@click.option(
    "--validation",
    default="",
    metavar="FILE",
    help="Held-out examples.  [default: a fifth of FILE, the same ones every time]",
)
@click.option("--onnx", is_flag=True, help="Write OUT/onnx/model.onnx as well (extra onnx).")
@click.option("--int8", is_flag=True, help="Write OUT/onnx/model_int8.onnx as well (extra onnx).")
@recipe_options
def finetune(
    recipe: Any,
    student: Path,
    file: str,
    out: Path,
    text: tuple[str, ...],
    label: str,
    kind: str,
    validation: str,
    onnx: bool,
    int8: bool,
    as_json: bool,
) -> None:
    """Fine-tune STUDENT on the labelled texts of FILE; the model goes to the new folder OUT.

    STUDENT is the folder of a student or of any masked LM. FILE is .csv, .tsv, .jsonl, .json or
    .parquet, a folder with a data set, or hf:NAME:SPLIT. Settings are those of the recipe's
    section tasks, such as --set tasks.epochs=10; there are 300 steps at least, or tasks.min_steps.
    """
    from distilcache.pipeline.finetune import finetune_command

    own = OwnTask(train=file, validation=validation, text=text, label=label, kind=kind)
    kinds = [name for name, asked in (("float32", onnx), ("int8", int8)) if asked]
    show(*finetune_command(recipe, student, out, own, kinds), as_json)


@click.command(short_help="Write a model as ONNX, or for sentence-transformers.")
@click.argument("student", type=click.Path(path_type=Path))
@click.option(
    "--onnx",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A new file; needs the extra onnx.",
)
@click.option(
    "--int8",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The same with weights and products in int8: about a quarter of the size.",
)
@click.option("--features", is_flag=True, help="ONNX of the last hidden states, without the head.")
@click.option(
    "--sentence-transformers",
    "sentences",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="A new folder: the encoder alone, with mean pooling.",
)
@json_option
def export(
    student: Path,
    onnx: Path | None,
    int8: Path | None,
    features: bool,
    sentences: Path | None,
    as_json: bool,
) -> None:
    """Write STUDENT for other programs.

    STUDENT is the folder of a student or of any masked LM; for ONNX also of a model fine-tuned on a
    task (finetune; evaluate with tasks.keep). ONNX files take any batch size and length; their
    outputs are compared with the model's, and sizes and latencies are printed.
    """
    if sentences is None:
        from distilcache.pipeline.export_onnx import export_command

        return show(*export_command(student, onnx, int8, features), as_json)
    require(
        onnx is None and int8 is None and not features,
        "export: --sentence-transformers must be given alone, got both it and an option of ONNX "
        "files; run the command twice",
    )
    from distilcache.pipeline.export_sentences import sentences_command

    show(*sentences_command(student, sentences), as_json)


@click.command(short_help="Send a student to the Hugging Face hub.")
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Only its owner sees the repository.")
@click.option(
    "--revision", default="", metavar="BRANCH", help="Made where there is none.  [default: main]"
)
@json_option
def push(student: Path, repo: str, private: bool, revision: str, as_json: bool) -> None:
    """Send STUDENT, a folder, to the repository REPO (OWNER/NAME) of the Hugging Face hub.

    Weights, configuration, tokenizer and model card go in one commit. The card shows a line of
    held-out text; look at README.md first where the text is private. The token is that of
    hf auth login, or HF_TOKEN.
    """
    from distilcache.pipeline.push import push_command

    show(*push_command(student, repo, private, revision), as_json)
