"""What stage one stores is what a dense forward of the teacher says."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.logits import unpack
from distilcache.data.corpus.store import Corpus
from distilcache.data.masks.masking import GOES_ON, MaskingConfig, mask_block
from distilcache.data.masks.positions import flat_rows
from distilcache.stages.evaluate.heldout import read_heldout
from distilcache.stages.teacher_cache import run
from tests.stages.teacher_cache.teacher_cache_support import V, expected_signals, replayed_logits

LINES = {"packing": "lines", "max_length": 24, "documents": 160}


@pytest.mark.parametrize("corpus", [{}, LINES], ids=["unpadded", "padded"])
@pytest.mark.parametrize(
    ("positions", "logit_positions"),
    [("masked", ""), ("all", ""), ("masked+0.3", ""), ("masked+0.2", "masked+0.5"),
     ("masked+0.3", "masked"), ("masked", "all")],
)  # fmt: skip
def test_signals_equal_a_dense_forward(
    small_cache, small_teacher, corpus, positions, logit_positions
):
    path = small_cache(
        corpus=corpus,
        positions=positions,
        logit_positions=logit_positions,
        hidden_dtype="float32",
        hidden_layers=(0, 1, -1),
        top_k=7,
        logits_dtype="float32",
        temperatures=(2.0, 4.0),
        batch_tokens=100,
        row_chunk=13,
    )
    cache = Cache.open(path)
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    for number in range(0, cache.num_blocks, 3):
        block = cache.read_block(number)
        logits, hidden = expected_signals(
            model, block, positions, (0, 1, 3), logit_positions or positions
        )
        assert cache.entry(number).positions == len(hidden[0])
        for layer, states in hidden.items():
            stored = torch.from_numpy(block[f"hidden_{layer}"].copy()).reshape(-1, 32)
            torch.testing.assert_close(stored, states, rtol=1e-5, atol=2e-5)
        values, ids = logits.sort(-1, descending=True)
        stored = block["logit_values"].reshape(-1, 7)
        np.testing.assert_allclose(stored, values[:, :7], rtol=1e-5, atol=2e-5)
        ids = torch.from_numpy(block["logit_ids"].astype(np.int64)).reshape(-1, 7)
        np.testing.assert_allclose(stored, logits.gather(-1, ids), rtol=1e-5, atol=2e-5)
        assert block["log_odds"].dtype == np.float32
        for column, temperature in enumerate((1.0, 2.0, 4.0)):
            scaled = logits / temperature
            head = scaled.gather(-1, ids).logsumexp(-1)
            tail = scaled.scatter(-1, ids, -torch.inf).logsumexp(-1)
            found = block["log_odds"].reshape(-1, 3)[:, column]
            np.testing.assert_allclose(found, head - tail, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("top_p", [0.06, 0.11])
def test_as_many_logits_as_hold_the_mass(small_cache, small_teacher, top_p):
    """At the largest temperature; the odds are those of what is kept."""
    cache = Cache.open(
        small_cache(top_k=9, top_p=top_p, logits_dtype="float32", temperatures=(4.0, 2.0))
    )
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    block = cache.read_block(1)
    logits, _ = expected_signals(model, block, "masked", ())
    p, ids = (logits / 4).softmax(-1).sort(-1, descending=True)
    before = p.cumsum(-1) - p
    kept = (before[:, :9] < top_p).sum(-1)
    near = ((before[:, :9] - top_p).abs() < 1e-5).any(-1)
    assert not near.any()
    assert block["logit_lengths"].tolist() == kept.tolist()
    assert len(set(kept.tolist())) > 2
    wanted = [ids[n, : kept[n]].tolist() for n in range(len(kept))]
    assert block["logit_ids"].tolist() == sum(wanted, [])
    for column, temperature in enumerate((1.0, 4.0, 2.0)):
        scaled = logits / temperature
        for n, own in enumerate(wanted):
            head = scaled[n, own].logsumexp(0)
            rest = scaled[n].clone()
            rest[own] = -torch.inf
            found = block["log_odds"].reshape(-1, 3)[n, column]
            assert found == pytest.approx(float(head - rest.logsumexp(0)), abs=1e-4)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float16", 2e-2), ("uint8", 0.15), ("float32", 3e-5)]
)
def test_every_logit_may_be_stored(small_cache, small_teacher, dtype, bound):
    path = small_cache(top_k=V, logits_dtype=dtype, hidden_dtype="none")
    cache = Cache.open(path)
    assert cache.encoding.vocab_size == V
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    block = cache.read_block(2)
    assert not any(name.startswith("hidden") for name in block)
    logits, _ = expected_signals(model, block, "masked", ())
    ids = block["logit_ids"].astype(np.int64).reshape(-1, V)
    assert (np.sort(ids, -1) == np.arange(V)).all()
    stored = unpack(block, V, 2)
    error = np.abs(stored.values - logits.gather(-1, torch.from_numpy(ids)).numpy())
    assert error.max() <= bound
    assert np.isposinf(block["log_odds"]).all()


@pytest.mark.parametrize("positions", ["masked", "masked+0.2"])
@pytest.mark.parametrize(("sequences", "bound"), [(1000, 1.2e-4), (24, 4e-4)], ids=["all", "few"])
def test_coded_hidden_states_keep_the_named_quality(
    small_cache, small_teacher, positions, sequences, bound
):
    """On what calibrated them; a hundred positions leave codes that clip, and are counted."""
    cache = Cache.open(
        small_cache(
            hidden_quality=1e-4,
            tail_samples=0,
            positions=positions,
            calibration_sequences=sequences,
        )
    )
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    codec = cache.teacher.hidden_codec(3)
    total, rows, clipped = 0.0, 0, 0
    for number in range(cache.num_blocks):
        block = cache.read_block(number)
        logits, hidden = expected_signals(model, block, positions, (3,))
        replayed = replayed_logits(cache, block).double()
        p, q = (logits / 2).log_softmax(-1), (replayed / 2).log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        rows += len(p)
        codes = ((hidden[3] - codec.mean) @ codec.analysis / codec.step).round()
        clipped += int((codes.abs() > torch.tensor(codec.limits)).sum())
    assert 5e-5 < total / rows < bound
    assert cache.manifest.totals["clipped_codes"] == clipped
    assert clipped == 0 if sequences == 1000 else clipped < 0.01 * 32 * rows


def mean_kl(cache, model, round_index):
    """Of the replay of a round at T = 2, and over how many positions."""
    divergences = []
    for number in cache.round_range(round_index):
        block = cache.read_block(number)
        logits, _ = expected_signals(model, block, "masked", ())
        p, q = ((z / 2).log_softmax(-1) for z in (logits, replayed_logits(cache, block).double()))
        divergences.append((p.exp() * (p - q)).sum(-1))
    found = torch.cat(divergences)
    return float(found.mean()), len(found)


def test_few_short_lines_keep_the_quality_in_every_round(
    build_cache_in, small_corpus, small_teacher, tmp_path, monkeypatch, capsys
):
    """Fewer positions than units in each round; the codec does not depend on their number."""
    monkeypatch.setattr(run, "MUCH_CLIPPED", -1.0)
    corpus = small_corpus(documents=6, packing="lines", max_length=10, heldout_fraction=0.0)
    settings = {"masking": {"probability": 0.1}, "calibration_sequences": 512}
    once, often = (
        Cache.open(build_cache_in(tmp_path / str(n), corpus, small_teacher, rounds=n, **settings))
        for n in (1, 6)
    )
    assert once.encoding == often.encoding
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    found = [mean_kl(often, model, n) for n in range(6)]
    assert max(count for _, count in found) < 32
    assert np.mean([kl for kl, _ in found]) < 1.2e-3
    assert max(kl for kl, _ in found) < 1.6e-3
    said = capsys.readouterr().err
    assert (
        said.count("of the codes are outside the range that calibration found, though it saw") == 2
    )


def test_many_clipped_codes_are_said_wherever_a_cache_is_made(
    small_cache, small_corpus, small_teacher, build_cache_in, monkeypatch, capsys
):
    monkeypatch.setattr(run, "MUCH_CLIPPED", -1.0)
    build_cache_in(small_cache(), small_corpus(), small_teacher)  # it is finished, and reused
    line = "found; for a closer cache make it again with a larger cache.calibration_sequences\n"
    assert line in capsys.readouterr().err


def test_a_quality_out_of_reach_is_told_of_each_layer(small_cache, capsys):
    asked = {"hidden_layers": (1, -1), "hidden_quality": 1e-16, "relation_layer": 2}
    small_cache(**asked, relation_quality=1e-16, calibration_sequences=24)
    lines = [x for x in capsys.readouterr().err.splitlines() if "where 1e-16 were asked for" in x]
    named = {x.partition("code of ")[2].partition(" has")[0]: x for x in lines}
    assert named.keys() == {"layer 1", "layer 3", "the relations of layer 2"}
    assert all(("of the variance" in x) == (name == "layer 1") for name, x in named.items())
    assert all(("nats" in x) == (name != "layer 1") for name, x in named.items())


def test_clipped_codes_are_counted_over_all_layers(small_cache, small_teacher):
    settings = {"hidden_layers": (1, -1), "hidden_quality": 1e-4, "tail_samples": 0}
    cache = Cache.open(small_cache(**settings, calibration_sequences=24))
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    clipped = {1: 0, 3: 0}
    for number in range(cache.num_blocks):
        _, hidden = expected_signals(model, cache.read_block(number), "masked", (1, 3))
        for layer, states in hidden.items():
            codec = cache.teacher.hidden_codec(layer)
            codes = ((states - codec.mean) @ codec.analysis / codec.step).round()
            clipped[layer] += int((codes.abs() > torch.tensor(codec.limits)).sum())
    assert min(clipped.values()) > 0
    assert cache.manifest.totals["clipped_codes"] == sum(clipped.values())


def test_coded_states_of_several_layers(small_cache, small_teacher):
    """Each by its own codec, the inner ones to a relative squared error of the quality."""
    path = small_cache(positions="masked+0.2", hidden_layers=(0, 1, -1), hidden_quality=1e-3)
    cache = Cache.open(path)
    assert [h.layer for h in cache.encoding.hidden] == [0, 1, 3]
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    wrong, spread = dict.fromkeys((0, 1), 0.0), dict.fromkeys((0, 1), 0.0)
    for number in range(cache.num_blocks):
        block = cache.read_block(number)
        _, hidden = expected_signals(model, block, "masked+0.2", (0, 1))
        for layer, states in hidden.items():
            stored = cache.encoding.hidden_layer(layer)
            planes = torch.from_numpy(block[stored.column].copy()).reshape(stored.planes, -1)
            assert planes.shape[1] == len(states)
            found = cache.teacher.hidden_decoder(layer)({stored.column: planes})
            wrong[layer] += float((found - states).pow(2).sum())
            spread[layer] += float((states - cache.teacher.hidden_codec(layer).mean).pow(2).sum())
    for layer in wrong:
        assert wrong[layer] / spread[layer] == pytest.approx(1e-3, rel=0.7)
    assert cache.teacher.hidden_codec(0).replay_bias is None
    assert cache.teacher.hidden_codec(3).replay_bias.shape == (1, V)
    assert len({h.codec_sha256 for h in cache.encoding.hidden}) == 3


@pytest.mark.parametrize("positions", ["masked+0.1", "masked+0.5"])
def test_a_share_of_the_other_positions(small_cache, positions):
    share = float(positions.removeprefix("masked+"))
    cache = Cache.open(small_cache(positions=positions, hidden_dtype="none", top_k=2))
    others = stored = 0
    for number in range(cache.num_blocks):
        block = cache.read_block(number)
        stored += len(block["logit_positions"]) - len(block["labels"])
        others += len(block["input_ids"]) - len(block["labels"])
        assert cache.entry(number).positions == len(block["logit_positions"])
    assert abs(stored - share * others) < 4 * (others * share * (1 - share)) ** 0.5


def test_float16_hidden_states(small_cache, small_teacher):
    cache = Cache.open(small_cache(hidden_dtype="float16", top_k=0))
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    block = cache.read_block(0)
    assert block["hidden_3"].dtype == np.float16
    _, hidden = expected_signals(model, block, "masked", (3,))
    np.testing.assert_allclose(
        block["hidden_3"].reshape(-1, 32).astype(np.float32), hidden[3], rtol=1e-3, atol=1e-3
    )


def test_masks_are_those_of_the_masking_function(small_cache, small_corpus):
    masking = {"policy": "smoothed", "probability": 0.2, "seed": 11}
    cache = Cache.open(small_cache(masking=masking, rounds=2, mask_only=True))
    corpus = Corpus.open(small_corpus())
    manifest = corpus.manifest
    different = 0
    for number in range(cache.num_blocks):
        entry, block = cache.entry(number), cache.read_block(number)
        ids, lengths = corpus.split("train").block(entry.block)
        wanted = mask_block(
            ids,
            lengths,
            config=MaskingConfig(**masking),
            round_index=entry.round,
            block_index=entry.block,
            special_ids=manifest.all_special_ids,
            mask_id=manifest.special_ids["mask"],
            vocab_size=manifest.vocab_size,
            token_counts=corpus.token_counts,
        )
        for name in ("input_ids", "masked_counts", "masked_positions", "labels"):
            assert np.array_equal(block[name], getattr(wanted, name))
        starts = np.repeat(np.cumsum(lengths) - lengths, block["masked_counts"])
        restored = block["input_ids"].copy()
        restored[starts + block["masked_positions"]] = block["labels"]
        assert np.array_equal(restored, ids)
        if entry.round == 1:
            other = cache.read_block(number - corpus.split("train").num_blocks)
            different += not np.array_equal(block["input_ids"], other["input_ids"])
    assert different == corpus.split("train").num_blocks


@pytest.mark.parametrize("unit", ["word", "token"])
def test_whole_words_are_masked_in_cache_and_held_out_text(small_cache, small_corpus, unit):
    masking = {"unit": unit, "probability": 0.3}
    cache = Cache.open(small_cache(masking=masking, mask_only=True))
    corpus = Corpus.open(small_corpus())
    goes_on, special = corpus.continuations == GOES_ON, corpus.manifest.all_special_ids
    assert goes_on.any()
    heldout = read_heldout(corpus, MaskingConfig(**masking), sequences=64, seed=1)
    for block in (cache.read_block(0), asdict(heldout)):
        lengths, ids = block["lengths"].astype(int), block["input_ids"].copy()
        rows = flat_rows(lengths, block["masked_counts"], block["masked_positions"])
        ids[rows] = block["labels"]
        drawn = np.isin(np.arange(len(ids)), rows)
        later = 1 + np.flatnonzero(goes_on[ids[1:]] & ~np.isin(ids[:-1], special))
        assert (drawn[later] == drawn[later - 1]).all() == (unit == "word")
    identity = cache.manifest.provenance["identity"]
    assert identity["masking"].get("unit") == (None if unit == "token" else unit)  # as ever


def test_a_mask_only_cache_has_no_teacher(small_cache):
    path = small_cache(mask_only=True)
    cache = Cache.open(path)
    assert set(cache.read_block(0)) == {
        "lengths", "input_ids", "masked_counts", "masked_positions", "labels",
    }  # fmt: skip
    assert cache.manifest.totals["positions"] == 0
    assert not (path / "teacher" / "model.safetensors").exists()
    assert len(AutoTokenizer.from_pretrained(path / "teacher")) == V


def test_the_teacher_of_a_cache_is_a_whole_checkpoint(small_cache, small_teacher):
    path = small_cache() / "teacher"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, given = (
            BertForMaskedLM.from_pretrained(p).eval()(ids).logits for p in (path, small_teacher)
        )
    assert torch.equal(ours, given)
    assert len(AutoTokenizer.from_pretrained(path)) == V
    modes = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert len(modes) == 1  # Weights too are for all who may read the rest.
