"""``distilcache inspect``: the report and its JSON, for every kind of cache."""

import json
from types import SimpleNamespace

import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.publish import publish_cache
from distilcache.data.storage.remote import Remote
from distilcache.pipeline.look.report import facts_of
from distilcache.pipeline.report.text import short_bytes
from tests.command_line import run

KINDS = {
    "default": {},
    "two rounds, padded": {"rounds": 2, "corpus": {"packing": "lines"}},
    "masks": {"mask_only": True},
    "sparse": {"hidden_dtype": "none", "top_k": 4},
    "draws": {"hidden_dtype": "none", "top_k": 0, "tail_samples": 4},
    "replay": {"top_k": 0},
    "all": {"positions": "all", "hidden_dtype": "float16", "hidden_layers": (1, -1)},
}


def inspect(*arguments):
    return run("inspect", *arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cache(small_cache, kind):
    path = small_cache(**KINDS[kind])
    done = inspect(path)
    assert done.exit_code == 0, done.output
    text = done.stdout
    values = json.loads(inspect(path, "--json").stdout)
    totals = values["totals"]
    assert f"{totals['tokens']:,}" in text
    assert sum(c["stored_bytes"] for c in values["columns"]) == pytest.approx(totals["bytes"])
    for column in totals["column_bytes"]:
        assert column in text
    names = [histogram["name"] for histogram in values["histograms"]]
    assert names[0] == "sequence length"
    with_teacher = kind not in ("masks", "draws")
    assert any("entropy" in name for name in names) == with_teacher
    assert any("norm" in name for name in names) == (kind not in ("masks", "sparse", "draws"))
    assert any("mass" in name for name in names) == (with_teacher and kind != "replay")
    assert len(values["samples"]) == 3
    legend = text.index("[token] was masked, [token|other] replaced by the other")
    assert legend < text.index("\n  round ")
    for sample in values["samples"]:
        assert "[" in sample["text"]
        assert all(bool(entry["top"]) == with_teacher for entry in sample["positions"])
        for entry in sample["positions"]:
            shares = [p for _, p in entry["top"]]
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) <= 1 + 1e-6
    if kind == "two rounds, padded":
        assert {sample["round"] for sample in values["samples"]} == {0, 1}


def test_a_cache_elsewhere(small_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILCACHE_HOME", str(tmp_path / "mirror"))
    url = "memory://inspect/cache"
    publish_cache(small_cache(), Remote(url), lambda size: None)
    assert (
        json.loads(inspect(url, "--json").stdout)["fingerprint"]
        == (json.loads(inspect(small_cache(), "--json").stdout)["fingerprint"])
    )


def test_temperature(small_cache):
    hot = json.loads(inspect(small_cache(), "--temperature", "5", "--json").stdout)
    cold = json.loads(inspect(small_cache(), "--json").stdout)
    name = "entropy of the teacher at T = "
    means = [
        next(h["mean"] for h in values["histograms"] if h["name"].startswith(name))
        for values in (hot, cold)
    ]
    assert means[0] > means[1]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--temperature", "0"], "inspect: --temperature must be above 0, got 0"),
        (["--temperature", "3"], "must be one that the cache holds (1, 2), got 3"),
        (["--samples", "-1"], "inspect: --samples must be 0 or more, got -1"),
        (["--seed", "-1"], "inspect: --seed must be 0 or more, got -1"),
    ],
)
def test_bad_input_is_named(small_cache, options, line):
    done = inspect(small_cache(hidden_dtype="none", top_k=4), *options)
    assert done.exit_code == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_without_a_cache(tmp_path):
    done = inspect(tmp_path)
    assert done.exit_code == 2
    assert "must hold a teacher cache" in done.stderr


def test_clipped_codes_as_one_in_so_many(small_cache):
    cache = Cache.open(small_cache())
    fraction = SimpleNamespace(totals=cache.manifest.totals, rounds=1, clipped_fraction=0.035e-6)
    assert dict(facts_of(SimpleNamespace(manifest=fraction)))["codes clipped"] == "1 in 28.6M"


def test_sizes():
    assert [short_bytes(n) for n in (0, 999, 1000, 12_345, 999_600, 7.5e6, 2e9, 3e12)] == [
        "0 B", "999 B", "1 kB", "12.3 kB", "1 MB", "7.5 MB", "2 GB", "3 TB",
    ]  # fmt: skip
    assert [short_bytes(*ends) for ends in ((4.998e6, 5.003e6), (9e5, 1.2e6))] == [
        "5 MB", "0.9 to 1.2 MB",
    ]  # fmt: skip
