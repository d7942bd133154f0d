"""The engines benchmark: what counts as time of a shard."""

import json
import os

import pytest
from click.testing import CliRunner

from benchmarks.engines import command, main, shard_rate, table
from distilcache.data.errors import UserError


def write(path, content, when):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    os.utime(path, (when, when))


def test_rate_counts_from_the_end_of_the_preparations(tmp_path):
    write(tmp_path / "teacher" / "head.json", {}, 90.0)
    write(tmp_path / "teacher" / "codec.json", {}, 100.0)
    for shard, (tokens, when) in enumerate([([30, 20], 104.0), ([50], 110.0)]):
        marker = {"blocks": [{"tokens": count} for count in tokens]}
        write(tmp_path / "shards" / "round-0000" / f"shard-{shard}.json", marker, when)
    assert shard_rate(tmp_path) == pytest.approx(100 / 10)


def test_overheads_are_medians_of_ratios_within_a_repetition():
    found = {
        "in-process": {"rates": [100.0, 50.0, 80.0], "seconds": [1.0, 2.0, 3.0]},
        "ray": {"rates": [80.0, 50.0, 64.0], "seconds": [3.0, 4.5, 4.0]},
    }
    ray = table(found).splitlines()[-1]
    assert "+25.0%" in ray
    assert "+2.0 s" in ray


@pytest.mark.parametrize(
    ("arms", "word"), [("in-process nothing", "got nothing"), ("ray", "must name in-process")]
)
def test_arms_that_cannot_be_compared_are_one_line(tmp_path, small_teacher, arms, word):
    text = tmp_path / "text.txt"
    text.write_text("some words")
    given = ["--teacher", small_teacher, "--text", text, "--out", tmp_path / "out", "--arms", arms]
    done = CliRunner().invoke(main, [str(w) for w in given])
    assert done.exit_code == 2
    assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match="corpus must succeed, got: .*nowhere.toml"):
        command(tmp_path / "nowhere.toml", tmp_path, "corpus")
