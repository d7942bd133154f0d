"""A model that transformers has opened: what its file lacked, and what has to be put right.

transformers fills what a file lacks with random numbers, and passes over what it does not know.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, require, tell

NEEDLESS = re.compile(
    r"(^|\.)(pooler|position_ids|token_type_ids|seq_relationship|sop_classifier|mask_predictions"
    r"|discriminator_predictions)(\.|$)"
)
"""Tensors that masked LMs are published with and do not need."""
TIED = ("luke",)
"""Types whose decoder is the word embeddings, which transformers 5 has forgotten."""
SHOWN = 4
"""Names in one line."""


def require_all(
    lost: list[str], unread: Iterable[str], kind: str, name: str | Path, where: str, code: str
) -> None:
    """Refuse a model without some of its weights, with a UserError.

    ``unread`` are tensors of the file that the model does not know; ``code`` is what is said of
    a model whose code lies beside it.
    """
    more = f" and {len(lost) - SHOWN} more" if lost[SHOWN:] else ""
    others = sorted(key for key in unread if not NEEDLESS.search(key))[:SHOWN]
    beside = f", and with {', '.join(others)}, which it does not read" if others else ""
    remedy = "use a checkpoint that was saved with them (they would be random)"
    require(
        not lost,
        f"{where} must hold a trained masked-LM head and all other weights of {kind}, got "
        f"{str(name)!r} without {', '.join(lost[:SHOWN])}{more}{beside}; {remedy}"
        f"{code and f'; also, {code}'}",
    )


def require_shapes(
    wrong: list[tuple[str, Any, Any]], name: str | Path, where: str, code: str
) -> None:
    """Refuse weights of other shapes, which would be random ones, too, with a UserError."""
    if wrong:
        tensor, there, asked = min(wrong)
        raise UserError(
            f"{where} must have tensors of the shapes that its config.json asks for, got "
            f"{str(name)!r} with {tensor} of {list(there)} in place of {list(asked)}; "
            f"correct its config.json, or download it again{code and f'; also, {code}'}"
        )


def note_untied(model: Any) -> None:
    """Let the configuration say that embeddings and decoder differ, where they do in the file.

    transformers then ties neither them nor the decoder's bias, whatever the configuration says. A
    student with the same configuration must not tie them either.
    """
    decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    own, shared = (getattr(part, "weight", None) for part in (decoder, embedding))
    usual = model._tied_weights_keys or {}
    is_tied = any(own is p and name in usual for name, p in model.named_parameters())
    if not model.config.tie_word_embeddings or not is_tied or shared is None or own is shared:
        return
    model.config.tie_word_embeddings = False
    for name, parameter in list(decoder.named_parameters(recurse=False)):
        copied = type(parameter)(parameter.detach().clone(), parameter.requires_grad)
        setattr(decoder, name, copied)


def read_in_one_language(model: Any, where: str, name: str | Path) -> None:
    """Let XLM's and FlauBERT's positions hold the language of the text, which no tokenizer gives.

    Without it the model would read text as of no language, which it never met in training.

    Raises:
        UserError: The model has no such language.
    """
    base, config = model.base_model, model.config
    languages = getattr(base, "lang_embeddings", None)
    if languages is None:
        return
    named = {index: repr(code) for code, index in (getattr(config, "lang2id", None) or {}).items()}
    require(
        0 <= config.lang_id < config.n_langs,
        f"{where} {str(name)!r} must have a lang_id below its n_langs, {config.n_langs}, got "
        f"{config.lang_id}; correct its config.json",
    )
    tell(
        f"{where} {str(name)!r} knows {config.n_langs} languages, and all text is read as of one: "
        f"{named.get(config.lang_id, config.lang_id)}; set lang_id in its config.json for another"
    )
    base.position_embeddings.weight.data.add_(languages.weight.data[config.lang_id])
    base.use_lang_emb = config.use_lang_emb = False
    del base.lang_embeddings


NORMS_FIRST = (
    "A FlauBERT with norms first (pre_norm): transformers 4 runs it, and transformers 5 by itself "
    "does not (seen up to 5.23)."
)
"""Said of such models where they are opened, and in their cards."""


class _NoCache:
    """In the place of a cache: it is empty, and has nothing for any layer."""

    def get_seq_length(self) -> int:
        return 0

    def __getitem__(self, layer: int) -> None:
        return None


def has_norms_first(config: Any) -> bool:
    """Whether it is a FlauBERT's with norms before the layers and not after them."""
    return config.model_type == "flaubert" and bool(getattr(config, "pre_norm", False))


def run_norms_first(model: Any) -> Any:
    """The model, where it is a FlauBERT with norms first so that it runs.

    That of transformers 5 takes each layer's part of a cache that has none, and always makes one.
    """
    if has_norms_first(model.config):
        tell(f"model: {NORMS_FIRST} It runs here, and so does what ONNX makes of it.")
        model.base_model.register_forward_pre_hook(_give_no_cache, with_kwargs=True)
    return model


def _give_no_cache(_: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**options, "cache": _NoCache()}


def passed_over(model: Any, names: set[str]) -> set[str]:
    """Parameters that are not in the file, and that transformers does not call missing."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return {
        name
        for name, _ in model.named_parameters()
        if name not in names and any(re.search(pattern, name) for pattern in patterns)
    }


def filled_by_tying(model: Any, names: set[str]) -> set[str]:
    """The decoder's weight, filled with the word embeddings where the file leaves it to them."""
    if model.config.model_type not in TIED or not model.config.tie_word_embeddings:
        return set()
    decoder = getattr(model.get_output_embeddings(), "weight", None)
    absent = {n for n, p in model.named_parameters() if p is decoder and n not in names}
    if decoder is not None and absent:
        decoder.data.copy_(model.get_input_embeddings().weight.data)
    return absent


def tell_left_out(kind: str, unexpected: Iterable[str], where: str, name: str | Path) -> None:
    """One line on tensors of the file that the model does not read."""
    counts = Counter(_part(key) for key in sorted(unexpected) if not NEEDLESS.search(key))
    if counts:
        shown = [f"{part} ({count})" for part, count in list(counts.items())[:SHOWN]]
        more = f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
        tell(
            f"{where} {str(name)!r} holds tensors that {kind} does not read: {', '.join(shown)}"
            f"{more}; if they belong to the model, correct its config.json"
        )


def _part(name: str) -> str:
    """What a tensor belongs to: adapters, a layer, or its module."""
    if re.search(r"adapter|lora_", name):
        return "adapters"
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return layer[0] if layer else name.rpartition(".")[0] or name


def tell_untrained(
    head: Iterable[tuple[str, Any]], vocab_size: int, where: str, name: str | Path
) -> None:
    """One line where norm and biases of the head are what they are before any training.

    Such a head comes from a checkpoint that was saved after its head had been filled at random.
    """
    inner = [(n, p) for n, p in head if p.ndim == 1 and len(p) != vocab_size]
    first = all(bool((p == (0 if n.endswith("bias") else 1)).all()) for n, p in inner)
    if first and any(n.endswith("weight") for n, _ in inner):
        tell(
            f"{where} {str(name)!r} has an LM head that looks untrained: its norm is exactly 1 and "
            "its biases are 0; use the checkpoint as it was first published"
        )
