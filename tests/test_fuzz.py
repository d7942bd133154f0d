"""A sample of the fuzz: the rest of it is run by ``python -m tests.fuzz``."""

import pytest

from tests.fuzz import Fuzz

SAMPLE = {"recipe": 6, "config": 3, "damage": 3}


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("case", [f"{k}:{n}" for k, count in SAMPLE.items() for n in range(count)])
def test_no_input_ends_in_a_traceback(case, fuzz, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = fuzz.run_case(case)
    assert not outcome.wrong, (outcome.words, outcome.text)


def test_the_fuzz_sees_a_traceback(fuzz, monkeypatch):
    def fail(*_):
        raise KeyError("ours")

    monkeypatch.setattr("distilcache.pipeline.options.show", fail)
    monkeypatch.setattr("distilcache.pipeline.recipe.load_recipe", fail)
    assert fuzz.run_case("recipe:0").wrong.startswith("KeyError at ")
