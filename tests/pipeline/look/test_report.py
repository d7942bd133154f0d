"""``distilcache inspect``: the report and its JSON, for every kind of cache."""

import json
import unicodedata
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.publish import publish_cache
from distilcache.data.storage.remote import Remote
from distilcache.pipeline.look.report import facts_of
from distilcache.pipeline.report.text import short_bytes
from tests.builders import build_corpus_of, random_texts, run_stage_one
from tests.command_line import run
from tests.stages.models.families_support import make_model, save_with_tokenizer

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
        assert all(f"[{entry['original']}" in sample["text"] for entry in sample["positions"])
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


def test_nothing_of_the_text_steers_the_terminal(tmp_path):
    """Tokens of bytes are line feeds and escapes, too; pictures of them are shown."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    ids = {token: number for number, token in enumerate([*marks, *letters])}
    backend = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", cls_token="<s>",
        sep_token="</s>", mask_token="<mask>",
    )  # fmt: skip
    model = make_model("bert", len(tokenizer))
    teacher = save_with_tokenizer(model, tokenizer, tmp_path / "teacher")
    texts = [f"{text}\n\x1b[31m{text}\x7f\a" for text in random_texts()]
    corpus = build_corpus_of(texts, tmp_path, teacher)
    run_stage_one(tmp_path / "cache", corpus, teacher, top_k=30)
    done = inspect(tmp_path / "cache", "--samples", 12)
    assert done.exit_code == 0, done.output
    assert {c for c in done.stdout if unicodedata.category(c) == "Cc"} == {"\n"}
    assert {"␊", "␛", "␡", "␇"} <= set(done.stdout)


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
