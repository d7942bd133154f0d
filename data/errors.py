"""The one error type that stands for bad input, and its check helper."""


class UserError(Exception):
    """Bad input from outside: one clear line, exit code 2, no traceback.

    The message reads ``"<stage>: <field> must be ..., got <value>; <remedy>"``.
    """


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)
