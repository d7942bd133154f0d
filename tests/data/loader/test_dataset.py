"""Batches against a slow reader that takes blocks one by one and positions one by one."""

import functools
import shutil
import threading
from itertools import product
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.asyn import AsyncFileSystem
from torch.utils.data import DataLoader

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.shards import shard_path
from distilcache.data.errors import UserError
from distilcache.data.loader import dataset
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.reading import OpenCache
from tests.damage import flip
from tests.data.loader.slow_reader import check_epoch, signals_of, slow_rows

LINES = {"packing": "lines", "max_length": 24, "documents": 160}
POLICIES = [
    ("masked", "masked"), ("all", "all"), ("masked+0.2", "masked+0.2"), ("masked", "all"),
    ("all", "masked"), ("masked+0.2", "masked"), ("masked", "masked+0.2"), ("all", "masked+0.2"),
    ("masked+0.2", "all"), ("masked+0.5", "masked+0.2"), ("masked+0.2", "masked+0.5"),
]  # fmt: skip
"""Of hidden states, and of logits."""
STORED = {
    "default": {},
    "adaptive": {"top_p": 0.6, "top_k": 6, "temperatures": (2.0, 4.0)},
    "codes": {"logits_dtype": "uint8", "hidden_dtype": "float16"},
    "adaptive codes": {"logits_dtype": "uint8", "top_p": 0.8, "tail_samples": 3},
    "exact": {"logits_dtype": "float32", "hidden_dtype": "float32", "temperatures": ()},
    "draws": {"residual_samples": 4, "tail_samples": 2},
    "draws alone": {"top_k": 0, "tail_samples": 3},
    "states alone": {"top_k": 0},
}
CASES = [
    (stored, *policies)
    for stored in STORED
    for policies in POLICIES
    # Residuals lie where hidden states lie, and where no logits are stored these are the only ones.
    if stored not in ("draws", "states alone") or policies[0] == policies[1]
]


@pytest.mark.parametrize(("stored", "hidden", "logits"), CASES)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_every_batch_equals_the_slow_reader(made_up, stored, hidden, logits, padded):
    encoding = made_up.encoding(hidden_positions=hidden, logit_positions=logits, **STORED[stored])
    cache = made_up.cache(encoding, [made_up.block(encoding, n, padded=padded) for n in range(3)])
    cache.read_block = functools.cache(cache.read_block)  # decoded once for all that read it
    rows = slow_rows(cache)
    for signal, restrict in product(signals_of(encoding), (False, True)):
        for wanted in ({"layers": (1,)}, {"layers": ()}, {"hidden": False}):
            data = CachedBatches(
                cache,
                batch_size=6,
                seed=3,
                window_blocks=2,
                signal=signal,
                restrict_ce_to_mask=restrict,
                **wanted,
            )
            assert (check_epoch(data, rows) > 0) == padded


