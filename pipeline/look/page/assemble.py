"""Page, style, script and data joined into one file that needs nothing else.

The sources lie next to this module.
"""

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import Any

POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""Only this page's own style and script, by their hashes; no request of any kind."""
SCRIPTS = ("charts.js", "reader.js", "distribution.js", "sections.js", "page.js")
"""In this order: each uses names of those before it."""


def assemble(data: dict[str, Any]) -> str:
    """The whole page, of what ``gather`` returned, training curves and models."""
    page, style = _source("page.html"), _source("page.css")
    script = "".join(map(_source, SCRIPTS))
    policy = POLICY.format(script=_hash(script), style=_hash(style))
    parts = {
        "@policy@": policy,
        "@title@": html.escape(str(data["title"]), quote=False),
        "@style@": style,
        "@data@": embed(data),
        "@script@": script,
    }
    done = []
    for mark, text in parts.items():  # each once, in this order: no text is searched for marks
        before, page = page.split(mark, 1)
        done += [before, text]
    return "".join([*done, page])


def embed(data: Any) -> str:
    """JSON for a ``script`` element; no text in it can end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _source(name: str) -> str:
    return (files("distilcache.pipeline.look.page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
