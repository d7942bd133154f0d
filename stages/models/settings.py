"""What the configuration of a masked LM must say, and what in it is put right. No torch here."""

from collections.abc import Collection
from typing import Any

from distilcache.data.errors import require
from distilcache.stages.models.families import family_of


def check_settings(config: Any, where: str) -> None:
    """Refuse settings with which a masked LM is none, or takes other inputs than text."""
    positions = str(getattr(config, "position_embedding_type", None) or "absolute")
    require(
        not positions.startswith("relative_key"),
        f"{where} must have absolute positions, got position_embedding_type {positions!r}, which "
        "transformers 5 leaves out: its outputs would be wrong; use another checkpoint",
    )
    pad = getattr(config, "pad_token_id", None)
    require(
        not family_of(config).positions_from_pad
        or (pad is not None and 0 <= pad < config.vocab_size),
        f"{where} must have a pad_token_id in its vocabulary, since positions are counted from it, "
        f"got {pad}; correct its config.json",
    )
    require(
        config.num_hidden_layers >= 1,
        f"{where} must have a layer at least, got num_hidden_layers 0",
    )
    for name in ("is_decoder", "add_cross_attention"):
        require(
            not getattr(config, name, False),
            f"{where} must see the text on both sides of a token and no other, got {name} true; "
            "set it to false in its config.json if it was trained with masks",
        )
    require(
        config.model_type != "nystromformer"
        or config.num_landmarks == config.segment_means_seq_len,
        f"{where} must take sequences of any length, got num_landmarks other than "
        "segment_means_seq_len, which takes those of the latter alone; use a checkpoint where both "
        "are one number",
    )


def put_right(config: Any, names: Collection[str]) -> None:
    """Take out requests for other outputs, and fill in what the checkpoint does not say.

    ``names`` are those of its tensors.
    """
    # What a model returns beside its states is asked for at each call.
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    vars(config).pop("model_name", None)  # by it, transformers takes another tokenizer's class
    if config.model_type == "modernbert":
        _fill_local_theta(config)
    if config.model_type in ("deberta", "deberta-v2"):
        own, of_bert = (
            any(n.startswith(prefix) for n in names)
            for prefix in ("lm_predictions.", "cls.predictions.")
        )
        if own != of_bert:  # Left to itself, transformers fills a head of BERT's kind at random.
            config.legacy = of_bert


def _fill_local_theta(config: Any) -> None:
    """Of a ModernBERT whose ``local_rope_theta`` is null: that meant the global one."""
    rope = config.rope_parameters or {}
    near, far = (rope.get(f"{kind}_attention") for kind in ("sliding", "full"))
    if near and far and near.get("rope_theta") is None:
        near["rope_theta"] = far.get("rope_theta")