KINDS = {
    "masked coded": ({}, {"hidden_layers": (1, -1)}, "replay+topk"),
    "lines drawn": (LINES, {"rounds": 2, "positions": "masked+0.2", "top_p": 0.5,
                            "residual_samples": 4}, "replay+residual"),
    "lines apart": (LINES, {"positions": "masked+0.3", "logit_positions": "masked",
                            "hidden_dtype": "float16"}, "replay+topk"),
    "sparse": (LINES, {"positions": "all", "logits_dtype": "uint8", "tail_samples": 3}, "sparse"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_stage_one_are_read_in_every_epoch(small_cache, kind):
    corpus, settings, signal = KINDS[kind]
    cache = Cache.open(small_cache(corpus=corpus, **settings))
    layers = settings.get("hidden_layers", (-1,))[:-1]
    data = CachedBatches(cache, batch_size=7, seed=3, window_blocks=3, signal=signal, layers=layers)
    rounds = cache.manifest.rounds
    for epoch in range(rounds + 1):
        padded = check_epoch(data, slow_rows(cache, epoch % rounds), epoch)
        assert (padded > 0) == bool(corpus)


def test_decoded_hidden_states_lie_at_their_positions(small_cache, small_teacher):
    """Through the decoder, against the teacher itself: planes and positions belong together."""
    from transformers import BertForMaskedLM

    cache = Cache.open(
        small_cache(
            corpus=LINES,
            positions="masked+0.3",
            hidden_quality=1e-6,
            hidden_layers=(1, -1),
            calibration_sequences=160,  # of fewer, some codes of the others would be clipped
        )
    )
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    data = CachedBatches(cache, batch_size=7, seed=3, layers=(1,))
    decoders = {layer: cache.teacher.hidden_decoder(layer) for layer in (1, 3)}
    for step in range(4):
        batch = data[step]
        with torch.no_grad():
            out = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                output_hidden_states=True,
            )
        for layer, decoder in decoders.items():
            live = out.hidden_states[layer].flatten(0, 1)[batch["hidden_index"]]
            error = (decoder(batch) - live).norm() / live.norm()
            assert error < 0.05  # 1 and more where rows are mixed up


def test_shapes(small_cache):
    cache = Cache.open(small_cache(corpus=LINES, positions="all", hidden_dtype="float32"))
    data = CachedBatches(cache, batch_size=4, seed=0, signal="sparse", hidden=True)
    batch = data[0]
    n = len(batch["ce_index"])
    assert batch["logit_ids"].shape == batch["logit_values"].shape == (n, 8)
    assert batch["log_odds"].shape == (n, 2)
    assert batch["hidden_3"].shape == (n, 32)
    masked = batch["input_ids"].flatten()[batch["masked_index"]]
    assert (masked == 4).float().mean() > 0.5


def test_signals_that_are_not_asked_for_are_not_read(small_cache):
    cache = Cache.open(small_cache(rounds=2, hidden_layers=(1, -1)))
    plain = CachedBatches(cache, batch_size=4, seed=0, signal=None, hidden=False)[0]
    assert set(plain) == {"input_ids", "attention_mask", "masked_index", "labels"}
    assert plain["attention_mask"].all()
    cosine = CachedBatches(cache, batch_size=4, seed=0, signal=None, hidden=True)[0]
    assert set(cosine) == {*plain, "hidden_index", "hidden_3"}
    replay = CachedBatches(cache, batch_size=4, seed=0, signal="replay", hidden=True)[0]
    assert set(replay) == {*cosine, "ce_index"}
    head = CachedBatches(cache, batch_size=4, seed=0, signal="replay+topk")[0]
    assert set(head) == {*replay, "logit_ids", "logit_values", "log_odds"}
    sparse = CachedBatches(cache, batch_size=4, seed=0, signal="sparse", hidden=False)[0]
    assert set(sparse) == {*plain, "ce_index", "logit_ids", "logit_values", "log_odds"}
    inner = CachedBatches(cache, batch_size=4, seed=0, signal=None, hidden=False, layers=(1,))[0]
    assert set(inner) == {*plain, "hidden_index", "hidden_1"}
    for name in plain:
        assert torch.equal(plain[name], replay[name])


def test_what_is_not_stored_is_refused(small_cache):
    cache = OpenCache(Cache.open(small_cache(hidden_layers=(1, -1))))
    with pytest.raises(UserError, match=r"^cache: hidden_layers must hold layer 2, got \[1, 3\]; "):
        cache.batches(layers=[1, 2])
    with pytest.raises(UserError, match="must hold what relations are replayed from, got none; "):
        cache.batches(relation=True)
    last = cache.batches(hidden=False, layers=[-1], signal=None)[0]
    assert torch.equal(last["hidden_3"], cache.batches(layers=[3], signal=None)[0]["hidden_3"])


HELD = {
    "states, logits": ({}, {"replay", "replay+topk", "sparse"}),
    "all": ({"residual_samples": 4}, {"replay", "replay+topk", "replay+residual", "sparse"}),
    "states alone": ({"top_k": 0}, {"replay"}),
    "inner states": ({"top_k": 0, "layers": (1,)}, set()),
    "inner states, logits": ({"layers": (1,)}, {"sparse"}),
    "draws alone": ({"top_k": 0, "tail_samples": 3, "hidden_dtype": "none"}, {"sparse"}),
    "masks": ({"mask_only": True, "top_k": 0, "hidden_dtype": "none"}, set()),
}


@pytest.mark.parametrize("kind", HELD)
def test_a_signal_is_read_or_refused_in_one_line(made_up, kind):
    settings, held = HELD[kind]
    encoding = made_up.encoding(**settings)
    cache = OpenCache(made_up.cache(encoding, [made_up.block(encoding)]))
    for signal in ("replay", "replay+topk", "replay+residual", "sparse", "logits"):
        if signal in held:
            assert len(cache.batches(batch_size=3, signal=signal)[0]["ce_index"])
            continue
        with pytest.raises(
            UserError, match=r"^cache: signal must be one that the cache holds"
        ) as e:
            cache.batches(batch_size=3, signal=signal)
        line = str(e.value)
        assert f"got {signal!r}; " in line
        assert set(line[line.index("(") + 1 : line.index(")")].split(", ")) == held | {"None"}
    assert ("ce_index" in cache.batches(batch_size=3)[0]) == bool(held)
    best = [n for n in ("replay+topk", "replay", "sparse") if n in held]
    assert encoding.best_signal == (best[0] if best else None)


def test_a_rank_is_one_of_its_world(made_up):
    encoding = made_up.encoding()
    cache = OpenCache(made_up.cache(encoding, [made_up.block(encoding, sequences=8)]))
    for rank in (-1, 2):
        with pytest.raises(UserError, match=rf"^train: rank must be .*\(world\), got {rank}$"):
            cache.batches(batch_size=4, rank=rank, world=2)


def test_mask_only(small_cache):
    cache = Cache.open(small_cache(mask_only=True))
    for hidden in (True, False):
        batch = CachedBatches(cache, batch_size=4, seed=0, signal=None, hidden=hidden)[0]
        assert set(batch) == {"input_ids", "attention_mask", "masked_index", "labels"}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("corpus", [{}, LINES], ids=["blocks", "lines"])
def test_random_access_equals_sequential(small_cache, corpus):
    cache = Cache.open(small_cache(corpus=corpus, rounds=2))
    data = CachedBatches(cache, batch_size=5, seed=1, window_blocks=2)
    steps = 3 * data.steps_per_epoch
    sequential = [data[k] for k in range(steps)]
    other = CachedBatches(cache, batch_size=5, seed=1, window_blocks=2)
    for k in np.random.default_rng(0).permutation(steps).tolist():
        assert same(other[k], sequential[k])
    several = other.__getitems__([3, 9, 4])
    assert all(same(batch, sequential[k]) for batch, k in zip(several, (3, 9, 4), strict=True))
    assert len(data) == data.steps_per_epoch
    reseeded = CachedBatches(cache, batch_size=5, seed=2, window_blocks=2)
    assert not same(reseeded[0], sequential[0])


def ids_of(batch):
    """The sequences of a batch by what they hold."""
    rows = {}
    width = batch["input_ids"].shape[1]
    for name, index in (("masked", batch["masked_index"]), ("ce", batch["ce_index"])):
        for at in index.tolist():
            rows.setdefault(at // width, []).append((name, at % width))
    ids = [tuple(i for i in row if i) for row in batch["input_ids"].tolist()]
    return sorted((ids[row], tuple(places)) for row, places in rows.items())


@pytest.mark.parametrize("corpus", [{}, LINES], ids=["blocks", "lines"])
def test_ranks_share_the_batches_of_one(small_cache, corpus):
    """What lies at a sequence's positions goes with it, on 1, 2 and 4 ranks and two epochs."""
    cache = Cache.open(small_cache(corpus=corpus, rounds=2))
    settings = {"batch_size": 12, "seed": 1, "window_blocks": 3, "streams": 4}
    alone = CachedBatches(cache, **settings)
    for world in (2, 4):
        ranks = [CachedBatches(cache, **settings, rank=r, world=world) for r in range(world)]
        for k in range(2 * alone.steps_per_epoch):
            parts = [data[k] for data in ranks]
            assert sum((ids_of(part) for part in parts), []) != []
            assert sorted(sum((ids_of(part) for part in parts), [])) == ids_of(alone[k])
            assert {len(part["input_ids"]) for part in parts} <= {
                len(parts[0]["input_ids"]) + d for d in (-1, 0, 1)
            }
    with pytest.raises(UserError, match=r"ranks must divide the streams \(4\), got 3"):
        CachedBatches(cache, **settings, rank=0, world=3)


def test_orders_of_two_epochs_are_kept(small_cache, monkeypatch):
    made = []
    plain = dataset.EpochOrder
    monkeypatch.setattr(dataset, "EpochOrder", lambda *args: made.append(args[1:3]) or plain(*args))
    data = CachedBatches(Cache.open(small_cache()), batch_size=4, seed=4711, window_blocks=1)
    for k in range(2 * data.steps_per_epoch):
        data[k]
    # The loaders of earlier tests may still be reading ahead: this seed is this one's alone.
    own = sorted(epoch for seed, epoch in made if seed == 4711)
    assert own in ([0, 1], [0, 1, 2])


def test_epoch_reads_its_round_in_its_own_order(small_cache):
    cache = Cache.open(small_cache(rounds=2))
    data = CachedBatches(cache, batch_size=5, seed=1)
    n = data.steps_per_epoch
    epochs = [
        sorted(tuple(row) for k in range(n) for row in data[e * n + k]["input_ids"].tolist())
        for e in range(4)
    ]
    rounds = [sorted(tuple(r["ids"]) for r in slow_rows(cache, index)) for index in range(2)]
    assert rounds[0] != rounds[1]
    assert epochs == [rounds[0], rounds[1], rounds[0], rounds[1]]
    assert not same(data[0], data[2 * n])


@pytest.mark.parametrize("streams", [1, 4])
def test_windows_limit_what_is_decoded_at_once(small_cache, monkeypatch, streams):
    """A step needs its window and the next one, no more; each block is read once per epoch."""
    cache = Cache.open(small_cache(corpus={"documents": 200}))
    read = []
    lock = threading.Lock()
    original = Cache.read_block

    def counting(self, block):
        if self is cache:  # The loaders of earlier tests may still be reading ahead.
            with lock:
                read.append(block)
        return original(self, block)

    monkeypatch.setattr(Cache, "read_block", counting)
    data = CachedBatches(cache, batch_size=8, seed=0, window_blocks=2, streams=streams)
    data[0]
    for future in data._windows.values():
        future.result()
    assert len(data._windows) == 2
    assert len(read) <= (6 if streams == 1 else 4 * 3)
    total = len(cache.round_range(0))
    assert total > 10
    for k in range(data.steps_per_epoch - 2):
        data[k]
    for future in data._windows.values():
        future.result()
    # Each once, those that streams share twice, and some of the next epoch.
    assert set(read) == set(range(total))
    assert len(read) <= total + (streams - 1) + (3 if streams == 1 else 4 * 1)


class Store(AsyncFileSystem):
    """Files of this machine under ``store://``, read in the thread of a client, as of s3fs."""

    protocol = "store"

    async def _cat_file(self, path, start=None, end=None, **_):
        return Path(path).read_bytes()[start:end]


@pytest.mark.parametrize("place", ["", "store://"], ids=["folder", "url"])
def test_workers_of_a_dataloader_read_the_same(small_cache, tmp_path, monkeypatch, place):
    fsspec.register_implementation("store", Store, clobber=True)
    monkeypatch.setenv("DISTILCACHE_HOME", str(tmp_path))
    monkeypatch.setenv("DISTILCACHE_KEEP_GB", "0")  # So that workers fetch what they read.
    cache = Cache.open(f"{place}{small_cache()}")
    data = CachedBatches(cache, batch_size=4, seed=0, window_blocks=1)
    data[0]  # Its threads are at work when the workers are forked.
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for k, batch in enumerate(loader):
        assert same(batch, data[k])
    assert k == len(data) - 1


def test_a_damaged_block_stops_the_run_with_its_name(small_cache, tmp_path):
    path = shutil.copytree(small_cache(), tmp_path / "copy")
    cache = Cache.open(path)
    flip(shard_path(path, 0, 0), 8 * (cache.entry(0).offset + 40))
    data = CachedBatches(cache, batch_size=4, seed=0)
    with pytest.raises(UserError, match="shard-000000.tar block 0 must have crc32"):
        data.__getitems__(list(range(data.steps_per_epoch)))


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_a_block_that_could_not_be_read_once_is_read_again(small_cache, monkeypatch, cut):
    cache = Cache.open(small_cache(corpus={"documents": 200}))
    settings = {"batch_size": 8, "seed": 0, "window_blocks": 6, "streams": 4}
    data, fresh = (CachedBatches(cache, **settings) for _ in range(2))
    sizes = cache.index["sequences"]
    first = [c for stream in data.streams for c in data._order(0).slices(0, stream)]
    failing = {next(c.block for c in first if (c.stop - c.start < sizes[c.block]) == cut)}
    read = cache.read_block

    def once(block):
        if block in failing:
            failing.remove(block)
            raise OSError("connection reset")
        return read(block)

    monkeypatch.setattr(cache, "read_block", once)
    data.stop = 1  # So that it is not met while the next window is read ahead.
    with pytest.raises(OSError, match="connection reset"):
        data[0]
    data.stop = None
    for k in range(data.steps_per_epoch):
        assert same(data[k], fresh[k])
