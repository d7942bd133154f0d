"""The ``distilcache`` command: options in, a call of the flow, results out."""

from pathlib import Path
from typing import Any

import click

from distilcache.data.errors import UserError, require
from distilcache.pipeline.look.commands import inspect, view
from distilcache.pipeline.model_commands import convert, export, finetune, push
from distilcache.pipeline.options import (
    Commands,
    json_option,
    of_sizes,
    recipe_options,
    say_evaluate,
    say_next,
    say_view,
    show,
    size_option,
    with_engine,
)
from distilcache.pipeline.plan.command import plan
from distilcache.pipeline.ranks.ray_options import ranks_options, ray_address_option
from distilcache.pipeline.sweep.run import student_sweep
from distilcache.stages.teacher_cache.config import ENGINES


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="distilcache")
def main() -> None:
    """Run a masked-LM teacher once, keep its signals, train many small students from them.

    The stages, in order: corpus, teacher-cache, student-train, evaluate. `distill` runs them all.
    Every command goes on where an interrupted one stopped.
    """


main.add_command(plan)


@main.command(short_help="Everything: corpus, teacher cache, students, evaluation.")
@recipe_options
@size_option
def distill(recipe: Any, sizes: tuple[str, ...], as_json: bool) -> None:
    """Run everything: corpus, teacher cache, students, controls, evaluation.

    The demo recipe needs no network and no files: 5 to 7 minutes on 2 CPU cores.
    """
    from distilcache.pipeline import flow

    recipe = of_sizes(recipe, sizes)
    _show_report(recipe, flow.distill(recipe), as_json)
    say_view(recipe)


@main.command(short_help="Text to blocks of token sequences.")
@recipe_options
def corpus(recipe: Any, as_json: bool) -> None:
    """Turn text into blocks of token sequences (ROOT/NAME/corpus).

    Reads .txt, JSON, CSV, TSV and FASTA (plain, .gz, .zst, .xz), parquet and Arrow as files,
    folders (saved datasets, too), globs or URLs, Hugging Face datasets (hf:NAME:SPLIT), or the
    docstrings of the installed packages.
    """
    from distilcache.pipeline import flow

    made = flow.make_corpus(recipe)
    splits = made.manifest.splits
    lines = [
        f"corpus: {name}: {split['documents']:,} documents, {split['sequences']:,} sequences, "
        f"{split['tokens']:,} tokens"
        for name, split in splits.items()
    ]
    show({"path": str(made.path), **made.manifest.to_dict()}, "\n".join(lines), as_json)
    say_next("student-train" if recipe.cache_from else "teacher-cache")


@main.command("teacher-cache", short_help="Stage one: run the teacher once, store its signals.")
@recipe_options
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="Where the work runs: in this process; in several of this machine; in tasks on a Ray "
    "cluster; here as one task of a Slurm array.  [default: the recipe's engine.name, in-process; "
    "local where --workers is above 1]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    metavar="N",
    help="Processes (local) or tasks at once (ray); 0: as many as there are devices.  "
    "[default: the recipe's engine.workers, 0]",
)
@ray_address_option
def teacher_cache(recipe: Any, as_json: bool, **engine: Any) -> None:
    """Stage one: run the teacher once over the masked corpus and store its signals.

    Makes the corpus first if it is missing, and the teacher if the recipe trains its own. Every
    engine writes the same bytes and can finish what another one has begun.
    """
    from distilcache.pipeline import flow
    from distilcache.pipeline.report.text import short_bytes

    cache = flow.make_teacher_cache(with_engine(recipe, **engine))
    totals = cache.manifest.totals
    text = (
        f"teacher cache: {cache.path}: {totals['shards']} shards, {totals['tokens']:,} tokens, "
        f"{short_bytes(totals['bytes'])}, {totals['bytes'] / totals['tokens']:.1f} bytes per token"
    )
    clipped = cache.manifest.clipped_fraction
    if clipped:
        text += f", {1e6 * clipped:.2g} of a million codes clipped"
    show({"path": str(cache.path), **cache.manifest.to_dict()}, text, as_json)
    say_next("student-train")


@main.command("student-train", short_help="Stage two: train students from the cache.")
@recipe_options
@size_option
@ranks_options
def student_train(recipe: Any, sizes: tuple[str, ...], as_json: bool, **ranks: Any) -> None:
    """Stage two: train students (and controls) from the cache, no teacher loaded.

    On several machines run the same line on each, with a folder (root) that all of them see:

    \b
      torchrun --nnodes M --nproc-per-node N --max-restarts 3 --rdzv-backend c10d
        --rdzv-endpoint HOST:PORT -m distilcache.pipeline.cli student-train --recipe FILE

    train.batch_size counts the sequences of all processes; batches are the same on any number of
    processes that divides train.streams.
    """  # noqa: D301 (click's mark of lines that stay as they are)
    for size in sizes:
        recipe.student.parse(size)
    from distilcache.pipeline.measured import tell_other_inputs
    from distilcache.pipeline.ranks.launch import is_rank, train_on_ranks

    if not (is_rank() or recipe.cache_from):  # Training from another's cache needs no corpus.
        tell_other_inputs(recipe, "train")
    results = train_on_ranks(recipe, sizes, **ranks)
    lines = [f"student: {recipe.home / 'students' / r['name']}" for r in results]
    show(results, "\n".join(lines), as_json)
    say_evaluate(recipe)


