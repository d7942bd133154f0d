"""The one error type that stands for bad input, its check helper, and ends by a signal."""


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
