"""docs/format.md is enough: what a reader in numpy finds is what this project reads.

It is held against this project's decoders and against the live teacher.
"""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertForMaskedLM

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.joined import corrected_log_probs
from distilcache.data.codecs.logits import topk_log_probs, unpack
from distilcache.data.codecs.relations import relation_logits
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.reading import OpenCache
from tests.data.cache.format_reader import Reader, blocks_of, log_sum, softmax
from tests.documents import ROOT

LINES = {"packing": "lines", "max_length": 24, "documents": 160}
V = 120
KINDS = {
    "default": {},
    "adaptive codes, draws": {
        "positions": "masked+0.3", "logits_dtype": "uint8", "top_p": 0.1, "tail_samples": 6,
        "residual_samples": 8, "hidden_layers": (1, -1), "temperatures": (2.0, 4.0),
    },
    "exact": {
        "positions": "all", "hidden_dtype": "float32", "logits_dtype": "float32",
        "temperatures": (2.0,), "residual_samples": 2,
    },
    "half": {"hidden_dtype": "float16", "logits_dtype": "uint8", "residual_samples": 30},
    "positions apart": {
        "positions": "masked+0.2", "logit_positions": "masked", "top_p": 0.12, "top_k": 12,
        "temperatures": (4.0, 2.0), "hidden_quality": 1e-4,
    },
    "draws alone": {
        "hidden_dtype": "none", "top_k": 0, "tail_samples": 40, "logit_positions": "masked+0.5",
    },
    "sparse": {"hidden_dtype": "none", "top_k": V, "temperatures": (1.0,)},
    "relations": {"relation_layer": 2, "top_k": 2},
    "sharp": {"temperatures": (1.0,), "residual_samples": 4, "tail_samples": 4},
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[{}, LINES], ids=["full", "padded"])
def cache_path(request, small_cache, kind):
    return small_cache(corpus=request.param, calibration_sequences=1000, **KINDS[kind])


@pytest.fixture
def readers(cache_path):
    """Every third block."""
    return [Reader(cache_path, *block) for block in list(blocks_of(cache_path))[::3]]


@pytest.fixture
def ours(cache_path):
    """The same blocks as this project reads them."""
    cache = Cache.open(cache_path)
    blocks = [cache.read_block(n) for n in range(0, cache.num_blocks, 3)]
    return cache, blocks


def close(found, wanted, atol=1e-5):
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=1e-5, atol=atol)


def decoded(cache, block, layer):
    stored = cache.encoding.hidden_layer(layer)
    flat = torch.from_numpy(block[stored.column].copy())
    coded = stored.dtype == "coded"
    shaped = flat.reshape(stored.planes, -1) if coded else flat.reshape(-1, stored.width)
    return cache.teacher.hidden_decoder(layer)({stored.column: shaped})


def our_replay(cache, block, temperature):
    logits = cache.teacher.lm_head()(decoded(cache, block, -1))
    if cache.encoding.hidden_layer().dtype == "coded":
        bias = cache.teacher.hidden_codec(cache.encoding.num_layers).bias_at(temperature)
        logits = logits if bias is None else logits + bias
    return logits


def our_topk(cache, block, temperature):
    kept = unpack(block, cache.encoding.top_k, 1 + len(cache.encoding.temperatures))
    column = (1.0, *cache.encoding.temperatures).index(temperature)
    values, odds = (torch.from_numpy(x.copy()) for x in (kept.values, kept.log_odds[:, column]))
    return kept, values, *topk_log_probs(values, odds, temperature)


def test_columns_and_hidden_states(readers, ours):
    cache, blocks = ours
    assert len(readers) == len(blocks) > 3
    for reader, block in zip(readers, blocks, strict=True):
        assert {n: (v.dtype, v.tobytes()) for n, v in reader.columns.items()} == {
            n: (v.dtype, v.tobytes()) for n, v in block.items()
        }
        for stored in cache.encoding.hidden:
            close(reader.hidden(stored.layer), decoded(cache, block, stored.layer), atol=2e-5)


@pytest.mark.parametrize("kind", ["relations"], indirect=True)
def test_relations(readers, ours, cache_path):
    cache, _ = ours
    decoder = cache.teacher.relations()
    batches = OpenCache(cache)
    for number, reader in zip(range(0, cache.num_blocks, 3), readers, strict=True):
        block = batches.block(number)
        queries = decoder({name: block[name] for name in block.keys()})  # noqa: SIM118
        lengths = reader.columns["lengths"].tolist()
        found = iter(list(reader.relations(heads=2)))
        for x_BLP in queries:
            for x_LP, length in zip(x_BLP, lengths, strict=True):
                close(next(found), relation_logits(x_LP[None, :length], 2)[0].softmax(-1))


