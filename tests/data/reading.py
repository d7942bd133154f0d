"""Sources read to documents, or to the one line that says why they cannot be."""

from distilcache.stages.corpus.text.documents import iter_documents
from distilcache.stages.corpus.text.readers import Reading
from distilcache.stages.corpus.text.sources import resolve_sources
from tests.refusals import refused


def read(*given, **reading) -> list[str]:
    found = iter_documents(resolve_sources([str(g) for g in given]), Reading(**reading))
    return [segment.text for segment in found]


def failure(*given, **options) -> str:
    line = refused(read, *given, **options)
    assert line.startswith("corpus: source")
    return line
