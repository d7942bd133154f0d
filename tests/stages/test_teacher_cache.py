"""Stage one end to end: what is stored is what a dense forward of the teacher says, and an
interrupted run ends as an uninterrupted one."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

from data.cache import Cache
from data.codecs.logits import unpack
from data.corpus import Corpus
from data.errors import UserError
from data.manifest import CacheManifest
from data.masking import MaskingConfig, mask_block
from data.shards import shard_path
from stages.teacher_cache import run as stage
from stages.teacher_cache.adapters import load_teacher
from stages.teacher_cache.config import CacheConfig
from stages.teacher_cache.engines import base
from stages.teacher_cache.run import build_cache
from tests.command_line import environment, make_project, start, wait_until

LINES = {"packing": "lines", "max_length": 24, "documents": 160}
V = 120


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- what is stored -----------------------------------------------------------------------


def dense_forward(model, block):
    """Logits and hidden states of every sequence, one at a time and without padding."""
    start = 0
    for length in block["lengths"].tolist():
        ids = torch.from_numpy(block["input_ids"][start : start + length].astype(np.int64))
        with torch.no_grad():
            out = model(input_ids=ids[None], output_hidden_states=True)
        yield out.logits[0].double(), [h[0] for h in out.hidden_states]
        start += length


def rows_of(block, policy, signal):
    """Flat token index of each position of a signal, sequence by sequence."""
    names = ("masked_counts", "masked_positions")
    if policy.startswith("masked+"):
        names = (f"{signal}_position_counts", f"{signal}_positions")
    counts, positions = (block[name].astype(np.int64) for name in names)
    rows, start, at = [], 0, 0
    for length, count in zip(block["lengths"].tolist(), counts.tolist(), strict=True):
        own = range(length) if policy == "all" else positions[at : at + count].tolist()
        rows += [start + position for position in own]
        start, at = start + length, at + count
    return rows


def expected_signals(model, block, positions, layers, logit_positions=None):
    """Logits and hidden states where they should lie, of a dense forward."""
    logits, hidden = [], {layer: [] for layer in layers}
    for z, states in dense_forward(model, block):
        logits.append(z)
        for layer in layers:
            hidden[layer].append(states[layer])
    rows = rows_of(block, positions, "hidden")
    logit_rows = rows_of(block, logit_positions or positions, "logit")
    return torch.cat(logits)[logit_rows], {n: torch.cat(h)[rows] for n, h in hidden.items()}


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


def replayed_logits(cache, block):
    layer = cache.encoding.hidden_layer()
    planes = torch.from_numpy(block[layer.column].copy()).reshape(layer.planes, -1)
    with torch.no_grad():
        return cache.lm_head()(cache.hidden_decoder()({layer.column: planes}))


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
    codec = cache.hidden_codec(3)
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
            found = cache.hidden_decoder(layer)({stored.column: planes})
            wrong[layer] += float((found - states).pow(2).sum())
            spread[layer] += float((states - cache.hidden_codec(layer).mean).pow(2).sum())
    for layer in wrong:
        assert wrong[layer] / spread[layer] == pytest.approx(1e-3, rel=0.7)
    assert cache.hidden_codec(0).replay_bias is None
    assert cache.hidden_codec(3).replay_bias.shape == (1, V)
    assert len({h.codec_sha256 for h in cache.encoding.hidden}) == 3


DRAWN = {
    "positions": "masked+0.3",
    "top_p": 0.6,
    "tail_samples": 6,
    "residual_samples": 8,
    "hidden_quality": 1e-2,
}


def test_draws_lie_where_they_should(small_cache, small_teacher):
    """Tail draws outside the stored tokens; residual draws where the difference has their sign,
    each number of times within one of its expectation, with the mass of the live difference."""
    cache = Cache.open(small_cache(**DRAWN))
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    bias = cache.hidden_codec(3).bias_at(2.0)
    for number in range(0, cache.num_blocks, 2):
        block = cache.read_block(number)
        logits, _ = expected_signals(model, block, "masked+0.3", ())
        stored = unpack(block, 8, 2)
        p = (logits / 2).softmax(-1)
        replayed = ((replayed_logits(cache, block) + bias) / 2).double().softmax(-1)
        for n, kept in enumerate(stored.lengths):
            head = stored.ids[n, :kept].astype(np.int64)
            drawn = stored.tail_ids[n].astype(np.int64)
            assert not np.isin(drawn, head).any()
            assert (np.diff(drawn) >= 0).all()
            tail = p[n].clone()
            tail[head] = 0
            expected = 6 * tail / tail.sum()
            assert (np.abs(np.bincount(drawn, minlength=V) - expected.numpy()) < 1 + 1e-3).all()
            # Head-corrected: stored values on the head, replay's shares on the rest.
            q = replayed[n].clone()
            q[head] = 0
            outside = torch.from_numpy(np.array(-stored.log_odds[n, 1], np.float64)).sigmoid()
            q *= outside / q.sum()
            values = torch.from_numpy(stored.values[n, :kept]).double()
            q[head] = (values / 2).softmax(0) * (1 - outside)
            difference = (p[n] - q).numpy()
            mass = np.abs(difference).sum() / 2
            assert block["residual_mass"][n] == pytest.approx(mass, rel=2e-3, abs=1e-5)
            halves = block["residual_ids"].reshape(-1, 8)[n].reshape(2, 4).astype(np.int64)
            for sign, half in zip((1, -1), halves, strict=True):
                assert (np.diff(half) >= 0).all()
                expected = 4 * np.maximum(sign * difference, 0) / mass
                found = np.bincount(half, minlength=V)
                assert (np.abs(found - expected) < 1 + 0.02).all()


def test_residual_draws_correct_the_replay_on_average(small_cache, small_teacher):
    """The mean over many positions of what the draws add is the mean of what replay lacks."""
    cache = Cache.open(small_cache(**DRAWN))
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    wanted, drawn, count = torch.zeros(V).double(), torch.zeros(V).double(), 0
    bias = cache.hidden_codec(3).bias_at(2.0)
    from data.codecs.logits import head_log_probs
    from data.codecs.replay import corrected_log_probs

    for number in range(cache.num_blocks):
        block = cache.read_block(number)
        logits, _ = expected_signals(model, block, "masked+0.3", ())
        stored = unpack(block, 8, 2)
        log_p, log_tail = head_log_probs(
            torch.from_numpy(stored.values), torch.from_numpy(stored.log_odds[:, 1]), 2.0
        )
        ids = torch.from_numpy(stored.ids.astype(np.int64))
        q = corrected_log_probs((replayed_logits(cache, block) + bias) / 2, ids, log_p, log_tail)
        wanted += ((logits / 2).softmax(-1) - q.double().exp()).sum(0)
        mass = torch.from_numpy(block["residual_mass"].astype(np.float64))
        halves = torch.from_numpy(block["residual_ids"].astype(np.int64)).reshape(-1, 2, 4)
        for sign, half in ((1, 0), (-1, 1)):
            share = (sign * mass / 4)[:, None].expand(-1, 4)
            drawn.scatter_add_(0, halves[:, half].flatten(), share.flatten())
        count += len(mass)
    # Each of some 5,000 draws moves its token by about 1e-2 / 4.
    assert float((drawn - wanted).abs().max()) < 0.25 * float(wanted.abs().max()) + 0.25


def test_draws_are_the_same_in_every_build(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    first = small_cache(**DRAWN)
    second = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **DRAWN, row_chunk=2048)
    assert tree(first) == tree(second)


def test_rounds_and_blocks_have_draws_of_their_own(small_cache):
    """The same words would make the same errors again and again."""
    cache = Cache.open(small_cache(**DRAWN, rounds=2))
    blocks = len(cache.round_range(0))
    drawn, free = [], []
    for number in range(2 * blocks):
        block = cache.read_block(number)
        tokens = np.arange(len(block["input_ids"]))
        drawn.append(np.isin(tokens, rows_of(block, "masked+0.3", "hidden")))
        free.append(~np.isin(tokens, rows_of(block, "masked", "hidden")))

    def agreement(first, second):
        """Of two blocks' draws, at tokens that neither masks: 0.58 where they are independent."""
        size = min(len(drawn[first]), len(drawn[second]))
        both = free[first][:size] & free[second][:size]
        return (drawn[first][:size] == drawn[second][:size])[both].mean()

    rounds = [agreement(n, n + blocks) for n in range(blocks)]
    neighbours = [agreement(n, n + 1) for n in range(blocks - 1)]
    for found in (rounds, neighbours):
        assert abs(np.mean(found) - 0.58) < 0.08


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