def test_stored_logits(readers, ours):
    cache, blocks = ours
    for reader, block in zip(readers, blocks, strict=True):
        for temperature in reader.temperatures:
            kept, values, log_p, log_tail = our_topk(cache, block, temperature)
            pairs = zip(reader.stored_logits(), reader.head_and_tail(temperature), strict=True)
            for n, ((ids, logits), (_, own_log_p, own_tail)) in enumerate(pairs):
                k = len(ids)
                assert kept.lengths[n] == k
                assert kept.ids[n, :k].tolist() == ids.tolist()
                close(logits, values[n, :k])
                close(own_log_p, log_p[n, :k], atol=2e-5)
                close(own_tail, log_tail[n], atol=2e-5)
                assert np.exp(own_log_p).sum() + np.exp(own_tail) == pytest.approx(1, abs=1e-9)


def test_replayed_distributions(readers, ours):
    cache, blocks = ours
    if not cache.encoding.hidden:
        pytest.skip("nothing to replay")
    for reader, block in zip(readers, blocks, strict=True):
        for temperature in reader.temperatures:
            logits = our_replay(cache, block, temperature)
            close(reader.replayed(temperature), (logits / temperature).softmax(-1))
            kept, _, log_p, log_tail = our_topk(cache, block, temperature)
            hidden, logit = (reader.positions(s)[0] for s in ("hidden", "logit"))
            rows = torch.from_numpy(np.searchsorted(hidden, logit))
            ids = torch.from_numpy(kept.ids.astype(np.int64))
            q = corrected_log_probs(logits[rows] / temperature, ids, log_p, log_tail).exp()
            corrected = reader.corrected(temperature)
            close(corrected, q)
            close(corrected.sum(-1), 1.0)


