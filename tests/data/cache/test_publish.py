"""``distilcache publish``, and a student trained from the URL."""

import json
import uuid

import pytest

from distilcache.data.storage.files import sha256_file
from tests.command_line import refusal, run


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILCACHE_HOME", str(tmp_path / "home"))


def train(root, cache):
    fields = {
        "root": root,
        "name": "x",
        "cache_from": cache,
        "device": "cpu",
        "dtype": "float32",
        "train.steps": 3,
        "train.batch_size": 8,
        "student.control": "false",
    }
    sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    result = run("student-train", "--size", "1x32", *sets)
    assert result.exit_code == 0, result.output
    return sha256_file(root / "x" / "students" / "1x32" / "model.safetensors")


def test_a_student_from_the_url_is_the_one_from_the_folder(small_cache, tmp_path):
    cache, url = small_cache(), f"memory://{uuid.uuid4()}/cache"
    for _ in range(2):
        result = run("publish", cache, url, "--json")
        assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["url"] == url
    assert train(tmp_path / "away", url) == train(tmp_path / "here", cache)


def test_a_file_url_is_taken_wherever_a_url_is(small_cache, tmp_path):
    here = f"file://{small_cache()}"
    for words in (("inspect", here), ("verify", here), ("publish", here, f"memory://{uuid.uuid4()}"),
                  ("view", here, "--out", tmp_path / "view.html")):  # fmt: skip
        result = run(*words)
        assert result.exit_code == 0, result.output
    assert train(tmp_path / "away", here) == train(tmp_path / "here", small_cache())


def test_bad_places_are_refused_in_one_line(small_cache, tmp_path):
    for words, wanted in (
        ((small_cache(), tmp_path / "copy"), "publish: URL must name a place"),
        ((small_cache(), "nonesuch://a/b"), "must be a URL that fsspec can open"),
        (("memory://a/b", "memory://a/c"), "publish: CACHE must be a folder of this machine"),
        ((tmp_path, "memory://a/b"), "must hold a teacher cache, got no manifest.json"),
    ):
        result = run("publish", *words)
        assert wanted in refusal(result)
        assert len(result.stderr.strip().splitlines()) == 1


def test_verify_reads_a_url(small_cache):
    url = f"memory://{uuid.uuid4()}/cache"
    assert run("publish", small_cache(), url).exit_code == 0
    result = run("verify", url)
    assert result.exit_code == 0, result.output
    assert "no fault" in result.stdout
    line = refusal(run("verify", "memory://nothing/there"))
    assert "must hold a finished teacher cache, got none" in line
