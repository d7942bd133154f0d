"""Bits that flip in files, and what is said of a cache or corpus that was damaged."""

import os
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings

from distilcache.data.corpus.store import Corpus
from distilcache.data.storage.files import sha256_json
from distilcache.data.verify.run import Settings, verify_cache


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file; negative ones count from its end."""
    with path.open("r+b") as file:
        place, bit = divmod(bit % (8 * path.stat().st_size), 8)
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def flip_at(path: Path, share: float = 0.5) -> None:
    """Flip the bit that lies at a share of a file."""
    flip(path, int(8 * path.stat().st_size * share))


def check(path: Path, **settings) -> list[str]:
    """Faults of a cache, each in one line."""
    found = [f.text for f in verify_cache(path, Settings(**{"workers": 1, **settings}))]
    assert all("\n" not in text for text in found)
    return found


def read_corpus(path: Path) -> None:
    """Read every block of a corpus, which checks the hash of its part, and count the tokens."""
    corpus = Corpus.open(path)
    counts = {}
    for name in ("train", "heldout"):
        split = corpus.split(name)
        ids = [split.block(i)[0] for i in range(split.num_blocks)]
        counts[name] = np.bincount(np.concatenate(ids), minlength=corpus.manifest.vocab_size)
    assert (corpus.token_counts == counts["train"]).all()


def sealed(values: dict) -> dict:
    """A manifest with the hash of its content, whatever that is."""
    content = {name: value for name, value in values.items() if name != "sha256"}
    return {**content, "sha256": sha256_json(content)}


def fuzzed(examples: int) -> settings:
    """So many cases, or as many as ``FUZZ_EXAMPLES`` says."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", examples)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
