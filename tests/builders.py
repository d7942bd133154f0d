"""What tests work on: texts of random words, a corpus of them, a random BERT, and its cache.

The fixtures ``small_*`` (:mod:`tests.conftest`) and ``tiny_*`` (of the stages) are made by these.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

WORDS = ["amber", "bridge", "cedar", "delta", "ember", "forest", "garden", "harbor", "island",
         "jungle", "kettle", "lantern", "meadow", "north", "ocean", "planet", "quiet", "river",
         "silver", "timber", "under", "valley", "winter", "yellow", "zebra", "of"]  # fmt: skip


def once(make: Callable[..., Path]) -> Callable[..., Path]:
    """``make``, whose result is kept: the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def get(**settings) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = make(**settings)
        return made[key]

    return get


def random_texts(
    count: int = 60,
    shortest: int = 4,
    longest: int = 22,
    words: Sequence[str] = WORDS,
    seed: int = 0,
) -> list[str]:
    """Texts of very different lengths, the same every time."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(shortest, longest))) for _ in range(count)]


def build_corpus_of(texts: list[str], folder: Path, tokenizer: Path | str, **settings) -> Path:
    """The corpus of texts, beside them in a folder; a tenth of it held out."""
    from distilcache.stages.corpus.build import build_corpus
    from distilcache.stages.corpus.config import CorpusConfig

    (folder / "text.txt").write_text("\n\n".join(texts))
    sources = (str(folder / "text.txt"),)
    plain = {"max_length": 16, "heldout_fraction": 0.1, "workers": 1}
    build_corpus(
        CorpusConfig(sources=sources, **{**plain, **settings}), folder / "corpus", str(tokenizer)
    )
    return folder / "corpus"


def save_random_bert(
    folder: Path, tokenizer: Path, *, layers: int, ffn: int, positions: int, bias: float
) -> Path:
    """A BERT of width 32 with a tokenizer, whose random weights are large enough for opinions.

    ``bias`` is the spread of the bias of its decoder.
    """
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    own = AutoTokenizer.from_pretrained(tokenizer)
    config = BertConfig(
        vocab_size=len(own),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=ffn,
        max_position_embeddings=positions,
        pad_token_id=own.pad_token_id,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForMaskedLM(config)
        torch.nn.init.normal_(model.cls.predictions.bias, std=bias)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def run_stage_one(
    out: Path,
    corpus: Path,
    teacher: Path,
    *,
    masking: dict | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    ensemble: Sequence[Path] = (),
    engine=None,
    **settings,
) -> Path:
    """The cache with these settings."""
    from distilcache.data.masks.masking import MaskingConfig
    from distilcache.stages.teacher_cache.build import Build
    from distilcache.stages.teacher_cache.config import CacheConfig
    from distilcache.stages.teacher_cache.run import build_cache

    config = CacheConfig(**settings)
    build = Build(
        corpus_dir=corpus,
        out=out,
        teacher=None if config.mask_only else str(teacher),
        ensemble=tuple(map(str, ensemble)),
        masking=MaskingConfig(**{"probability": 0.3, **(masking or {})}),
        config=config,
        device=device,
        dtype=dtype,
    )
    build_cache(build, engine)
    return out
