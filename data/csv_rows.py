"""Rows of a CSV file, whose fields commas, semicolons or tabs part."""

import csv
import itertools
import re
from collections.abc import Iterable
from typing import Any


def csv_reader(lines: Iterable[str], longest: int) -> Any:
    """A ``csv.reader`` that raises ``csv.Error`` where quotes are broken.

    Spreadsheets write semicolons in countries whose numbers have a comma, and tabs for Unicode. Of
    the three, the one that stands most often in the first line that is not empty, outside quotes,
    parts the fields.

    Args:
        lines: Of the file, with their ends.
        longest: Characters of a field at most.
    """
    csv.field_size_limit(longest)
    lines = iter(lines)
    begun = []
    for line in lines:
        begun.append(line)
        if line.strip():
            break
    header = re.sub('"[^"]*("|$)', "", begun[-1]) if begun else ""
    delimiter = max(",;\t", key=header.count)
    return csv.reader(itertools.chain(begun, lines), delimiter=delimiter, strict=True)
