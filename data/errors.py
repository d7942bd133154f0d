"""Errors for users: the exceptions, a check that raises one, notes on stderr, exit codes."""

import sys

BAD_INPUT = 2
"""Exit code after bad input: trying again would not help."""
LOST_RANK = 1
"""Exit code of a command that lost one of its processes: trying again helps."""
LOST_PEER = 75
"""Exit code of one of several processes that could not go on without another (EX_TEMPFAIL)."""
_printed: set[str] = set()


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


def tell(line: str) -> None:
    """Print a note on stderr about input that may be wrong but is accepted; each line once."""
    if line not in _printed:
        _printed.add(line)
        print(line, file=sys.stderr)
