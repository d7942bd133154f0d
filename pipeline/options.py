"""What all commands share: recipe options, and errors in one line."""

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from distilcache.data.errors import BAD_INPUT, Stopped, UserError, of_storage
from distilcache.stages.teacher_cache.config import EngineConfig

DEFAULT_RECIPE = "demo"
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
)
size_option = click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="LAYERSxWIDTH",
    help="Student, e.g. 6x768 or tiny; may be repeated.  [default: the recipe's student.sizes]",
)


def of_sizes(recipe: Any, sizes: tuple[str, ...]) -> Any:
    """The recipe with the students that ``--size`` names."""
    return replace(recipe, student=replace(recipe.student, sizes=sizes)) if sizes else recipe


class Commands(click.Group):
    """Turns bad input into one line and exit code 2, and signals into a hint on how to go on."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the program and exit; with code 130 or 143 after Ctrl-C or SIGTERM at any time."""
        run = functools.partial(super().main, *args, **extra)
        if not standalone_mode:
            return run(standalone_mode=False)
        received: list[int] = []
        try:
            with _sigterm_as_ctrl_c(received):
                code: Any = run(standalone_mode=False)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo("distilcache: interrupted; the same command goes on from here", err=True)
            sys.exit(128 + (received or [signal.SIGINT])[0])
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit code 2 after bad input."""
        try:
            return super().invoke(ctx)
        except Stopped as error:
            from distilcache.pipeline.ranks.launch import is_rank

            _complain(f"distilcache: {error}")
            sys.exit(BAD_INPUT if is_rank() else error.exit_code)
        except UserError as error:
            _complain(f"distilcache: {error}")
        except OSError as error:
            line = of_storage(error)
            if line is None:
                raise
            _complain(f"distilcache: {line}")
        sys.exit(BAD_INPUT)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the flow."""
        return list(self.commands)


@contextlib.contextmanager
def _sigterm_as_ctrl_c(received: list[int]) -> Iterator[None]:
    """End a command on SIGTERM as on Ctrl-C; not in ranks, which their launcher ends.

    ``received`` gets its number: a library may replace the exception by one of its own.
    """
    from distilcache.pipeline.ranks.launch import is_rank

    def terminate(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if is_rank() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--recipe``, ``--set`` and ``--json``; it gets the loaded recipe."""

    @click.option(
        "--recipe",
        "recipe_path",
        default=DEFAULT_RECIPE,
        show_default=True,
        metavar="FILE",
        help="TOML recipe of the project, or the name of one that comes with the package.",
    )
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.FIELD=VALUE",
        help="Override one field of the recipe, e.g. train.lr=3e-4, root=DIR, device=cuda; "
        "may be repeated.",
    )
    @json_option
    @functools.wraps(command)
    def wrapped(recipe_path: str, overrides: tuple[str, ...], **rest: Any) -> None:
        from distilcache.pipeline.recipe import load_recipe

        command(load_recipe(recipe_path, overrides), **rest)

    return wrapped


def with_engine(
    recipe: Any, engine: str | None, workers: int | None, ray_address: str | None
) -> Any:
    """The recipe with the engine that the flags name."""
    if engine is None and (workers or 0) > 1 and recipe.engine.name == "in-process":
        engine = "local"
    config = recipe.engine
    if engine not in (None, config.name):
        config = EngineConfig(name=engine)  # the recipe's settings are for another engine
    given = {"workers": workers, "ray_address": ray_address}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(recipe, engine=replace(config, **given))


def show(values: Any, text: str, as_json: bool) -> None:
    """Print a result on stdout, from one of the processes that have it."""
    from distilcache.pipeline.ranks.launch import may_report

    if may_report():
        click.echo(json.dumps(values, default=str) if as_json else text)


def say_next(command: str, *options: str, why: str = "", same_recipe: bool = True) -> None:
    """Name the command that comes next, as the present one was typed, on stderr.

    Args:
        command: Such as ``evaluate``.
        options: Its arguments and options, without the recipe.
        why: What it does, where its name does not say so.
        same_recipe: Whether it takes a recipe, the same one.
    """
    from distilcache.pipeline.ranks.launch import may_report

    if not may_report():
        return
    given = click.get_current_context().params if same_recipe else {}
    recipe, overrides = given.get("recipe_path"), list(given.get("overrides") or ())
    named = recipe not in (None, DEFAULT_RECIPE)
    # Under make, name the target of make.
    if "MAKELEVEL" in os.environ and not (options or any(" " in text for text in overrides)):
        words = [f"make {command}"]
        words += [f"RECIPE={shlex.quote(str(recipe))}"] if named else []
        words += [f"SET={shlex.quote(' '.join(overrides))}"] if overrides else []
    else:
        words = [shlex.join([_program(), command, *options])]
        words += [shlex.join(["--recipe", str(recipe)])] if named else []
        words += [shlex.join(["--set", text]) for text in overrides]
    click.echo(f"next: {' '.join(words)}{f'  # {why}' if why else ''}", err=True)


def say_evaluate(recipe: Any) -> None:
    """Name what comes after training: ``evaluate``, where there is text to measure on."""
    from distilcache.pipeline.measured import has_heldout

    if has_heldout(recipe):
        say_next("evaluate")
    else:
        say_view(recipe)


def say_view(recipe: Any) -> None:
    """Name the command that shows the project's cache and students."""
    from distilcache.pipeline.look.page.project import find_students

    options = []
    if recipe.cache_from:  # `view` looks for students next to the cache.
        for student in find_students(recipe.home / "cache"):
            options += ["--student", str(student)]
        options += ["--out", str(recipe.home / "view.html")]
    cache = str(recipe.finished_cache)
    say_next("view", cache, *options, why="see what they predict", same_recipe=False)


def _program() -> str:
    """How to call this command: by its path where it is not on the PATH."""
    called = Path(sys.argv[0])
    by_path = called.name == "distilcache" and shutil.which("distilcache") is None
    return str(called) if by_path else "distilcache"


def _complain(line: str) -> None:
    """Print what is wrong, once where several processes meet it."""
    from distilcache.pipeline.ranks.launch import may_complain

    if may_complain():
        click.echo(line, err=True)
