"""Benchmarks from the command line, on the small teacher."""

import json

import pytest
from click.testing import CliRunner


@pytest.fixture
def run_bench(tmp_path, small_corpus, small_teacher):
    """``run_bench(main, steps=3, ...)``: the figures, and what was printed; work is in ``work``."""

    def run(main, **options):
        given = {
            "teacher": small_teacher,
            "text": small_corpus().parent / "text.txt",
            "out": tmp_path / "work",
            "json": tmp_path / "figures.json",
            **options,
        }
        words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
        done = CliRunner().invoke(main, [w for pair in words for w in pair], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "figures.json").read_text()), done.output

    return run
