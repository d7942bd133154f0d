"""What bad input is refused with."""

from collections.abc import Callable

import pytest

from distilcache.data.errors import UserError


def refused(call: Callable[..., object], *words, **named) -> str:
    """What a call is refused with: one line that says what must be."""
    with pytest.raises(UserError) as caught:
        call(*words, **named)
    line = str(caught.value)
    assert "\n" not in line
    assert "must" in line
    assert len(line) < 1200
    return line
