"""Errors for users: the exceptions, a check that raises one, notes on stderr, exit codes."""

import difflib
import errno
import importlib.metadata
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

BAD_INPUT = 2
"""Exit code after bad input: trying again would not help."""
LOST_RANK = 1
"""Exit code of a command that lost one of its processes: trying again helps."""
LOST_PEER = 75
"""Exit code of one of several processes that could not go on without another (EX_TEMPFAIL)."""
OF_STORAGE = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE", "EACCES", "EPERM"),
        *("EEXIST", "EISDIR", "ENOTDIR", "ENAMETOOLONG", "ELOOP", "ENFILE", "EMFILE"),
        *("ENOTCONN", "ESHUTDOWN", "ETIMEDOUT", "EHOSTDOWN", "ENODEV", "ENXIO", "EBUSY", "EXDEV"),
        *("EUCLEAN", "EBADMSG", "EREMOTEIO"),
    )
    if hasattr(errno, name)  # not every system has all
)
"""Numbers of errors that come from a disk or share, from rights, or from what lies where a folder
is asked for. The others, a file that is not found among them, are mistakes of the program: where
users may cause them, they are looked for and become a :class:`UserError` there."""
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ESHUTDOWN", "EHOSTDOWN", "EBUSY"),
        "EREMOTEIO",
    )
    if hasattr(errno, name)
)
"""Those of them that may be over when it is tried again, unlike a full disk and rights."""
_printed: set[str] = set()
_FIELD = re.compile(
    r"(?<![\w./-])(?:--set )?(?:(?:train|student)\.|(?<=--set ))([a-z_]+)\b(?:=([^\s;,)]+))?"
)
"""A field of the recipe that Python takes as an argument, perhaps with a value."""


class UserError(Exception):
    """Bad input: one clear line, exit code 2, no traceback.

    The message reads ``"<stage>: <field> must be ..., got <value>; <remedy>"``.
    """


class Unreadable(UserError):
    """A file that the system does not give out; what is in it may be sound."""


class PassingFault(UserError):
    """A fault of a disk or share that may be over when it is tried again."""


class InUse(UserError):
    """Another run is at the same work; it may be waited for."""


class Stopped(UserError):
    """A run that stopped in good order because of a signal; the same command continues it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def require_least(stage: str, config: object, least: int, *names: str) -> None:
    """Require that these fields of a section are ``least`` or more."""
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{stage}: {name} must be at least {least}, got {value}")


def require_choice(stage: str, config: object, **choices: Collection[str]) -> None:
    """Require that these fields of a section have one of the values given for each."""
    for name, known in choices.items():
        value = getattr(config, name)
        require(value in known, f"{stage}: {name} must be one of {', '.join(known)}, got {value!r}")


def nearest_name(name: str, known: Collection[str]) -> str:
    """The known name that an unknown one may stand for, as a question; without one, all names."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def to_install(extra: str) -> str:
    """The command that adds the packages of an extra to this environment, from any folder."""
    stated = [line.partition(";") for line in importlib.metadata.requires("distilcache") or []]
    packages = [name.strip() for name, _, marker in stated if f'"{extra}"' in marker]
    return " ".join(["pip install", *(f"'{package}'" for package in packages)])


def reason_of(error: BaseException) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())[:200]


def one_line(error: BaseException) -> str:
    """Type and text of an exception."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300].removesuffix(": ")


def of_storage(error: OSError) -> str | None:
    """The line on a fault of storage; None: it is none, and its traceback is wanted."""
    if error.errno not in OF_STORAGE:
        return None
    where = f" {error.filename}" if error.filename else ""
    return (
        f"storage:{where} must be usable, got: {error.strerror}; repeat the command once that is "
        "mended: finished parts are kept"
    )


def may_pass(error: Exception) -> bool:
    """Whether to try again may help: bad input, a full disk and rights stay as they are."""
    if isinstance(error, OSError):
        return of_storage(error) is None or error.errno in PASSING
    return isinstance(error, PassingFault) or not isinstance(error, UserError)


@contextmanager
def as_arguments(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let errors name arguments of Python in place of a recipe's fields and ``--set``.

    ``names`` are the arguments that are called otherwise than the fields.
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


def tell(line: str, about: str = "") -> None:
    """Print a note on stderr about input that may be wrong but is accepted; each once.

    ``about`` is what makes two notes one; "": the line.
    """
    if (about or line) not in _printed:
        _printed.add(about or line)
        print(line, file=sys.stderr)
