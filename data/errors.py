"""Errors of the user, the check that raises them, and exit codes."""

import sys

BAD_INPUT = 2
"""Exit code after bad input: trying again would not help."""
LOST_RANK = 1
"""Exit code of a command that lost one of its processes: trying again helps."""
LOST_PEER = 75
"""Exit code of one of several processes that could not go on without another (EX_TEMPFAIL)."""
_told: set[str] = set()


class UserError(Exception):
    """Bad input from outside: one clear line, exit code 2, no traceback.

    The message reads ``"<stage>: <field> must be ..., got <value>; <remedy>"``.
    """


class Stopped(UserError):
    """Work that a signal has ended in good order; the same command goes on.

    Args:
        message: One line.
        signal_number: Of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def tell(line: str) -> None:
    """Say on stderr what may be wrong with an input that is taken all the same, once a process."""
    if line not in _told:
        _told.add(line)
        print(line, file=sys.stderr)
