"""Rows of a CSV file, whose fields commas, semicolons or tabs part."""

import csv
import itertools
from collections.abc import Iterable
from typing import Any


def csv_reader(lines: Iterable[str], longest: int) -> Any:
    """A ``csv.reader`` that raises ``csv.Error`` where quotes are broken.

    Spreadsheets write semicolons in countries whose numbers have a comma, and tabs for Unicode. Of
    the three, the one that stands most often in the first line parts the fields.

    Args:
        lines: Of the file, with their ends.
        longest: Characters of a field at most.
    """
    csv.field_size_limit(longest)
    lines = iter(lines)
    first = next(lines, "")
    delimiter = max(",;\t", key=first.count)
    return csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
