import os
import sys

import pytest

from distilcache.data.errors import UserError
from distilcache.stages.corpus.text import docstrings
from distilcache.stages.workers.processes import worker_pool

MODULE = '''
"""The first paragraph of this module is English prose, and it is long enough to be kept.

    >>> print("this example is not prose, and it is left out of the corpus by the filter")

x = 1; y = 2; z = 3; f(x, y, z); g[x][y][z] = {1: 2, 3: 4, 5: 6, 7: 8, 9: 10, 11: 12}
"""
raise SystemExit("a module that is imported ends the process")

class A:
    def method(self):
        """Return the number of the things that are in a box, and do not count it twice.

        The first paragraph of this module is English prose, and it is long enough to be kept.
        """

    async def short(self):
        """Short."""
'''


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A site-packages folder of its own."""
    for name in ("alpha", "beta"):
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(MODULE)
        (tmp_path / name / "broken.py").write_text(
            '"""The broken file is of no use to a parser."""('
        )
        (tmp_path / name / "tests" / "test_a.py").write_text(f'"""The {name} of the test."""' * 9)
    beta = MODULE.replace("the things", "the other things")
    (tmp_path / "beta" / "__init__.py").write_text(beta)
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    return tmp_path


def test_prose_once_and_nothing_else(packages):
    first = "The first paragraph of this module is English prose, and it is long enough to be kept."
    found = list(docstrings.iter_docstrings())
    assert found == [
        first,
        "Return the number of the things that are in a box, and do not count it twice.",
        "Return the number of the other things that are in a box, and do not count it twice.",
    ]
    assert list(docstrings.iter_docstrings("beta")) == [found[0], found[2]]


def test_unknown_package(packages):
    with pytest.raises(UserError, match="'gamma'"):
        list(docstrings.iter_docstrings("gamma"))


def test_processes_that_end_are_done_without(packages, monkeypatch):
    """One process, as the line says, needs no pool."""
    alone = list(docstrings.iter_docstrings(workers=1))
    monkeypatch.setattr(docstrings, "BATCH_FILES", 1)
    monkeypatch.setattr(docstrings, "worker_pool", lambda n: worker_pool(n, os._exit, 1))
    with pytest.raises(UserError, match="must stay alive.*--set corpus.workers=1"):
        list(docstrings.iter_docstrings(workers=2))
    assert list(docstrings.iter_docstrings(workers=1)) == alone


def test_worker_count_does_not_change_the_order(monkeypatch):
    """Of a real package; ``numpy`` is a dependency and large enough for several units."""
    monkeypatch.setattr(docstrings, "BATCH_FILES", 8)
    modules = set(sys.modules)
    alone = list(docstrings.iter_docstrings("numpy", workers=1))
    assert list(docstrings.iter_docstrings("numpy", workers=2)) == alone
    assert len(alone) > 100
    assert len(set(alone)) == len(alone)
    assert not {m for m in set(sys.modules) - modules if m.startswith("numpy.f2py")}
    assert any(v.startswith("numpy ") for v in docstrings.package_versions("numpy"))
