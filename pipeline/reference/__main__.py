"""``python -m distilcache.pipeline.reference`` (``make docs``) writes the pages."""

from distilcache.pipeline.reference.pages import pages
from distilcache.pipeline.reference.source import ROOT

for name, text in pages().items():
    (ROOT / "docs" / name).write_text(text, encoding="utf-8")
    print(f"docs/{name}")
