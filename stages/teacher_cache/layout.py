"""What the blocks of a cache hold, from its settings and the size of its teacher."""

from dataclasses import replace

from distilcache.data.cache.schema import Encoding, HiddenEncoding, RelationEncoding
from distilcache.stages.teacher_cache.config import CacheConfig


def encoding_of(
    config: CacheConfig,
    *,
    vocab_size: int,
    max_length: int,
    pad_id: int,
    width: int,
    num_layers: int,
) -> Encoding:
    """The encoding before calibration: of coded hidden states the codecs are still missing.

    ``vocab_size`` is the number of logits of the teacher; of a mask-only cache that of the ids of
    the corpus.
    """
    plain = Encoding(vocab_size=vocab_size, max_length=max_length, pad_id=pad_id, mask_only=True)
    if config.mask_only:
        return plain
    layers = {num_layers if n == -1 else n for n in config.hidden_layers}
    stored = sorted(layers) if config.hidden_dtype != "none" else []
    relation = config.relation_layer
    return replace(
        plain,
        mask_only=False,
        hidden_positions=config.positions,
        logit_positions=config.logit_positions or config.positions,
        temperatures=tuple(t for t in config.temperatures if t != 1.0),
        top_k=min(config.top_k, vocab_size),
        top_p=config.top_p if config.top_k else 1.0,
        tail_samples=config.tail_samples,
        residual_samples=config.residual_samples,
        logits_dtype=config.logits_dtype,
        hidden=tuple(
            HiddenEncoding(layer=n, width=width, dtype=config.hidden_dtype) for n in stored
        ),
        num_layers=num_layers,
        relation=RelationEncoding(
            layer=relation + num_layers + 1 if relation < 0 else relation,
            width=width,
            dtype=config.hidden_dtype if stored else "coded",
        )
        if relation
        else None,
    )
