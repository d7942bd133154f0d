"""What stage one says on the console."""

import sys


def say(text: str) -> None:
    """Print a line for people."""
    print(f"teacher cache: {text}", file=sys.stderr, flush=True)