# ---- the same bytes, once -----------------------------------------------------------------


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_two_builds_give_the_same_bytes(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    first = small_cache(rounds=2, hidden_layers=(1, -1))
    second = build_cache_in(
        tmp_path / "c", small_corpus(), small_teacher, rounds=2, hidden_layers=(1, -1)
    )
    assert tree(first) == tree(second)
    assert Cache.open(first).manifest.fingerprint == Cache.open(second).manifest.fingerprint


def test_a_finished_cache_is_reused(
    build_cache_in, small_corpus, small_teacher, tmp_path, capsys, monkeypatch
):
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher)
    before = stamps(out)
    capsys.readouterr()
    with monkeypatch.context() as patched:
        # Its teacher is known by its weights, not saved and hashed again.
        patched.setattr(stage, "stage_teacher", None)
        build_cache_in(out, small_corpus(), small_teacher)
    assert "is finished (1 rounds) and reused" in capsys.readouterr().err
    # How the work is cut may change; what is stored may not.
    build_cache_in(out, small_corpus(), small_teacher, row_chunk=7, batch_tokens=64)
    assert stamps(out) == before


def test_rounds_are_added_to_a_finished_cache(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    whole = small_cache(rounds=2, hidden_layers=(1, -1))
    out = tmp_path / "c"
    build_cache_in(out, small_corpus(), small_teacher, rounds=1, hidden_layers=(1, -1))
    one, before = Cache.open(out).manifest, stamps(out)
    build_cache_in(out, small_corpus(), small_teacher, rounds=2, hidden_layers=(1, -1))
    after = stamps(out)
    assert {n for n in before if before[n] != after[n]} == {"index.arrow", "manifest.json"}
    two = Cache.open(out).manifest
    assert (one.rounds, two.rounds) == (1, 2)
    assert two.totals["tokens"] == 2 * one.totals["tokens"]
    assert one.fingerprint != two.fingerprint
    assert tree(out) == tree(whole)
    build_cache_in(out, small_corpus(), small_teacher, rounds=1, hidden_layers=(1, -1))
    assert Cache.open(out).manifest == two


def test_rounds_with_draws_are_added_as_if_made_at_once(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    whole = small_cache(**DRAWN, rounds=2)
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **DRAWN)
    build_cache_in(out, small_corpus(), small_teacher, **DRAWN, rounds=2)
    assert tree(out) == tree(whole)


def test_a_run_that_died_between_index_and_manifest_goes_on(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    """Rounds were being added: the index is new, the manifest still the old one."""
    whole = small_cache(rounds=2, hidden_layers=(1, -1))
    old = build_cache_in(tmp_path / "a", small_corpus(), small_teacher, hidden_layers=(1, -1))
    out = shutil.copytree(whole, tmp_path / "b")
    shutil.copy(old / "manifest.json", out / "manifest.json")
    with pytest.raises(UserError, match="index.arrow must have sha256"):
        Cache.open(out)
    build_cache_in(out, small_corpus(), small_teacher, rounds=2, hidden_layers=(1, -1))
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("lost", ["tar and marker", "marker", "index", "manifest"])
def test_what_is_deleted_is_made_again(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, lost
):
    whole = small_cache()
    out = shutil.copytree(whole, tmp_path / "c")
    tar = shard_path(out, 0, 1)
    (out / "manifest.json").unlink()
    if lost == "index":
        (out / "index.arrow").unlink()
    elif lost != "manifest":
        tar.with_suffix(".json").unlink()
        if lost == "tar and marker":
            tar.unlink()
    before = stamps(out / "shards")
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(whole)
    after = stamps(out / "shards")
    remade = {n for n in after if before.get(n) != after[n]}
    assert remade == ({"r00/shard-000001.tar", "r00/shard-000001.json"} if "marker" in lost
                      else set())  # fmt: skip


def test_leftovers_of_a_killed_run_are_cleared_away(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    whole = small_cache()
    out = shutil.copytree(whole, tmp_path / "c")
    (out / "manifest.json").unlink()
    (out / "shards/r00/.shard-000001.tar.999999.tmp").write_bytes(b"half")
    (out / ".manifest.json.999999.tmp").write_bytes(b"half")
    (out / ".teacher.999999.tmp").mkdir()
    (out / ".teacher.999999.tmp" / "model.safetensors").write_bytes(b"half")
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(whole)
    assert not list(out.rglob(".*"))


# ---- through the command line --------------------------------------------------------------

SETTINGS = {
    "rounds": 2,
    "blocks_per_shard": 1,
    "positions": "all",
    "hidden_layers": (0, 1, -1),
}


@pytest.fixture(scope="module")
def uninterrupted(small_cache):
    """One shard per block: enough shards to be killed among."""
    return small_cache(**SETTINGS)


@pytest.fixture
def project(small_corpus, small_teacher, tmp_path):
    """A recipe whose corpus is made already."""
    return make_project(tmp_path, small_corpus(), small_teacher, cache=SETTINGS)


def test_kill_and_the_same_command_again(project, uninterrupted, tree):
    out = project.parent / "p" / "cache"
    process = start(project, "teacher-cache")
    marker = shard_path(out, 0, 1).with_suffix(".json")
    wait_until(marker.exists, process)
    process.send_signal(signal.SIGKILL)
    _, log = process.communicate()
    assert process.returncode == -signal.SIGKILL, log
    assert not (out / "manifest.json").exists()
    done = sorted(p.relative_to(out) for p in out.glob("shards/*/*.json"))
    total = Cache.open(uninterrupted).manifest.totals["shards"]
    assert 2 <= len(done) < total
    with pytest.raises(UserError, match=rf"got {len(done)} finished shards and no manifest"):
        Cache.open(out)
    kept = {str(p.with_suffix(s)) for p in done for s in (".json", ".tar")}
    before = stamps(out)

    process = start(project, "teacher-cache")
    _, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    assert f"{len(done)} of {total} shards were there already" in log
    after = stamps(out)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert tree(out) == tree(uninterrupted)
    assert Cache.open(out).manifest.fingerprint == Cache.open(uninterrupted).manifest.fingerprint
    assert list(Cache.open(out).verify()) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from pipeline import cli
sys.argv = ["distilcache", *sys.argv[2:]]
cli.main()
"""


@pytest.mark.parametrize("room", ["for half a teacher", "for no shard"])
def test_a_full_disk(project, uninterrupted, tree, room):
    """A limit on the size of a file stands for it: every write beyond fails with an OSError."""
    out = project.parent / "p" / "cache"
    teacher = (uninterrupted / "teacher" / "model.safetensors").stat().st_size
    limit = teacher // 2 if room == "for half a teacher" else teacher + 1
    arguments = ["teacher-cache", "--recipe", str(project), "--set", "cache.blocks_per_shard=400"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments],
        cwd=project.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("distilcache: ")
    assert "File too large" in last
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]
    assert not list(out.glob("shards/*/*"))
    assert not (out / "manifest.json").exists()
    if room == "for half a teacher":
        assert not out.exists()
    build_cache(
        corpus_dir=project.parent / "p" / "corpus",
        out=out,
        teacher=json.loads((uninterrupted / "provenance.json").read_text())["environment"][
            "teacher"
        ],
        masking=MaskingConfig(probability=0.3),
        config=CacheConfig(**{**SETTINGS, "blocks_per_shard": 400, "calibration_sequences": 24}),
        device="cpu",
        dtype="float32",
    )
    cache = Cache.open(out)
    assert list(cache.verify()) == []
    assert cache.manifest.totals["tokens"] == Cache.open(uninterrupted).manifest.totals["tokens"]


# ---- bad input -----------------------------------------------------------------------------


def test_another_provenance_lists_the_differing_fields(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path
):
    out = shutil.copytree(small_cache(), tmp_path / "c")
    before = stamps(out)
    with pytest.raises(UserError, match="cache: .* got differing fields") as caught:
        build_cache_in(
            out, small_corpus(), small_teacher, masking={"seed": 5}, top_k=3, temperatures=(4.0,)
        )
    text = one_line(caught)
    for part in ("cache.temperatures was [2.0], now [4.0]", "cache.top_k was 8, now 3",
                 "masking.seed was 0, now 5", "use another name or root"):  # fmt: skip
        assert part in text
    assert "positions" not in text
    with pytest.raises(UserError, match="corpus_fingerprint was .*, now") as caught:
        build_cache_in(out, small_corpus(seed=1), small_teacher)
    assert "tokenizer_sha256" not in one_line(caught)
    assert stamps(out) == before


def test_another_teacher_is_another_provenance(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path
):
    model = BertForMaskedLM.from_pretrained(small_teacher)
    with torch.no_grad():
        model.cls.predictions.bias[3] += 0.5
    other = shutil.copytree(small_teacher, tmp_path / "teacher")
    model.save_pretrained(other)
    out = shutil.copytree(small_cache(), tmp_path / "c")
    with pytest.raises(UserError, match="teacher_sha256 was .*, now"):
        build_cache_in(out, small_corpus(), other)


def test_a_folder_with_other_files_is_left_alone(
    build_cache_in, small_corpus, small_teacher, tmp_path
):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".notes.tmp").write_text("more")
    with pytest.raises(UserError, match="must be empty or a teacher cache, got other files"):
        build_cache_in(tmp_path, small_corpus(), small_teacher)
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.txt", ".notes.tmp"}


def test_two_runs_do_not_share_a_folder(build_cache_in, small_corpus, small_teacher, tmp_path):
    from data.files import locked

    out = tmp_path / "c"
    out.mkdir()
    with (
        locked(out, "cache"),
        pytest.raises(UserError, match="cache: output must not be in use, got .*another run"),
    ):
        build_cache_in(out, small_corpus(), small_teacher)
    build_cache_in(out, small_corpus(), small_teacher)


def test_a_checkpoint_without_its_head_is_refused(
    build_cache_in, small_corpus, small_teacher, tmp_path
):
    """transformers would fill the head with random numbers and only print a table."""
    headless = shutil.copytree(small_teacher, tmp_path / "headless")
    BertModel.from_pretrained(small_teacher, add_pooling_layer=False).save_pretrained(headless)
    with pytest.raises(UserError, match="must hold a trained masked-LM head") as caught:
        build_cache_in(tmp_path / "c", small_corpus(), headless)
    text = one_line(caught)
    assert "cls.predictions.transform.dense.weight" in text or "cls.predictions.bias" in text
    assert "and" in text
    assert not (tmp_path / "c").exists()


def test_a_teacher_that_is_not_there_or_cannot_be_reached(
    build_cache_in, small_corpus, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="which does not exist; pass --set teacher.model") as error:
        build_cache_in(tmp_path / "c", small_corpus(), tmp_path / "nowhere")
    one_line(error)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hub id that can be reached, .*pass its folder") as error:
        build_cache_in(tmp_path / "c", small_corpus(), "nobody/no-such-model")
    one_line(error)
    assert not (tmp_path / "c").exists()


def test_a_pickled_checkpoint_is_refused(build_cache_in, small_corpus, small_teacher, tmp_path):
    folder = shutil.copytree(small_teacher, tmp_path / "pickled")
    state = BertForMaskedLM.from_pretrained(small_teacher).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="teacher: model must be") as error:
        build_cache_in(tmp_path / "c", small_corpus(), folder)
    one_line(error)


def test_another_tokenizer_is_refused(build_cache_in, small_corpus, small_teacher, tmp_path):
    folder = shutil.copytree(small_teacher, tmp_path / "teacher")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    first, second = list(vocab)[20:22]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="tokenizer must be the one the corpus was made") as error:
        build_cache_in(tmp_path / "c", small_corpus(), folder)
    one_line(error)
    tokenizer = AutoTokenizer.from_pretrained(small_teacher)
    tokenizer.add_tokens(["unheardof"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"at most the model's {V} ids, got {V + 1}") as error:
        build_cache_in(tmp_path / "c", small_corpus(), folder)
    one_line(error)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": V + 1}, f"top_k must be at most the vocabulary size {V}, got {V + 1}"),
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
    "settings",
    [
        {"hidden_dtype": "coded"},
        {"hidden_dtype": "float32"},
        {"hidden_dtype": "none"},
        {"hidden_dtype": "float16", "hidden_layers": (1,), "residual_samples": 0},
    ],
    ids=["coded", "raw", "logits alone", "another layer"],
)
@pytest.mark.parametrize("place", ["encoder", "head"])
def test_a_teacher_that_says_nothing_finite_is_refused(
    build_cache_in, small_corpus, small_teacher, tmp_path, settings, place
):
    """A weight is nan, of the head or of a late position, where loading does not look: no shard
    of it is left behind."""
    model = BertForMaskedLM.from_pretrained(small_teacher)
    with torch.no_grad():
        if place == "encoder":
            model.bert.embeddings.position_embeddings.weight[13, 3] = torch.nan
        else:
            model.cls.predictions.bias[40] = torch.nan
    broken = shutil.copytree(small_teacher, tmp_path / "teacher")
    model.save_pretrained(broken)
    out = tmp_path / "c"
    with pytest.raises(UserError, match="teacher: .* must be") as error:
        build_cache_in(out, small_corpus(), broken, **settings)
    one_line(error)
    assert not list(out.glob("shards/*/*"))
    assert not list(out.glob("teacher/hidden_codec_*"))
    assert not (out / "manifest.json").exists()


def test_states_beyond_float16_are_refused(build_cache_in, small_corpus, small_teacher, tmp_path):
    """An outlier dimension, as real encoders have them, that only float32 holds."""
    model = BertForMaskedLM.from_pretrained(small_teacher)
    with torch.no_grad():
        model.bert.encoder.layer[2].output.LayerNorm.bias[3] = 1e5
    broken = shutil.copytree(small_teacher, tmp_path / "teacher")
    model.save_pretrained(broken)
    with pytest.raises(UserError, match="layer 3 must be finite, .*hidden_dtype=float32") as error:
        build_cache_in(tmp_path / "c", small_corpus(), broken, hidden_dtype="float16")
    one_line(error)
    build_cache_in(tmp_path / "d", small_corpus(), broken, hidden_dtype="float32")


def test_sequences_longer_than_the_teacher_takes(
    build_cache_in, small_corpus, small_teacher, tmp_path
):
    long = small_corpus(max_length=40)
    with pytest.raises(UserError, match="max_length must be at most the teacher's 32 positions"):
        build_cache_in(tmp_path / "c", long, small_teacher)


def test_roberta_counts_positions_from_its_padding_id(tmp_path):
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=12, pad_token_id=1,
    )  # fmt: skip
    model = RobertaForMaskedLM(config).eval()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)
    assert teacher.max_length == 10
    teacher.encode(torch.full((1, 10), 5), None, (1,))
    with pytest.raises((IndexError, RuntimeError)):
        teacher.encode(torch.full((1, 11), 5), None, (1,))


def test_an_edited_manifest_is_not_built_upon(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    out = shutil.copytree(small_cache(), tmp_path / "c")
    path = out / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rounds": 9}))
    with pytest.raises(UserError, match="manifest must carry its own sha256"):
        build_cache_in(out, small_corpus(), small_teacher)
    path.unlink()  # as the message says
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(small_cache())


def test_progress_counts_every_token_once(
    build_cache_in, small_corpus, small_teacher, tmp_path, monkeypatch
):
    counted = []

    class Bar:
        initial = 0

        def __init__(self, total, **_):
            counted.append(-total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, n):
            counted.append(n)

    monkeypatch.setattr(base, "tqdm", Bar)
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher)
    assert sum(counted) == 0
    shard_path(out, 0, 1).with_suffix(".json").unlink()
    (out / "manifest.json").unlink()
    counted.clear()
    build_cache_in(out, small_corpus(), small_teacher)
    assert sum(counted) == 0
    assert isinstance(Cache.open(out).manifest, CacheManifest)
