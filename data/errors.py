"""Errors for users: the exceptions, a check that raises one, notes on stderr, exit codes."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

BAD_INPUT = 2
"""Exit code after bad input: trying again would not help."""
LOST_RANK = 1
"""Exit code of a command that lost one of its processes: trying again helps."""
LOST_PEER = 75
"""Exit code of one of several processes that could not go on without another (EX_TEMPFAIL)."""
_printed: set[str] = set()
_FIELD = re.compile(
    r"(?<![\w./-])(?:--set )?(?:(?:train|student)\.|(?<=--set ))([a-z_]+)\b(?:=([^\s;,)]+))?"
)
"""A field of the recipe that Python takes as an argument, perhaps with a value."""


class UserError(Exception):
    """Bad input: one clear line, exit code 2, no traceback.

    The message reads ``"<stage>: <field> must be ..., got <value>; <remedy>"``.
    """


class Stopped(UserError):
    """A run that stopped in good order because of a signal; the same command continues it.

    Args:
        message: One line.
        signal_number: The exit code is 128 more.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def as_arguments(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let errors name arguments of Python in place of a recipe's fields and ``--set``.

    Args:
        names: Arguments that are called otherwise than the fields.
    """
    called = names or {}

    def argument(match: re.Match[str]) -> str:
        name, value = called.get(match[1], match[1]), match[2]
        if value is None:
            return name
        plain = re.fullmatch(r"[-+.\de]*\d|\[.*|[A-Z]+", value)
        return f"{name}={value}" if plain else f'{name}="{value}"'

    try:
        yield
    except UserError as error:
        line = _FIELD.sub(argument, re.sub(r"^recipe: ", "train: ", str(error)))
        start, must, rest = line.partition(" must ")
        stage, _, field = start.rpartition(" ")
        error.args = (f"{stage} {called.get(field, field)}{must}{rest}",)
        raise


def tell(line: str) -> None:
    """Print a note on stderr about input that may be wrong but is accepted; each line once."""
    if line not in _printed:
        _printed.add(line)
        print(line, file=sys.stderr)
