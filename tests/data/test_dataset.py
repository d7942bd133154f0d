"""Batches against a slow reader that takes blocks one by one and sequences one by one."""

import shutil
import threading

import numpy as np
import pytest
import torch

from data.cache import Cache
from data.codecs.logits import unpack_values
from data.dataset import CachedBatches
from data.errors import UserError

LINES = {"packing": "lines", "max_length": 24, "documents": 160}
KINDS = {
    "masked coded": ({}, {"hidden_layers": (1, -1)}, "replay"),
    "masked fp16": ({}, {"hidden_dtype": "float16"}, "replay"),
    "all fp32": ({}, {"hidden_dtype": "float32", "positions": "all"}, "replay"),
    "masked sparse": ({}, {"top_k": 5}, "sparse"),
    "all sparse uint8": ({}, {"positions": "all", "logits_dtype": "uint8"}, "sparse"),
    "lines masked coded": (LINES, {"rounds": 2}, "replay"),
    "lines all coded": (LINES, {"positions": "all"}, "replay"),
    "lines all sparse fp32": (LINES, {"positions": "all", "logits_dtype": "float32"}, "sparse"),
}


def slow_rows(cache, round_index):
    """Every sequence of a round as plain lists, keyed by its own content and place."""
    encoding = cache.encoding
    layer = encoding.hidden_layer()
    found = []
    for number in cache.round_blocks(round_index):
        block = cache.read_block(int(number))
        everywhere = encoding.positions == "all"
        hidden = sparse = None
        count = int(block["lengths"].sum()) if everywhere else len(block["labels"])
        if layer is not None and layer.dtype == "coded":
            codec = cache.hidden_codec(layer.layer)
            wide = block[f"{layer.column}_wide"].reshape(layer.wide_planes, count)
            narrow = block[f"{layer.column}_narrow"].reshape(-1, count)
            codes = np.concatenate([wide, narrow]).T.astype(np.float64)
            hidden = codec.step * codes @ codec.synthesis.double().numpy() + codec.mean.numpy()
        elif layer is not None:
            hidden = block[layer.column].reshape(count, -1).astype(np.float64)
        if "logit_ids" in block:
            sparse = {
                "logit_ids": block["logit_ids"].reshape(count, -1),
                "logit_values": unpack_values(block, encoding.top_k),
                "logsumexp": block["logsumexp"].reshape(count, -1),
                "log_tail": block["log_tail"].reshape(count, -1),
            }
        token = mask = 0
        for length, masks in zip(block["lengths"], block["masked_counts"], strict=True):
            positions = block["masked_positions"][mask : mask + masks].tolist()
            rows = slice(token, token + length) if everywhere else slice(mask, mask + masks)
            found.append(
                {
                    "ids": block["input_ids"][token : token + length].tolist(),
                    "masked": positions,
                    "labels": block["labels"][mask : mask + masks].tolist(),
                    "signals": list(range(length)) if everywhere else positions,
                    "hidden": None if hidden is None else hidden[rows],
                    "sparse": None if sparse is None else {n: v[rows] for n, v in sparse.items()},
                }
            )
            token, mask = token + int(length), mask + int(masks)
    return found


def batch_rows(cache, batch, decoder):
    """A batch taken apart again, sequence by sequence."""
    size, width = batch["input_ids"].shape
    attention = batch.get("attention_mask", torch.ones(size, width, dtype=torch.int64))
    hidden = decoder(batch).numpy() if decoder is not None else None
    for row in range(size):
        length = int(attention[row].sum())
        assert attention[row].tolist() == [1] * length + [0] * (width - length)
        assert (batch["input_ids"][row, length:] == cache.encoding.pad_id).all()
        mine = batch["masked_index"] // width == row
        signals = batch["signal_index"] // width == row
        yield {
            "ids": batch["input_ids"][row, :length].tolist(),
            "masked": (batch["masked_index"][mine] % width).tolist(),
            "labels": batch["labels"][mine].tolist(),
            "signals": (batch["signal_index"][signals] % width).tolist(),
            "hidden": None if hidden is None else hidden[signals.numpy()],
            "sparse": {
                n: batch[n][signals].numpy()
                for n in ("logit_ids", "logit_values", "logsumexp", "log_tail")
                if n in batch
            },
        }