main.add_command(student_sweep)


@main.command(short_help="Quality, size and speed of all models; --tasks fine-tunes.")
@recipe_options
@click.option(
    "--tasks",
    metavar="NAMES",
    help="Fine-tune all of them on these tasks instead and compare scores, e.g. sst2,rte,stsb; "
    "recipe: those of tasks.names. Data comes from tasks.data or from the hub (extra hub); own "
    "tasks (tasks.own) name theirs. Several such commands at once share the work.",
)
def evaluate(recipe: Any, as_json: bool, tasks: str | None) -> None:
    """Measure quality, size and speed of teacher, students and controls on held-out text."""
    if tasks is not None:
        from distilcache.pipeline.evaluate_tasks import tasks_command

        return show(*tasks_command(recipe, tasks), as_json)
    from distilcache.pipeline import flow

    _show_report(recipe, flow.evaluate(recipe), as_json)
    say_view(recipe)


@main.command(short_help="Re-read every checksum and block of a cache.")
@click.argument("cache")
@click.option("--workers", default=0, help="Threads.  [default: one per core]")
@click.option("--fast", is_flag=True, help="Check sizes, markers and index only; read no shard.")
@click.option(
    "--repair", is_flag=True, help="Remove what is damaged; teacher-cache then makes it again."
)
@click.option(
    "--rerun",
    "--replay",  # the name until 0.1.0
    "blocks",
    type=int,
    metavar="N",
    help="Run the teacher again on N blocks.",
)
@click.option("--seed", default=0, show_default=True, help="Chooses these blocks.")
@click.option("--device", default="auto", show_default=True, help="Where the teacher runs.")
@click.option("--max-kl", type=float, help="Mean, in nats.  [default: by the cache's encoding]")
@click.option("--min-cosine", type=float, help="Of hidden states.  [default: by the encoding]")
@click.option("--min-top1", type=float, help="Fraction that agrees.  [default: by the encoding]")
@click.option("--max-logit-error", type=float, help="On the mean.  [default: by the encoding]")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Notes of a run that may go on.  [default: CACHE/.verify/state]",
)
@json_option
def verify(cache: str, as_json: bool, **options: Any) -> None:
    """Re-read every checksum, index row and block of CACHE; exit code 2 where anything is damaged.

    CACHE is a folder or a URL.

    An interrupted run goes on where it was. With --rerun, the cache's own teacher runs again
    on random blocks, and the stored signals must agree with it as closely as the encoding allows.
    """
    from distilcache.pipeline.verify import verify_command

    values, text, failure = verify_command(cache, **options)
    show(values, text, as_json)
    if failure:
        raise UserError(failure)


@main.command(short_help="Copy a finished cache to object storage.")
@click.argument("cache")
@click.argument("url")
@json_option
def publish(cache: str, url: str, as_json: bool) -> None:
    """Copy the finished CACHE to URL (s3://, gs://, hf://, ...); it opens there once all is copied.

    A repeated call copies what is missing. Students read it with --set cache_from=URL.
    """
    from distilcache.data.cache.cache import Cache
    from distilcache.data.cache.publish import publish_cache, total_bytes
    from distilcache.data.progress import Bar
    from distilcache.data.storage.remote import Remote, is_url, located

    folder = located(cache)
    if isinstance(folder, str):
        raise UserError(
            f"publish: CACHE must be a folder of this machine, got {cache}; copy it here first"
        )
    require(
        is_url(url),
        f"publish: URL must name a place that fsspec can open (s3://bucket/folder), got {url!r}; "
        "copy a cache to a local folder with cp -r",
    )
    Cache.open(folder)  # An error comes before the progress bar.
    place = Remote(url)
    with Bar(total=total_bytes(folder), unit="B", unit_scale=True, desc="publish") as bar:
        publish_cache(folder, place, bar.update)
        size = bar.n
    text = (
        f"publish: {cache} is complete at {url} ({size:,} bytes); train from it with "
        f"--set cache_from={url}"
    )
    show({"path": str(cache), "url": url, "bytes": size}, text, as_json)


main.add_command(convert)
main.add_command(finetune)
main.add_command(export)
main.add_command(push)
main.add_command(inspect)
main.add_command(view)


def _show_report(recipe: Any, result: dict[str, Any], as_json: bool) -> None:
    from distilcache.pipeline.report.table import format_table

    text = f"{format_table(result)}\n\nreport: {recipe.home / 'report' / 'report.md'}"
    show(result, text, as_json)


if __name__ == "__main__":
    main()
