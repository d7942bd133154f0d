"""``verify --rerun``: stored signals against the teacher, run once more."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.manifest import CacheManifest
from distilcache.data.cache.schema import Encoding, HiddenEncoding
from distilcache.data.errors import UserError
from distilcache.data.storage.files import sha256_file
from distilcache.stages.verify.limits import Totals, rows_of
from distilcache.stages.verify.rerun import RerunSettings, rerun
from tests.command_line import refusal, run
from tests.damage import check, flip, sealed

KINDS = {
    "default": {},
    "padded": {"corpus": {"packing": "lines"}, "rounds": 2, "hidden_layers": (1, -1)},
    "float32": {"hidden_dtype": "float32", "logits_dtype": "float32", "positions": "all"},
    "float16": {"hidden_dtype": "float16", "logits_dtype": "uint8", "positions": "masked+0.2",
                "relation_layer": -1},
    "sparse": {"hidden_dtype": "none", "top_p": 0.5, "tail_samples": 4, "temperatures": (2.0, 4.0)},
    "apart": {"positions": "all", "logit_positions": "masked", "residual_samples": 0, "top_p": 0.3},
    "every logit": {"top_k": 119, "logits_dtype": "float32", "temperatures": ()},
    "draws alone": {"top_k": 0, "residual_samples": 4},
    "relations alone": {"hidden_dtype": "none", "top_k": 0, "relation_layer": -1,
                        "positions": "masked+0.1"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_cache_passes(small_cache, kind):
    cache = Cache.open(small_cache(**KINDS[kind]))
    rows = rerun(cache, RerunSettings(blocks=3, device="cpu"))
    assert rows
    assert [row for row in rows if not row.passed] == []
    found = {row.name: row.value for row in rows}
    if cache.encoding.hidden:
        assert found["replay, top-1 agreement"] > 0.8
        layer = cache.encoding.num_layers
        assert found[f"hidden states of layer {layer}, cosine"] > 0.9
        assert any(row.name.startswith("replay, KL") and row.limit is not None for row in rows)
    if cache.encoding.top_k:
        assert found["stored logits, mean error"] < 0.02
    if kind == "float32":
        assert found["replay, KL (nats), T = 2"] < 1e-9
        assert found["replay, top-1 agreement"] == 1
        assert found["stored logits, largest error"] < 1e-4
    if cache.encoding.hidden and kind in ("default", "padded"):
        assert found["codes that come out the same"] > 0.999


def test_blocks_are_chosen_by_the_seed(small_cache, monkeypatch):
    cache = Cache.open(small_cache())
    read = []
    monkeypatch.setattr(
        cache, "read_block", lambda block: read.append(block) or Cache.read_block(cache, block)
    )
    for seed in (0, 0, 1):
        rerun(cache, RerunSettings(blocks=3, seed=seed, device="cpu"))
    assert read[:3] == read[3:6] != read[6:]
    assert len(set(read[:3])) == 3


@pytest.fixture
def of_another_teacher(small_cache, tmp_path):
    """A cache, sound by every checksum, whose teacher is not the one that spoke.

    Its weights are, which the provenance knows; they are read with other heads.
    """

    def make(**kind):
        path = shutil.copytree(small_cache(**kind), tmp_path / "other")
        config = path / "teacher" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_attention_heads": 4}))
        values = json.loads((path / "manifest.json").read_text())
        values["teacher_files"]["config.json"] = sha256_file(config)
        (path / "manifest.json").write_text(json.dumps(sealed(values)))
        return path

    return make


@pytest.mark.parametrize("kind", ["default", "float16", "sparse", "every logit"])
def test_another_teacher_fails(of_another_teacher, kind):
    path = of_another_teacher(**KINDS[kind])
    assert check(path) == []
    rows = rerun(Cache.open(path), RerunSettings(blocks=3, device="cpu"))
    failed = [row.name for row in rows if not row.passed]
    assert any("KL" in name for name in failed)
    if kind == "float16":
        assert any("relations" in name for name in failed)
    if kind == "default":
        assert any("cosine" in name for name in failed)
        assert any("stored logits" in name for name in failed)


def test_through_the_command_line(small_cache, of_another_teacher):
    arguments = ["--rerun", "2", "--device", "cpu"]
    done = run("verify", small_cache(), *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rerun"]
    assert {"name", "value", "limit", "passed", "at_most"} == set(rows[0])
    assert all(row["passed"] for row in rows)
    done = run("verify", small_cache(), *arguments, "--max-kl", "0")
    assert done.exit_code == 2
    assert "replay, KL (nats), T = 2" in done.stdout
    assert "FAILED" in done.stdout
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("distilcache: ")]
    assert "beyond their limits" in line
    done = run("verify", of_another_teacher(), *arguments)
    assert done.exit_code == 2
    assert done.stdout.count("FAILED") >= 3


def test_what_cannot_be_rerun_is_named(small_cache):
    masks = Cache.open(small_cache(mask_only=True))
    with pytest.raises(UserError, match="--rerun must have a teacher, got the mask-only cache"):
        rerun(masks, RerunSettings(device="cpu"))
    draws = Cache.open(small_cache(hidden_dtype="none", top_k=0, tail_samples=4))
    with pytest.raises(UserError, match="--rerun must find hidden states or stored logits"):
        rerun(draws, RerunSettings(device="cpu"))
    for blocks in (0, -1):
        line = refusal(run("verify", small_cache(), "--rerun", blocks))
        assert f"--rerun must be 1 block or more, got {blocks}" in line


def test_a_damaged_teacher_is_not_run(small_cache, tmp_path):
    path = shutil.copytree(small_cache(), tmp_path / "copy")
    flip(path / "teacher" / "model.safetensors", -24)
    with pytest.raises(UserError, match="model.safetensors must have sha256"):
        rerun(Cache.open(path), RerunSettings(device="cpu"))


def test_nan_passes_no_limit():
    from distilcache.stages.verify.limits import Row

    assert not Row("x", float("nan"), 1.0).passed
    assert not Row("x", float("nan"), 0.0, at_most=False).passed
    assert Row("x", float(np.float64(1)), None).passed


def test_the_manifest_helper_is_right(small_cache):
    values = json.loads((small_cache() / "manifest.json").read_text())
    assert CacheManifest.from_dict(values).sha256 == sealed(values)["sha256"]


def test_a_bfloat16_cache_passes(build_cache_in, small_corpus, small_teacher, tmp_path):
    build_cache_in(tmp_path / "cache", small_corpus(), small_teacher, dtype="bfloat16")
    rows = rerun(Cache.open(tmp_path / "cache"), RerunSettings(blocks=3, device="cpu"))
    assert [row for row in rows if not row.passed] == []


def test_how_far_raw_types_round_depends_on_the_teacher(
    build_cache_in, small_corpus, small_teacher, tmp_path
):
    """Queries and keys 30 times as large make relations that float16 loses a fraction of."""
    teacher = shutil.copytree(small_teacher, tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    for name in weights:
        if "layer.2.attention.self.query" in name or "layer.2.attention.self.key" in name:
            weights[name] *= 30
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "cache"
    raw = {"hidden_dtype": "float16", "residual_samples": 0, "relation_layer": -1}
    build_cache_in(path, small_corpus(), teacher, **raw)
    rows = rerun(Cache.open(path), RerunSettings(blocks=3, device="cpu"))
    (lost,) = [row for row in rows if row.name.startswith("relations")]
    assert lost.value > 3e-4
    assert [row for row in rows if not row.passed] == []


LAST = HiddenEncoding(layer=3, width=5, dtype="coded", planes=3)
CODED = Encoding(
    vocab_size=90, max_length=12, pad_id=1, temperatures=(2.0,), top_k=0, hidden=(LAST,),
    num_layers=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "name", "good", "bad"),
    [
        ("float32", "codes", 0.996, 0.994),
        ("bfloat16", "codes", 0.91, 0.89),
        ("float32", "top1", 0.796, 0.794),
        ("bfloat16", "top1", 0.785, 0.775),
        ("float32", "cosine 3", 0.69995, 0.69985),
        ("float32", "kl 2", 5e-3, 5.02e-3),
    ],
)
def test_figures_beyond_their_limits_fail(dtype, name, good, bad):
    """As many codes must be the same as the arithmetic allows; the stored states must be as good as
    fresh ones, of which 0.8 agree here, and lose five times the quality at most."""
    identity = {"dtype": dtype, "cache": {"hidden_quality": 1e-3, "temperatures": [2.0]}}
    sound = {"codes": 1.0, "top1": 0.8, "again top1": 0.8, "cosine 3": 0.7, "again cosine 3": 0.7,
             "kl 2": 1e-3, "kl 1": 1e-3}  # fmt: skip
    for value, passes in ((good, True), (bad, False)):
        totals = Totals(CODED)
        for key, mean in {**sound, name: value}.items():
            totals.add(key, torch.tensor(1000 * mean, dtype=torch.float64), 1000)
        assert all(row.passed for row in rows_of(totals, identity, {})) == passes


def test_an_error_that_is_no_number_is_the_largest():
    totals = Totals(CODED)
    for values in ([0.1], [0.3, float("nan")], [0.2]):
        totals.largest("error", torch.tensor(values))
    assert totals.peaks["error"] > 1e6