def key(row):
    return (tuple(row["ids"]), tuple(row["masked"]), tuple(row["labels"]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_equals_the_slow_reader(small_cache, kind):
    corpus, settings, signal = KINDS[kind]
    cache = Cache.open(small_cache(corpus=corpus, **settings))
    hidden = signal == "replay"
    data = CachedBatches(cache, batch_size=7, seed=3, window_blocks=3, signal=signal, hidden=hidden)
    decoder = cache.hidden_decoder() if hidden else None
    rounds = cache.manifest.rounds
    padded = 0
    for epoch in range(rounds + 1):
        expected = slow_rows(cache, epoch % rounds)
        waiting = {}
        for row in expected:
            waiting.setdefault(key(row), []).append(row)
        for step in range(data.steps_per_epoch):
            batch = data[epoch * data.steps_per_epoch + step]
            short = len(expected) - 7 * step
            assert len(batch["input_ids"]) == min(7, short)
            assert ("attention_mask" in batch) == (
                len({len(r["ids"]) for r in batch_rows(cache, batch, decoder)}) > 1
            )
            padded += "attention_mask" in batch
            for row in batch_rows(cache, batch, decoder):
                original = waiting[key(row)].pop()
                assert row["signals"] == original["signals"]
                if hidden:
                    np.testing.assert_allclose(
                        row["hidden"], original["hidden"], rtol=1e-4, atol=1e-4
                    )
                else:
                    assert row["sparse"].keys() == original["sparse"].keys()
                    for name, values in original["sparse"].items():
                        assert np.array_equal(row["sparse"][name], values)
        assert not any(waiting.values())
    assert (padded > 0) == bool(corpus)


def test_types_and_shapes(small_cache):
    cache = Cache.open(small_cache(corpus=LINES, positions="all", hidden_dtype="float32"))
    data = CachedBatches(cache, batch_size=4, seed=0, signal="sparse", hidden=True)
    batch = data[0]
    n = len(batch["signal_index"])
    for name in ("input_ids", "masked_index", "labels", "signal_index", "logit_ids"):
        assert batch[name].dtype == torch.int64
    for name in ("logit_values", "logsumexp", "log_tail", "hidden_raw"):
        assert batch[name].dtype == torch.float32
    assert batch["logit_ids"].shape == batch["logit_values"].shape == (n, 8)
    assert batch["logsumexp"].shape == batch["log_tail"].shape == (n, 2)
    assert batch["hidden_raw"].shape == (n, 32)
    assert all(value.is_contiguous() for value in batch.values())
    masked = batch["input_ids"].flatten()[batch["masked_index"]]
    assert (masked == 4).float().mean() > 0.5


def test_signals_that_are_not_asked_for_are_not_read(small_cache):
    cache = Cache.open(small_cache(rounds=2, hidden_layers=(1, -1)))
    plain = CachedBatches(cache, batch_size=4, seed=0, signal=None, hidden=False)[0]
    assert set(plain) == {"input_ids", "masked_index", "labels"}
    replay = CachedBatches(cache, batch_size=4, seed=0, signal="replay", hidden=True)[0]
    assert set(replay) == {*plain, "signal_index", "hidden_wide", "hidden_narrow"}
    for name in plain:
        assert torch.equal(plain[name], replay[name])


def test_mask_only(small_cache):
    cache = Cache.open(small_cache(mask_only=True))
    for hidden in (True, False):
        batch = CachedBatches(cache, batch_size=4, seed=0, signal=None, hidden=hidden)[0]
        assert set(batch) == {"input_ids", "masked_index", "labels"}


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


def test_windows_limit_what_is_decoded_at_once(small_cache, monkeypatch):
    """A step needs its window and the next one, no more; each block is read once per epoch."""
    cache = Cache.open(small_cache(corpus={"documents": 200}))
    read = []
    lock = threading.Lock()
    original = Cache.read_block

    def counting(self, block):
        with lock:
            read.append(block)
        return original(self, block)

    monkeypatch.setattr(Cache, "read_block", counting)
    data = CachedBatches(cache, batch_size=8, seed=0, window_blocks=2)
    data[0]
    for future in data._windows.values():
        future.result()
    assert len(data._windows) == 2
    assert len(read) <= 2 * 3
    total = len(cache.round_blocks(0))
    assert total > 10
    for k in range(data.steps_per_epoch - 2):
        data[k]
    for future in data._windows.values():
        future.result()
    boundary = -(-data._total // data._window_sequences)
    assert len(read) <= total + 2 * boundary


def test_a_damaged_block_stops_the_run_with_its_name(small_cache, tmp_path):
    path = shutil.copytree(small_cache(), tmp_path / "copy")
    cache = Cache.open(path)
    tar = path / "shards" / "r00" / "shard-000000.tar"
    raw = bytearray(tar.read_bytes())
    raw[cache.entry(0).offset + 40] ^= 1
    tar.write_bytes(raw)
    data = CachedBatches(cache, batch_size=4, seed=0)
    with pytest.raises(UserError, match="shard-000000.tar block 0 must have crc32"):
        data.__getitems__(list(range(data.steps_per_epoch)))
