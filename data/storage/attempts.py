"""Requests to a server: failed ones are repeated after growing pauses."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from distilcache.data.errors import UserError, one_line

ATTEMPTS = 6
"""Attempts per request; the pauses between them add up to about 6 seconds."""
PAUSE = 0.2
"""Seconds before the second attempt; doubled for each further one, and shortened at random."""
NO_RETRY = (FileNotFoundError, PermissionError, FileExistsError, NotImplementedError, ImportError)
"""Errors that another attempt does not solve."""

T = TypeVar("T")


def tried(request: Callable[[], T], url: str, wanted: str) -> T:
    """The result of a request, which is repeated as long as another attempt may succeed.

    Args:
        request: Raises :class:`EOFError` where an object is too short.
        url: Of the object, for errors.
        wanted: What it must be: ``readable``, ``writable`` ...

    Raises:
        FileNotFoundError: There is no such object.
        UserError: It is not as wanted.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except FileNotFoundError:
            if wanted == "writable":
                raise unusable(url, wanted, "no such bucket or folder") from None
            raise
        except UserError:
            raise
        # Each backend raises errors of its own.
        except Exception as error:
            final = isinstance(error, NO_RETRY) or "credentials" in str(error).lower()
            if isinstance(error, EOFError) and attempt == ATTEMPTS:
                raise UserError(
                    f"storage: {url} must be whole, got {error}: it is cut off; run distilcache "
                    "verify --repair on the URL, then publish again"
                ) from None
            if final or attempt == ATTEMPTS:
                raise unusable(url, wanted, one_line(error)) from None
            time.sleep(PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
    raise AssertionError("the last attempt returns or raises")


def unusable(url: str, wanted: str, found: str) -> UserError:
    """What is said of an object that is not as wanted."""
    return UserError(
        f"storage: {url} must be {wanted}, got: {found}; check the URL, the "
        "network and the credentials, then repeat the command: finished parts are kept"
    )
