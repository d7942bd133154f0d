"""Settings that stage one refuses: by themselves, with each other, with the teacher."""

import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.layout import encoding_of
from tests.builders import build_corpus_of, random_texts
from tests.stages.teacher_cache.teacher_cache_support import V, one_line


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 0),
        ("positions", "some"),
        ("positions", "masked+1.5"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("tail_samples", -1),
        ("residual_samples", 3),
        ("hidden_dtype", "int4"),
        ("logits_dtype", "bfloat16"),
        ("top_k", -1),
        ("temperatures", (0.0,)),
        ("temperatures", (2.0, float("inf"))),
        ("hidden_quality", 0.0),
        ("hidden_quality", float("inf")),
        ("hidden_layers", ()),
        ("blocks_per_shard", 0),
        ("row_chunk", -1),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(UserError, match=f"cache: {field} must") as error:
        CacheConfig(**{field: value})
    one_line(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_positions": "few"}, "positions must be 'masked'"),
        ({"residual_samples": 4, "logit_positions": "all"}, "logit_positions must equal positions"),
        ({"residual_samples": 4, "hidden_dtype": "none"}, "hidden_dtype must store hidden states"),
    ],
)
def test_settings_that_do_not_fit_each_other(settings, message):
    with pytest.raises(UserError, match=f"cache: {message}") as error:
        CacheConfig(**settings)
    one_line(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_layers": (4,)}, r"hidden_layers must lie between 0 and 3 .* got \[4\]"),
        ({"hidden_layers": (-2,)}, r"got \[-2\]"),
        ({"top_k": 0, "hidden_dtype": "none"}, "must store something"),
    ],
)
def test_settings_that_do_not_fit_the_teacher(
    build_cache_in, small_corpus, small_teacher, tmp_path, settings, message
):
    with pytest.raises(UserError, match=message) as error:
        build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **settings)
    one_line(error)
    assert not (tmp_path / "c").exists()


def test_more_logits_than_ids_are_all(build_cache_in, small_corpus, small_teacher, tmp_path):
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, top_k=10 * V)
    assert Cache.open(out).encoding.top_k == V


def test_residuals_want_the_last_layer(build_cache_in, small_corpus, small_teacher, tmp_path):
    settings = {"residual_samples": 4, "hidden_layers": (1,)}
    with pytest.raises(UserError, match="hidden_layers must hold the last layer"):
        build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **settings)
    assert not (tmp_path / "c").exists()


UNKNOWN = " ".join(["ዶሮ"] * 300)


@pytest.mark.parametrize("mask_only", [True, False])
def test_a_corpus_without_a_token_to_mask(
    build_cache_in, small_tokenizer, small_teacher, tmp_path, monkeypatch, mask_only
):
    monkeypatch.setattr(
        "distilcache.stages.corpus.finish.check_text", lambda *_: None
    )  # as one made earlier
    corpus = build_corpus_of([UNKNOWN], tmp_path, small_tokenizer, heldout_fraction=0.0)
    with pytest.raises(UserError, match="corpus must hold tokens that can be masked") as error:
        build_cache_in(tmp_path / "c", corpus, small_teacher, mask_only=mask_only)
    one_line(error)
    assert not (tmp_path / "c").exists()


def test_calibration_goes_on_where_its_blocks_are_unknown(
    build_cache_in, small_tokenizer, small_teacher, tmp_path
):
    texts = [UNKNOWN[:180], *random_texts(2), UNKNOWN]
    settings = {"block_sequences": 2, "heldout_fraction": 0.0}
    corpus = build_corpus_of(texts, tmp_path, small_tokenizer, **settings)
    settings = {"calibration_sequences": 1, "hidden_dtype": "coded"}
    cache = Cache.open(build_cache_in(tmp_path / "c", corpus, small_teacher, **settings))
    assert cache.manifest.totals["masked"] > 0


def test_a_block_that_nobody_could_read_is_not_written(
    build_cache_in, small_corpus, small_teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr("distilcache.data.cache.frames.MAX_BLOCK_BYTES", 20_000)
    settings = {"positions": "all", "hidden_dtype": "float32"}
    with pytest.raises(UserError, match="block must be at most 20000 bytes .*block_sequences"):
        build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **settings)
    assert not list((tmp_path / "c").glob("shards/*/*"))


def test_the_odds_at_one_are_stored_once():
    """They are always there: a recipe that names T = 1 as well must not store them twice."""
    sizes = {"vocab_size": 90, "max_length": 12, "pad_id": 0, "width": 8, "num_layers": 3}
    for named in ((2.0,), (1.0, 2.0)):
        assert encoding_of(CacheConfig(temperatures=named), **sizes).temperatures == (2.0,)
