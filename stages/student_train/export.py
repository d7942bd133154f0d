"""The finished student in plain Hugging Face format, with a model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distilcache.data.errors import UserError
from distilcache.data.storage.files import hashes_of, read_json, write_bytes, write_json
from distilcache.stages.models.cards import PLACE, card, usage, without_folders
from distilcache.stages.models.encoder import model_class
from distilcache.stages.models.families import family_of, max_length, shape_of
from distilcache.stages.models.opened import NORMS_FIRST, has_norms_first
from distilcache.stages.models.pieces import takes_pieces
from distilcache.stages.models.saving import (
    TOKENIZER,
    config_json,
    with_first_names,
    write_weights,
)
from distilcache.stages.models.tokenizers import load_tokenizer
from distilcache.stages.models.trimmed_ids import TrimmedIds, read_tokenizer
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.weights import config_in

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """What the model card says."""

    name: str
    """Such as ``3x384``."""
    role: str
    """``student``, ``control`` or ``teacher``."""
    cache_fingerprint: str
    train: TrainConfig
    settings: Mapping[str, Any]
    """The recipe, or the sections of it that this run has used."""
    figures: Mapping[str, Any]
    """Steps, seconds, tokens/s, final loss terms."""
    teachers: int = 1
    """How many were averaged in the cache."""
    max_length: int | None = None
    """Tokens of the longest sequence of the cache; None: not said."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What the cache says of teacher and text, see ``recorded_origin``."""


def export_model(
    student: PreTrainedModel,
    *,
    tokenizer_dir: Path,
    out: Path,
    facts: CardFacts,
    trimmed: TrimmedIds | None = None,
) -> dict[str, str]:
    """Write weights, configuration, tokenizer and model card to ``out``.

    Each file is whole or absent. ``config.json`` is written last: without it nothing opens the
    folder as a model.

    Args:
        student: The model.
        tokenizer_dir: Folder of the tokenizer, and of the teacher's configuration if there is one.
        out: An existing folder.
        facts: For the card.
        trimmed: The student's ids, where it has fewer than its teacher.

    Returns:
        SHA-256 of each file that a program reads; people may edit the card.

    Raises:
        UserError: The tokenizer is not there, or the disk is full.
    """
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise UserError(
            f"train: {tokenizer_dir} must hold tokenizer.json, got none; make the cache again"
        )
    config = student.config
    copied = [name for name in TOKENIZER_FILES if (tokenizer_dir / name).is_file()]
    if takes_pieces(read_tokenizer(tokenizer_dir)):
        copied.remove("tokenizer.json")  # Others would read text with it, and find no word.
    settings = tokenizer_config(tokenizer_dir, config)
    if trimmed is not None:
        copied = ["tokenizer.json"]  # the other files hold the same once more
        write_json(out / "tokenizer.json", trimmed.own)
        settings = renumbered(settings, trimmed)
    else:
        for name in copied:
            write_bytes(out / name, (tokenizer_dir / name).read_bytes())
    write_json(out / TOKENIZER, with_first_names(settings))
    write_weights(student, out)
    parameters = sum(p.numel() for p in student.parameters())
    example = facts.origin.get("example") or example_of(load_tokenizer(str(tokenizer_dir)))
    page = model_card(facts, config, parameters, config_in(tokenizer_dir), example)
    write_bytes(out / "README.md", page.encode())
    write_bytes(out / "config.json", config_json(student))
    made = (TOKENIZER, "model.safetensors", "config.json")
    return hashes_of(out, (*copied, *made))


def tokenizer_config(tokenizer_dir: Path, config: Any) -> dict[str, Any]:
    """The tokenizer's settings with the model's longest input; no token types for a DistilBERT."""
    path = tokenizer_dir / TOKENIZER
    values: dict[str, Any] = read_json(path, "train: tokenizer") if path.is_file() else {}
    if config.model_type == "distilbert":
        values["model_input_names"] = ["input_ids", "attention_mask"]
    longest = max_length(config)
    if longest is not None:
        values["model_max_length"] = min(int(values.get("model_max_length") or longest), longest)
    return values


def renumbered(settings: Mapping[str, Any], trimmed: TrimmedIds) -> dict[str, Any]:
    """A tokenizer's settings with the student's ids of its added tokens."""
    added = settings.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return dict(settings)
    new = {str(trimmed.new_V[int(old)]): token for old, token in added.items()}
    return {**settings, "added_tokens_decoder": new}