def test_targets_from_draws(readers, ours):
    """Against the sums of the words: head, draws of equal shares of a mass, signs."""
    cache, blocks = ours
    encoding = cache.encoding
    t = encoding.sample_temperature
    for reader, block in zip(readers, blocks, strict=True):
        kept, _, log_p, log_tail = our_topk(cache, block, t)
        assert reader.sample_temperature == t
        ids = torch.from_numpy(kept.ids.astype(np.int64))
        if encoding.tail_samples:
            draws = torch.from_numpy(kept.tail_ids.astype(np.int64))
            share = (log_tail.exp() / encoding.tail_samples)[:, None].expand(draws.shape)
            target = torch.zeros(len(ids), V).scatter_add_(1, draws, share)
            close(reader.sparse_target(), target.scatter_add_(1, ids, log_p.exp()))
            close(reader.sparse_target().sum(-1), 1.0)
        if encoding.residual_samples:
            logits = our_replay(cache, block, t) / t
            q = corrected_log_probs(logits, ids, log_p, log_tail).exp()
            signs = torch.ones(encoding.residual_samples)
            signs[encoding.residual_samples // 2 :] = -1
            mass = torch.from_numpy(block["residual_mass"].astype(np.float32))
            share = mass[:, None] * signs * 2 / encoding.residual_samples
            draws = torch.from_numpy(block["residual_ids"].astype(np.int64))
            q.scatter_add_(1, draws.reshape(len(q), -1), share)
            close(reader.residual_target(), q)
            close(reader.residual_target().sum(-1), 1.0)


def test_positions_and_weights(readers, cache_path):
    """Against the loader: the same signal positions of the same sequences, the same weights."""
    cache = Cache.open(cache_path)
    sparse = not cache.encoding.hidden
    data = CachedBatches(
        cache, batch_size=4, seed=0, signal="sparse" if sparse else "replay", hidden=not sparse
    )
    loaded = {}
    for step in range(data.steps_per_epoch):
        batch = data[step]
        width = batch["input_ids"].shape[1]
        index = batch["ce_index"].numpy()
        weights = batch["ce_weight"].numpy() if "ce_weight" in batch else np.ones(len(index))
        for row, ids in enumerate(batch["input_ids"].numpy()):
            mine = index // width == row
            entry = ((index[mine] % width).tolist(), weights[mine].tolist())
            loaded.setdefault(tuple(ids[ids != cache.encoding.pad_id].tolist()), []).append(entry)
    for reader in readers:
        rows, weights = reader.positions("logit" if sparse else "hidden")
        start = 0
        for length in reader.columns["lengths"].tolist():
            own = (rows >= start) & (rows < start + length)
            key = tuple(reader.columns["input_ids"][start : start + length].tolist())
            expected = ((rows[own] - start).tolist(), pytest.approx(weights[own].tolist()))
            assert any(entry == expected for entry in loaded[key])
            start += length


def live_logits(model, reader):
    start, found = 0, []
    for length in reader.columns["lengths"].tolist():
        ids = torch.from_numpy(reader.columns["input_ids"][start : start + length].astype(np.int64))
        with torch.no_grad():
            found.append(model(input_ids=ids[None]).logits[0].double().numpy())
        start += length
    return np.concatenate(found)


def divergence(p, q):
    return float((p * (np.log(p) - np.log(q))).sum(-1).mean())


def test_against_the_live_teacher(readers, kind, small_teacher):
    """To the quality that was asked for; exactly in the exact mode."""
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    settings = KINDS[kind]
    live = [live_logits(model, reader) for reader in readers]
    t = readers[0].sample_temperature
    at = [z[r.positions("logit")[0]] for z, r in zip(live, readers, strict=True)]
    p = np.concatenate([softmax(z / t) for z in at])
    tolerance = {"float32": 1e-5, "float16": 3e-3, "uint8": 0.05}
    bound = tolerance[settings.get("logits_dtype", "float16")]
    for reader, logits in zip(readers, at, strict=True):
        for row, (ids, log_p, log_tail) in zip(logits, reader.head_and_tail(t), strict=True):
            true = row / t - log_sum(row / t)
            close(log_p, true[ids], bound)
            rest = np.delete(true, ids)
            assert not len(rest) or abs(log_sum(rest) - log_tail) < 3e-3 * max(1, abs(log_tail))
    if settings.get("hidden_dtype") != "none":
        quality = {"coded": settings.get("hidden_quality", 1e-3), "float16": 1e-5, "float32": 1e-9}
        quality = quality[settings.get("hidden_dtype", "coded")]
        everywhere = [
            softmax(z[r.positions("hidden")[0]] / t) for z, r in zip(live, readers, strict=True)
        ]
        replayed = np.concatenate([r.replayed(t) for r in readers])
        assert divergence(np.concatenate(everywhere), replayed) < 1.3 * quality
        corrected = np.concatenate([r.corrected(t) for r in readers])
        rounding = 1e-9 if settings.get("logits_dtype") == "float32" else 1e-5
        assert divergence(p, corrected) < 1.3 * quality + rounding
    if settings.get("tail_samples"):
        target = np.concatenate([r.sparse_target() for r in readers])
        # Draws of every row scatter by at most a share each; their mean by the root of the rows.
        bound = 5 / settings["tail_samples"] / len(p) ** 0.5
        assert np.abs((target - p).mean(0)).max() < bound
    if settings.get("residual_samples"):
        target = np.concatenate([r.residual_target() for r in readers])
        mass = np.concatenate([r.columns["residual_mass"] for r in readers]).astype(float)
        bound = 5 * mass.mean() / (settings["residual_samples"] / 2) / len(p) ** 0.5 + 1e-6
        assert np.abs((target - p).mean(0)).max() < bound


def names_in(path):
    """Every name that a reader of a cache meets, but for those of settings and packages."""
    manifest = json.loads((path / "manifest.json").read_text())
    provenance = manifest["provenance"]
    parts = [manifest, manifest["encoding"], *manifest["encoding"]["hidden"], manifest["totals"]]
    parts += [manifest["head"], manifest["head"]["tensors"]] if manifest["head"] else []
    parts += [provenance, provenance["identity"], provenance["environment"]]
    parts += [provenance["environment"]["card"]]
    parts += [json.loads(next(path.glob("shards/*/*.json")).read_text())]
    for columns, metadata in blocks_of(path):
        parts += [columns, metadata]
    with pa.memory_map(str(path / "index.arrow")) as file:
        parts += [pa.ipc.open_file(file).schema.names]
    for part in parts:
        yield from (re.sub(r"^hidden_\d+$", "hidden_<l>", name) for name in part)


@pytest.mark.parametrize(
    "settings",
    [KINDS["default"], KINDS["adaptive codes, draws"], {"mask_only": True}],
    ids=["default", "everything", "mask-only"],
)
def test_every_name_is_explained(small_cache, settings):
    text = (ROOT / "docs" / "format.md").read_text()
    names = set(names_in(small_cache(corpus={}, calibration_sequences=1000, **settings)))
    assert {"lengths", "fingerprint", "crc32", "marker_sha256"} <= names
    missing = {n for n in names if not re.search(rf"(?<![\w.]){re.escape(n)}(?![\w.])", text)}
    assert missing == set()
