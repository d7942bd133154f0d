"""A cache to be damaged; made-up blocks of any encoding, and caches that hold them in memory."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.frames import encode_block
from distilcache.data.cache.schema import SCHEMA_VERSION, Encoding, HiddenEncoding
from distilcache.data.cache.shards import INDEX_TYPES
from distilcache.data.storage.files import sha256_json

FRAMES: dict[str, list[bytes]] = {}
"""Frames of each cache in memory, by the cache's path."""
SOUND = {"rounds": 2, "hidden_layers": (1, -1)}


@pytest.fixture(scope="session")
def sound(small_cache) -> Path:
    """A cache of two rounds with coded hidden states of two layers; do not change it."""
    return small_cache(corpus={"documents": 30}, **SOUND)


@pytest.fixture
def rebuild(build_cache_in, small_corpus, small_teacher):
    """``rebuild(path)``: stage one once more, on the folder of a copy."""
    return lambda path: build_cache_in(path, small_corpus(documents=30), small_teacher, **SOUND)


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    """The same cache, to be damaged; nothing else is in the folder around it."""
    return shutil.copytree(sound, tmp_path / "outer" / "copy")


def make_encoding(**settings) -> Encoding:
    """A small encoding with coded hidden states of two layers, changed by ``settings``."""
    dtype = settings.pop("hidden_dtype", "coded")
    layers = settings.pop("layers", (1, 3) if dtype != "none" else ())
    hidden = tuple(
        HiddenEncoding(layer=n, width=5, dtype=dtype, planes=3 + n if dtype == "coded" else 0)
        for n in layers
    )
    plain = {"vocab_size": 90, "max_length": 12, "pad_id": 1, "temperatures": (2.0,), "top_k": 4}
    return Encoding(**{**plain, "hidden": hidden, "num_layers": 3, **settings})


def make_block(encoding: Encoding, seed: int = 0, sequences: int = 7, padded: bool = True) -> dict:
    """Columns that fit an encoding, of otherwise random content."""
    rng = np.random.default_rng(seed)
    token, top = encoding.token_dtype, encoding.vocab_size
    longest = encoding.max_length
    lengths = rng.integers(2, longest + 1, sequences) if padded else np.full(sequences, longest)
    drawn = [rng.random(n) for n in lengths]
    masked = [np.flatnonzero(u < 0.2) for u in drawn]
    block = {
        "lengths": lengths.astype(np.uint16),
        "input_ids": rng.integers(0, top, lengths.sum()).astype(token),
        "masked_counts": np.array([len(m) for m in masked], np.uint16),
        "masked_positions": np.concatenate(masked).astype(np.uint16),
    }
    block["labels"] = rng.integers(0, top, len(block["masked_positions"])).astype(token)
    extra = [rng.random(n) for n in lengths]

    def place(signal: str, policy: str) -> int:
        if policy in ("masked", "all"):
            return len(block["labels"]) if policy == "masked" else int(lengths.sum())
        share = float(policy.partition("+")[2])
        rows = [
            np.flatnonzero((u < share) | np.isin(np.arange(len(u)), m))
            for u, m in zip(extra, masked, strict=True)
        ]
        block[f"{signal}_position_counts"] = np.array([len(r) for r in rows], np.uint16)
        block[f"{signal}_positions"] = np.concatenate(rows).astype(np.uint16)
        return len(block[f"{signal}_positions"])

    if encoding.stores_logits and not encoding.mask_only:
        count = place("logit", encoding.logit_positions)
        block |= _logits(encoding, count, rng)
    count = place("hidden", encoding.hidden_positions) if encoding.hidden else 0
    for stored in encoding.hidden:
        if stored.dtype == "coded":
            values = rng.integers(0, 256, (stored.planes, count), dtype=np.uint8)
        else:
            values = rng.normal(size=(count, stored.width)).astype(stored.dtype)
        block[stored.column] = values.reshape(-1)
    return block


def _logits(encoding: Encoding, count: int, rng: np.random.Generator) -> dict:
    token, top = encoding.token_dtype, encoding.vocab_size
    kept = np.full(count, encoding.top_k)
    found = {}
    if encoding.top_p < 1:
        kept = rng.integers(1, encoding.top_k + 1, count)
        found["logit_lengths"] = kept.astype(np.uint16)
    if encoding.top_k:
        ids = [rng.permutation(top)[:k] for k in kept] or [np.zeros(0)]
        found["logit_ids"] = np.concatenate(ids).astype(token)
        if encoding.logits_dtype == "uint8":
            steps = [np.sort(rng.integers(0, 256, k)) for k in kept] or [np.zeros(0)]
            found["logit_values"] = np.concatenate(steps).astype(np.uint8)
            found["logit_base"] = rng.normal(8, 3, count).astype(np.float16)
            found["logit_scale"] = rng.uniform(0.01, 0.1, count).astype(np.float16)
        else:
            values = [np.sort(rng.normal(2, 3, k))[::-1] for k in kept] or [np.zeros(0)]
            found["logit_values"] = np.concatenate(values).astype(encoding.logits_dtype)
    odds = rng.normal(size=count * (1 + len(encoding.temperatures)))
    exact = encoding.logits_dtype == "float32"
    found["log_odds"] = odds.astype(np.float32 if exact else np.float16)
    for name, draws in (
        ("tail_ids", encoding.tail_samples),
        ("residual_ids", encoding.residual_samples),
    ):
        if draws:
            found[name] = rng.integers(0, top, count * draws).astype(token)
    if encoding.residual_samples:
        found["residual_mass"] = rng.random(count).astype(np.float16)
    return found


def metadata_of(encoding: Encoding, number: int) -> dict:
    """What a block of a cache in memory says of itself."""
    return {"schema_version": SCHEMA_VERSION, "round": 0, "block": number,
            "encoding": encoding.to_dict(), "provenance_sha256": sha256_json({})}  # fmt: skip


def memory_cache(encoding: Encoding, blocks: list[dict], rows: list[dict] | None = None) -> Cache:
    """A cache of one round whose blocks lie in memory; ``rows``: blocks the index describes."""
    path = f"memory-{len(FRAMES)}"
    FRAMES[path] = [encode_block(b, metadata_of(encoding, i)) for i, b in enumerate(blocks)]
    columns: dict[str, list[int]] = {name: [] for name in INDEX_TYPES}
    for number, block in enumerate(rows or blocks):
        row = {
            "round": 0, "shard": 0, "block": number, "offset": number, "size": 1, "crc32": 0,
            "sequences": len(block["lengths"]), "tokens": len(block["input_ids"]),
            "masked": len(block["labels"]), "positions": 0,
        }  # fmt: skip
        for name, value in row.items():
            columns[name].append(value)
    table = pa.table({n: pa.array(columns[n], t) for n, t in INDEX_TYPES.items()})
    manifest = SimpleNamespace(encoding=encoding, rounds=1, provenance={"identity": {}})
    frames = FRAMES[path]
    return Cache(Path(path), manifest, table.combine_chunks(), lambda _, row: frames[row.offset])


@pytest.fixture(scope="session")
def made_up() -> SimpleNamespace:
    """``made_up.encoding(...)``, ``.block(encoding, ...)`` and ``.cache(encoding, blocks)``;
    ``.frames[str(cache.path)]`` are the bytes of such a cache."""
    return SimpleNamespace(
        encoding=make_encoding,
        block=make_block,
        cache=memory_cache,
        frames=FRAMES,
        metadata=metadata_of,
    )
