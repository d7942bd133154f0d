"""What all commands share: recipe options, and errors in one line."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from data.errors import UserError

DEFAULT_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.toml"


class Commands(click.Group):
    """Turns bad input into one line and exit code 2, and Ctrl-C into a word on how to go on."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit code 2 after bad input."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            _complain(f"distilcache: {error}")
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            _complain(
                f"distilcache: storage:{where} must be usable, got: {error.strerror or error}; "
                "repeat the command once that is mended: finished parts are kept"
            )
        except KeyboardInterrupt:
            click.echo("\ndistilcache: interrupted; the same command goes on from here", err=True)
            sys.exit(130)
        sys.exit(2)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the flow."""
        return list(self.commands)


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--recipe``, ``--set`` and ``--json``; it gets the loaded recipe."""

    @click.option(
        "--recipe",
        "recipe_path",
        default=str(DEFAULT_RECIPE),
        show_default="recipes/demo.toml",
        metavar="FILE",
        help="TOML recipe of the project.",
    )
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.FIELD=VALUE",
        help="Override one field of the recipe, e.g. train.lr=3e-4, root=DIR, device=cuda; "
        "may be repeated.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
    @functools.wraps(command)
    def wrapped(recipe_path: str, overrides: tuple[str, ...], **rest: Any) -> None:
        from pipeline.recipe import load_recipe

        command(load_recipe(recipe_path, overrides), **rest)

    return wrapped


def _complain(line: str) -> None:
    """Say what is wrong, once where several processes meet it."""
    from pipeline.launch import may_complain

    if may_complain():
        click.echo(line, err=True)
