"""Data sets on the Hugging Face hub, which the library ``datasets`` reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distilcache.data.errors import UserError, reason_of, to_install


def datasets_library(what: str, instead: str) -> Any:
    """The library, to read ``what``.

    Raises:
        UserError: It is not installed; ``instead`` is the other remedy.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{what} must be read with the datasets library, got none installed; "
            f"{to_install('hub')}, or {instead}"
        ) from None
    return datasets


@contextmanager
def hub_faults(what: str, place: str, instead: str) -> Iterator[None]:
    """Let whatever the library raises for a data set become one line."""
    try:
        yield
    except Exception as error:
        # datasets raises its own types, its builders' and the HTTP client's.
        raise UserError(
            f"{what} must be a data set that the hub serves, got {place}: {reason_of(error)}; "
            f"{instead}"
        ) from None


def load_split(datasets: Any, place: str, **options: Any) -> Any:
    """The rows of ``[OWNER/]NAME[/CONFIG]:SPLIT``; ``A/B`` is a configuration if no owner's."""
    name, _, split = place.rpartition(":")
    parts = name.split("/")
    if len(parts) == 3:
        return datasets.load_dataset("/".join(parts[:2]), parts[2], split=split, **options)
    try:
        return datasets.load_dataset(name, split=split, **options)
    except FileNotFoundError:  # DatasetNotFoundError is one
        if len(parts) != 2:
            raise
        return datasets.load_dataset(*parts, split=split, **options)
