"""The commands that look into a cache: ``inspect`` and ``view``."""

import json
from pathlib import Path
from typing import Any

import click


@click.command(short_help="Show what a cache holds.")
@click.argument("cache")
@click.option("--samples", default=3, show_default=True, metavar="N", help="Sequences as text.")
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    metavar="T",
    help="Of the teacher's distribution; any where the cache holds its last hidden states.",
)
@click.option("--seed", default=0, show_default=True, help="Of the choice of blocks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def inspect(cache: str, as_json: bool, **options: Any) -> None:
    """Show what CACHE (a folder or a URL) holds: provenance, bytes, histograms, samples as text.

    Histograms and samples come from a few blocks; of no model more than the LM head is run.
    """
    from distilcache.pipeline.look.report import inspect_command

    _show(*inspect_command(cache, **options), as_json)


@click.command(short_help="Write a page on a cache and its students for any browser.")
@click.argument("cache")
@click.option(
    "--student",
    "students",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Masked LM to show beside the teacher; may be repeated.  [default: those in the folder "
    "students beside the cache]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The page.  [default: view.html beside the cache]",
)
@click.option("--sequences", default=48, show_default=True, metavar="N", help="How many to sample.")
@click.option("--seed", default=0, show_default=True, help="Of their choice.")
@click.option("--device", default="auto", show_default=True, help="Where the students run.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def view(cache: str, as_json: bool, **options: Any) -> None:
    """Write one HTML page on CACHE (a folder or a URL) and its students, for any browser.

    The page needs no server and no network: sampled sequences, what teacher and students say at
    each masked position at any temperature, where the bytes go, training curves, models compared.
    """
    from distilcache.pipeline.look.page.command import view_command

    _show(*view_command(cache, **options), as_json)


def _show(values: dict[str, Any], text: str, as_json: bool) -> None:
    click.echo(json.dumps(values, default=str) if as_json else text)
