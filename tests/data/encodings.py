"""Encodings of every kind, and reading all that a cache of them can give."""

from distilcache.data.errors import UserError
from distilcache.data.loader.dataset import CachedBatches
from tests.data.loader.slow_reader import signals_of

ENCODINGS = {
    "default": {},
    "drawn": {"hidden_positions": "masked+0.3", "logit_positions": "masked+0.3", "top_p": 0.7,
              "residual_samples": 4},
    "mixed": {"hidden_positions": "masked+0.4", "logit_positions": "masked", "top_p": 0.5},
    "logits apart": {"hidden_positions": "masked", "logit_positions": "masked+0.2",
                     "logits_dtype": "uint8", "temperatures": (2.0, 4.0)},
    "all": {"hidden_positions": "all", "logit_positions": "all", "hidden_dtype": "float16",
            "logits_dtype": "uint8", "top_p": 0.9},
    "exact": {"hidden_dtype": "float32", "logits_dtype": "float32", "hidden_positions": "all"},
    "sparse": {"hidden_dtype": "none", "tail_samples": 3, "logit_positions": "masked+0.5"},
    "draws alone": {"hidden_dtype": "none", "top_k": 0, "tail_samples": 5, "temperatures": ()},
    "wide ids": {"vocab_size": 70000, "hidden_positions": "all"},
    "mask-only": {"mask_only": True, "hidden_dtype": "none", "top_k": 0},
}  # fmt: skip


def read_everything(cache) -> None:
    """Every batch of every signal: no exception, and no index outside of what it points into."""
    encoding = cache.encoding
    for signal in signals_of(encoding):
        for restrict in (False, True):
            data = CachedBatches(
                cache, batch_size=5, seed=0, window_blocks=2, signal=signal, layers=(1,)
                if encoding.hidden else (), restrict_ce_to_mask=restrict,
            )  # fmt: skip
            for step in range(data.steps_per_epoch):
                check_indexes(data[step], encoding)


def check_indexes(batch, encoding) -> None:
    """Whatever points into something points to what is there."""
    size = batch["input_ids"].numel()
    tokens = [batch[n] for n in ("input_ids", "labels", "logit_ids", "tail_ids", "residual_ids")
              if n in batch]  # fmt: skip
    for ids in tokens:
        assert ((ids >= 0) & (ids < encoding.vocab_size)).all()
    for name in ("masked_index", "ce_index", "hidden_index"):
        if name in batch:
            index = batch[name]
            assert ((index >= 0) & (index < size)).all()
            assert (index.diff() > 0).all()
    if "ce_rows" in batch:
        assert (batch["hidden_index"][batch["ce_rows"]] == batch["ce_index"]).all()
    for name in ("ce_weight", "logit_ids", "logit_values", "log_odds", "tail_ids", "residual_ids"):
        assert name not in batch or len(batch[name]) == len(batch["ce_index"])


def read_or_refuse(read):
    """Columns, or None where there is a one-line word on what is wrong; nothing else."""
    try:
        return read()
    except UserError as error:
        text = str(error)
    assert text.startswith("cache: ")
    assert "must" in text
    assert "\n" not in text
    return None