def model_card(facts: CardFacts, config: Any, parameters: int, teacher: Any, example: str) -> str:
    """README.md: what the model is, how it was made, how to load it.

    ``config`` is the model's, ``teacher`` the teacher's (None where there is none), ``example`` a
    text with a mask.
    """
    lines = [
        f"# {facts.name} ({facts.role})",
        "",
        _summary(facts, config, teacher),
        "",
        f"{_shape(config, facts)}; {parameters:,} parameters.",
        "",
        "## Use",
        "",
        "```python",
        *_usage(config, example),
        "```",
        *(["", NORMS_FIRST] if has_norms_first(config) else []),
        "",
        "## Training",
        "",
        f"Loss: {loss_words(facts.train)}",
        "",
        f"Cache fingerprint: `{facts.cache_fingerprint}`",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {_format(value)} |" for name, value in facts.figures.items()),
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(without_folders(facts.settings), indent=1, sort_keys=True, default=str),
        "```",
        "",
    ]
    tags = (config.model_type, "masked-lm", facts.role)
    return str(card("\n".join(lines), pipeline_tag="fill-mask", tags=tags, origin=facts.origin))


def _shape(config: Any, facts: CardFacts) -> str:
    shape = shape_of(config)
    longest, seen = max_length(config), facts.max_length
    reach = f"up to {longest} tokens" if longest is not None else "any number of tokens"
    if seen is not None and longest != seen:
        reach += f", trained on sequences of up to {seen}"
    return (
        f"{shape.layers} layers x {shape.width}, {shape.heads} heads, feed-forward {shape.ffn}, "
        f"vocabulary {config.vocab_size:,}, {reach}"
    )


def example_of(tokenizer: Any) -> str:
    """A line of tokens of the tokenizer's own, with a mask: for caches without held-out text.

    Never text that the model was trained on: a card is often published.
    """
    special = set(tokenizer.all_special_ids)
    some = range(0, len(tokenizer), max(1, len(tokenizer) // 1000))
    texts = {token: tokenizer.decode([token]).strip() for token in some}
    plain = [token for token, text in texts.items() if token not in special and text.isalnum()]
    chosen = plain[:: max(1, len(plain) // 8)][:8]
    left, right = tokenizer.decode(chosen[:4]), tokenizer.decode(chosen[4:])
    return f"{left.strip()} {tokenizer.mask_token} {right.strip()}"


def _usage(config: Any, example: str) -> list[str]:
    """How to load the model; the fill-mask pipeline does not support XLNet's masks."""
    if family_of(config).mask == "permutation":
        return usage(model_class(config).__name__)
    return [
        "from transformers import pipeline",
        "",
        f'fill = pipeline("fill-mask", model="{PLACE}")',
        f"fill({json.dumps(example, ensure_ascii=False)})",
    ]


def _summary(facts: CardFacts, config: Any, teacher: Any) -> str:
    if not facts.train.has_teacher:
        made = "trained by masked language modelling"
    else:
        several = facts.teachers > 1
        who = f"{facts.teachers} teachers, averaged, the first" if several else "a teacher"
        made = f"distilled from the cached signals of {who}{_teacher(teacher)}"
    purpose = {
        "control": " It is the control: the same student, first weights, data and steps, without "
        "the teacher's signals.",
        "teacher": " It was made to be the teacher of smaller models.",
    }
    kind = _kind(config)
    article = "An" if kind[0] in "AEX" else "A"
    return (
        f"{article} {kind} masked language model, {made} with distilcache."
        f"{purpose.get(facts.role, '')}"
    )


def _teacher(config: Any) -> str:
    """Such as `` (BERT, 6 layers x 384)``; nothing where the cache holds no teacher."""
    if config is None:
        return ""
    shape = shape_of(config)
    return f" ({_kind(config)}, {shape.layers} layers x {shape.width})"


def _kind(config: Any) -> str:
    """Such as ``DistilBERT``."""
    return type(config).__name__.removesuffix("Config").replace("Bert", "BERT")


def loss_words(train: TrainConfig) -> str:
    """The loss as the weighted sum of its terms, and what they are."""
    words = {
        "ce": f"T^2 KL to the teacher, T = {train.temperature:g}, {train.signal}",
        "mlm": "cross-entropy at masked positions",
        "cos": "1 - cosine of the last hidden states",
        "mse": "squared errors of the logits, summed",
        "rel": "KL of relations of queries, keys and values",
    }
    alphas = {term: getattr(train, f"alpha_{term}") for term in words}
    return (
        " + ".join(f"{a:g} L_{term} ({words[term]})" for term, a in alphas.items() if a > 0) + "."
    )


def _format(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
