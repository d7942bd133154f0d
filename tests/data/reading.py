"""Sources read to documents, or to the one line that says why they cannot be."""

import pytest

from distilcache.data.errors import UserError
from distilcache.stages.corpus.text.documents import iter_documents
from distilcache.stages.corpus.text.readers import Reading
from distilcache.stages.corpus.text.sources import resolve_sources


def read(*given, **reading) -> list[str]:
    found = iter_documents(resolve_sources([str(g) for g in given]), Reading(**reading))
    return [segment.text for segment in found]


def failure(*given, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(*given, **options)
    message = str(caught.value)
    assert message.startswith("corpus: source")
    assert "\n" not in message
    return message
