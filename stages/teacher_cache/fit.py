"""Does a teacher fit its corpus and the settings? Answered from its configuration, without torch.

The same rules check it against a recipe before the text is read, and against the finished corpus
before stage one begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from distilcache.data.errors import require, tell
from distilcache.stages.models.checkpoints import check_head, open_config
from distilcache.stages.models.families import family_of, has_relations, max_length, shape_of
from distilcache.stages.models.special_tokens import special_ids
from distilcache.stages.models.tokenizers import (
    find_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from distilcache.stages.teacher_cache.config import CacheConfig

WHERE = "teacher: model"
"""Start of errors about its checkpoint."""
PASS_A_PATH = "pass --set teacher.model=PATH"
_ANEW = ", and give the project another name if its corpus is made already"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a teacher must have in common with a corpus."""

    tokenizer_sha256: str
    vocab_size: int
    special_ids: Mapping[str, int]


def teacher_config(name: str, revision: str, needs: str) -> Any:
    """The configuration of a teacher's checkpoint, once that is known to hold an LM head.

    Raises:
        UserError: See :func:`open_config`; or it has no LM head.
    """
    config = open_config(name, where=WHERE, revision=revision, needs=needs or PASS_A_PATH)
    check_head(config, name, where=WHERE, revision=revision)
    return config


def check_before_text(
    teachers: Sequence[tuple[str, str]],
    tokenizer: str,
    longest: int,
    even: bool,
    config: CacheConfig,
    *,
    tokenizer_revision: str,
    needs: str,
) -> Any:
    """Check teachers against a recipe, before anything is read or written.

    Args:
        teachers: Folders or hub ids, and revisions of these; several are averaged.
        tokenizer: Folder or hub id of the corpus's tokenizer.
        longest: Tokens per sequence of the corpus.
        even: All sequences are of that length.
        config: What is stored.
        tokenizer_revision: Of the tokenizer on the hub.
        needs: What the recipe says must be at hand, for errors.

    Returns:
        The first one's configuration.

    Raises:
        UserError: One cannot be found or opened, has no LM head, or does not fit.
    """
    configs = []
    for name, revision in teachers:
        found = teacher_config(name, revision, needs)
        check_settings(found, longest, even, config)
        configs.append(found)
    rows = {name: found.vocab_size for (name, _), found in zip(teachers, configs, strict=True)}
    check_one_vocabulary(rows)
    of_corpus = load_tokenizer(tokenizer, needs, revision=tokenizer_revision)
    wanted = Wanted(
        tokenizer_sha256=tokenizer_fingerprint(of_corpus),
        vocab_size=vocabulary_size(of_corpus),
        special_ids=special_ids(of_corpus),
    )
    for named in teachers:
        same = named == (tokenizer, tokenizer_revision)
        its = of_corpus if same else tokenizer_of(*named)
        check_tokenizer(its, named[0], rows[named[0]], wanted)
    return configs[0]


def check_one_vocabulary(sizes: Mapping[str, int]) -> None:
    """Require that teachers that are averaged have equally many logits (rows of the embedding)."""
    first = next(iter(sizes))
    for name, size in sizes.items():
        require(
            size == sizes[first],
            f"teacher: ensemble must be of models with one vocabulary, got {sizes[first]} tokens "
            f"in {first!r} and {size} in {name!r}; use checkpoints with the same tokenizer",
        )


def tokenizer_of(name: str, revision: str) -> PreTrainedTokenizerFast | None:
    """A teacher's own tokenizer; None where its folder has none."""
    return find_tokenizer(name, where="teacher: tokenizer", revision=revision)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast | None, name: str, rows: int, wanted: Wanted
) -> None:
    """Require that the ids of the corpus are those that the teacher was trained on.

    Args:
        tokenizer: The teacher's own; None: it has none, and is taken to use the corpus's.
        name: The teacher's folder or hub id.
        rows: Rows of its embedding; there may be more of them than ids.
        wanted: Of the corpus.
    """
    ids = wanted.vocab_size if tokenizer is None else vocabulary_size(tokenizer)
    require(
        ids <= rows,
        f"teacher: tokenizer must have at most the model's {rows} ids, got {ids} in {name!r}; use "
        "the tokenizer that the model was trained with",
    )
    if tokenizer is None:
        tell(
            f"teacher: {name} has no tokenizer of its own; it is taken to be trained with that of "
            "the corpus"
        )
        return
    found = tokenizer_fingerprint(tokenizer)
    require(
        found == wanted.tokenizer_sha256,
        f"teacher: tokenizer must be the one the corpus was made with (sha256 "
        f"{wanted.tokenizer_sha256[:16]}), got {found[:16]} ({ids} ids against "
        f"{wanted.vocab_size}) from {name!r}; set corpus.tokenizer={name}{_ANEW}",
    )
    roles = special_ids(tokenizer)
    require(
        roles == wanted.special_ids,
        f"teacher: tokenizer must have the special ids that the corpus was made with "
        f"({wanted.special_ids}), got {roles} from {name!r}; set corpus.tokenizer={name}"
        f"{_ANEW}",
    )


def check_settings(model: Any, longest: int, even: bool, config: CacheConfig) -> None:
    """Require that lengths, positions and layers fit a teacher of the configuration ``model``.

    ``longest`` is the number of tokens per sequence of the corpus; ``even``: all have that length.
    """
    family = family_of(model, WHERE)
    limit = max_length(model)
    require(
        limit is None or longest <= limit,
        f"corpus: max_length must be at most the teacher's {limit} positions, got "
        f"{longest}; set corpus.max_length={limit} or smaller{_ANEW}",
    )
    require(
        even or not family.even,
        f"corpus: packing must be 'blocks' for a teacher of type {model.model_type!r} "
        f"({family.even}), got shorter sequences; set corpus.packing=blocks{_ANEW}",
    )
    policies = {"positions": config.positions, "logit_positions": config.logit_positions}
    for name, policy in policies.items():
        require(
            family.mask != "permutation" or policy in ("", "masked"),
            f"cache: {name} must be 'masked' for a teacher of type "
            f"{model.model_type!r}, got {policy!r}; it predicts masked positions alone",
        )
    layers = shape_of(model).layers
    bad = [n for n in config.hidden_layers if not -1 <= n <= layers]
    require(
        not bad,
        f"cache: hidden_layers must lie between 0 and {layers} (or -1: the last), got {bad}",
    )
    require(
        -layers <= config.relation_layer <= layers,
        f"cache: relation_layer must lie between 1 and {layers} (or -{layers} and -1; 0: none), "
        f"got {config.relation_layer}",
    )
    require(
        config.relation_layer == 0 or has_relations(model),
        f"cache: relation_layer must be 0 for a model of type {model.model_type!r}, whose queries, "
        "keys and values are no linear maps, of its width, of what the layer reads",
    )
    require(
        not config.residual_samples or not {-1, layers}.isdisjoint(config.hidden_layers),
        "cache: hidden_layers must hold the last layer (-1) where residual_samples is above 0, "
        f"got {list(config.hidden_layers)}; residuals are the error of the replay from it",
    )
    require(
        config.top_k > 0
        or config.tail_samples > 0
        or config.hidden_dtype != "none"
        or config.relation_layer != 0,
        "cache: top_k, tail_samples or hidden_dtype must store something, got 0, 0 and 'none'; set "
        "one of them, or cache.mask_only = true",
    )
