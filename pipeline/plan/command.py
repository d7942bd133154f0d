"""``distilcache plan``: what a recipe will take."""

from typing import Any

import click

from distilcache.pipeline.options import of_sizes, recipe_options, show, size_option


@click.command(short_help="What a recipe will take, before anything runs.")
@recipe_options
@size_option
@click.option(
    "--tokens",
    type=float,
    metavar="N",
    help="Tokens of the training text, e.g. 4.4e9.  [default: counted in the corpus, else "
    "estimated from a sample of the sources]",
)
@click.option(
    "--measure",
    default=0,
    type=click.IntRange(min=0),
    metavar="BLOCKS",
    help="Run teacher and students on this many blocks, in a temporary folder, and scale up.",
)
@click.option("--like", metavar="CACHE", help="Take bytes from this cache of the same settings.")
@click.option("--teacher-tokens-per-s", type=float, metavar="N", help="Rate of stage one.")
@click.option(
    "--student-tokens-per-s",
    "student_rates",
    multiple=True,
    metavar="SIZE=N",
    help="Rate of a student's training; may be repeated.",
)
@click.option(
    "--tflops",
    type=float,
    metavar="N",
    help="10^12 FLOP/s that the device sustains: gives hours if no rate is known.",
)
@click.option("--price-per-hour", type=float, metavar="MONEY", help="Price of the device.")
@click.option(
    "--price-per-tb-month", type=float, metavar="MONEY", help="Price of 10^12 stored bytes."
)
def plan(recipe: Any, sizes: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Tell what a recipe will take before anything runs: tokens, bytes, hours, money.

    Bytes come from the format's arithmetic, as a range where that does not settle them; with
    --measure from a small real run, with --like from an existing cache. Hours need --measure,
    rates, or --tflops. Nothing is written. Where students read a finished cache (cache_from), its
    bytes and text are counted, and no stage one.
    """
    from distilcache.pipeline.plan.answer import plan_command

    show(*plan_command(of_sizes(recipe, sizes), **options), as_json)
