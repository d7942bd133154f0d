"""Options of ``verify`` and ``view`` that would say nothing, or fail in mid-run."""

import pytest
from click.testing import CliRunner

from pipeline.cli import main


@pytest.mark.parametrize("option", ["--max-kl", "--min-cosine", "--min-top1", "--max-logit-error"])
def test_limits_without_a_replay_are_refused(small_cache, option):
    """Else a cache would seem to have passed them."""
    refused = CliRunner().invoke(main, ["verify", str(small_cache()), option, "0.5"])
    assert refused.exit_code == 2, refused.output
    assert f"{option} must come with --replay" in refused.stderr.splitlines()[-1]


def test_a_seed_below_zero_is_refused(small_cache):
    refused = CliRunner().invoke(main, ["verify", str(small_cache()), "--replay", "1", "--seed=-1"])
    assert refused.exit_code == 2, refused.exception
    assert "--seed must be 0 or more" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["gpu", "meta", "cpu:x"])
def test_a_device_that_is_none_is_refused(small_cache, name):
    refused = CliRunner().invoke(main, ["view", str(small_cache()), "--device", name])
    assert refused.exit_code == 2, refused.exception
    assert f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got '{name}'" in refused.stderr
