"""Fixtures that every test may use: a tiny teacher, corpora and caches of it, ../shared."""

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["amber", "bridge", "cedar", "delta", "ember", "forest", "garden", "harbor", "island",
         "jungle", "kettle", "lantern", "meadow", "north", "ocean", "planet", "quiet", "river",
         "silver", "timber", "under", "valley", "winter", "yellow", "zebra", "of"]  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small matrices on two contended cores: threads would only wait for each other.

    Processes that tests start inherit it, so that their sums have the same order of terms.
    """
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Shells start background jobs with Ctrl-C ignored, and what tests start would inherit it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real teacher and corpus."""
    folder = ROOT.parent / "shared"
    if not (folder / "teacher" / "model.safetensors").is_file():
        pytest.skip("needs the real teacher and corpus in ../shared")
    return folder


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory) -> Path:
    """A fast WordPiece tokenizer of about 120 ids."""
    from data.tokenizers import train_wordpiece

    folder = tmp_path_factory.mktemp("small") / "tokenizer"
    train_wordpiece([" ".join(WORDS)] * 20, 120).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory, small_tokenizer) -> Path:
    """A BERT of 3 layers x 32 with random weights large enough to have opinions."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("small") / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForMaskedLM(config)
        torch.nn.init.normal_(model.cls.predictions.bias)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory, small_tokenizer) -> Callable[..., Path]:
    """``small_corpus(packing=..., documents=..., block_sequences=...)``: made once per setting."""
    from stages.corpus.build import build_corpus
    from stages.corpus.config import CorpusConfig

    made: dict[str, Path] = {}

    def make(
        packing: str = "blocks",
        documents: int = 60,
        max_length: int = 16,
        block_sequences: int = 8,
        seed: int = 0,
    ) -> Path:
        key = repr((packing, documents, max_length, block_sequences, seed))
        if key not in made:
            folder = tmp_path_factory.mktemp("small")
            rng = random.Random(seed)
            texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 22))) for _ in range(documents)]
            (folder / "text.txt").write_text("\n\n".join(texts))
            config = CorpusConfig(
                sources=(str(folder / "text.txt"),),
                packing=packing,
                max_length=max_length,
                block_sequences=block_sequences,
                heldout_fraction=0.1,
                workers=1,
            )
            build_corpus(config, folder / "corpus", str(small_tokenizer))
            made[key] = folder / "corpus"
        return made[key]

    return make


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory, small_corpus, small_teacher) -> Callable[..., Path]:
    """``small_cache(corpus={...}, masking={...}, top_k=..., ...)``: made once; do not change it."""
    made: dict[str, Path] = {}

    def make(corpus=None, masking=None, **settings) -> Path:
        key = repr((corpus, masking, sorted(settings.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("small") / "cache"
            build_small_cache(
                made[key],
                small_corpus(**(corpus or {})),
                small_teacher,
                masking=masking,
                **settings,
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def build_cache_in() -> Callable[..., Path]:
    """``build_cache_in(out, corpus_dir, teacher_dir, masking={...}, ...)``: stage one, anew."""
    return build_small_cache


def build_small_cache(out, corpus_dir, teacher, *, masking=None, **settings) -> Path:
    """Run stage one in float32 on the CPU."""
    from data.masking import MaskingConfig
    from stages.teacher_cache.config import CacheConfig
    from stages.teacher_cache.run import build_cache

    config = CacheConfig(**{"blocks_per_shard": 2, "calibration_sequences": 24, **settings})
    build_cache(
        corpus_dir=corpus_dir,
        out=out,
        teacher=None if config.mask_only else str(teacher),
        masking=MaskingConfig(**{"probability": 0.3, **(masking or {})}),
        config=config,
        device="cpu",
        dtype="float32",
    )
    return out


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """``tree(folder)``: relative path to content hash of every file.

    The git revision is left out: it is recorded, and a commit may fall between two builds.
    """

    def hashes(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(content_of(path)).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def content_of(path: Path) -> bytes:
        raw = path.read_bytes()
        if path.name not in ("provenance.json", "manifest.json"):
            return raw
        try:
            values = json.loads(raw)
            values.pop("sha256", None)  # of the file with its revision
            values.get("provenance", values)["environment"].pop("git_revision")
        except (ValueError, KeyError):  # a test has damaged it
            return raw
        return json.dumps(values).encode()

    return hashes
