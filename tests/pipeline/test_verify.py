"""Options of ``verify`` and ``view`` that would say nothing, or fail in mid-run."""

import json

import pytest

from tests.command_line import refusal, run


@pytest.mark.parametrize("option", ["--max-kl", "--min-cosine", "--min-top1", "--max-logit-error"])
def test_limits_without_a_rerun_are_refused(small_cache, option):
    """Else a cache would seem to have passed them."""
    refused = run("verify", small_cache(), option, 0.5)
    assert f"{option} must come with --rerun" in refusal(refused)


def test_a_seed_below_zero_is_refused(small_cache):
    refused = run("verify", small_cache(), "--rerun", 1, "--seed=-1")
    assert "--seed must be 0 or more" in refusal(refused)


def test_the_old_name_of_rerun_still_works(small_cache):
    assert "'--replay' requires an argument" in run("verify", small_cache(), "--replay").stderr
    done = run("verify", small_cache(), "--replay", 1, "--json")
    assert json.loads(done.stdout)["rerun"]


@pytest.mark.parametrize("name", ["gpu", "meta", "cpu:x"])
def test_a_device_that_is_none_is_refused(small_cache, name):
    line = refusal(run("view", small_cache(), "--device", name))
    assert f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got '{name}'" in line
