"""What mkdocs.yml calls while it builds the site."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside ``docs/`` become their names: the site does not hold these files."""
    return re.sub(r"(?<!!)\[`?([^\]`]+)`?\]\(\.\./[^)]+\)", r"`\1`", markdown)
