"""The commands ``inspect`` and ``view``."""

from pathlib import Path
from typing import Any

import click

from distilcache.pipeline.options import json_option, show


@click.command(short_help="Show what a cache holds.")
@click.argument("cache")
@click.option("--samples", default=3, show_default=True, metavar="N", help="Sequences as text.")
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    metavar="T",
    help="Temperature of the teacher's distribution; any if the cache holds last hidden states.",
)
@click.option("--seed", default=0, show_default=True, help="Chooses the blocks.")
@json_option
def inspect(cache: str, as_json: bool, **options: Any) -> None:
    """Show what CACHE (a folder or a URL) holds: provenance, bytes, histograms, samples as text.

    Histograms and samples come from a few blocks. Only the teacher's LM head is run.
    """
    from distilcache.pipeline.look.report import inspect_command

    show(*inspect_command(cache, **options), as_json)


@click.command(short_help="Write a page on a cache and its students for any browser.")
@click.argument("cache")
@click.option(
    "--student",
    "students",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Masked LM to show next to the teacher; may be repeated.  [default: the six largest in "
    "the folder students next to the cache]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The page.  [default: view.html next to the cache]",
)
@click.option("--sequences", default=48, show_default=True, metavar="N", help="How many to sample.")
@click.option("--seed", default=0, show_default=True, help="Chooses them.")
@click.option("--device", default="auto", show_default=True, help="Where the students run.")
@json_option
def view(cache: str, as_json: bool, **options: Any) -> None:
    """Write one HTML page on CACHE (a folder or a URL) and its students, for any browser.

    It shows sampled sequences, predictions of teacher and students at each masked position and any
    temperature, bytes by column, training curves, and models compared. It needs no server and no
    network.
    """
    from distilcache.pipeline.look.page.command import view_command

    show(*view_command(cache, **options), as_json)
