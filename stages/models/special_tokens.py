"""Tokens with a role: which open and close a sequence, and which are no tokens of a text."""

import tokenizers
from transformers import PreTrainedTokenizerFast

from distilcache.data.errors import require


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of pad, cls, sep, mask and unk.

    cls opens a sequence and sep closes it, under whatever names. unk is -1 where the tokenizer has
    none, and sep where its own sequences are not closed.

    Raises:
        UserError: The tokenizer lacks one of the first four: it is no masked-LM tokenizer.
    """
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "mask", "unk")}
    ids["cls"], ids["sep"] = _ends(tokenizer)
    missing = [f"{n}_token" for n in ("pad", "cls", "sep", "mask") if ids[n] is None]
    require(
        not missing,
        f"corpus: tokenizer must have mask, cls, sep and pad tokens, got one without "
        f"{', '.join(missing)}; name them in its tokenizer_config.json, or use the tokenizer "
        "of a masked language model",
    )
    return {name: -1 if value is None else int(value) for name, value in ids.items()}


def _ends(tokenizer: PreTrainedTokenizerFast) -> tuple[int | None, int | None]:
    """Ids that open and close a sequence of the tokenizer's own; -1: nothing closes it.

    They need not be those named cls and sep. These, else bos and eos, are taken where it adds
    none itself, or another number.
    """
    before, after = _around(tokenizer)
    if len(before) == len(after) == 1:
        return before[0], after[0]
    if puts_cls_last(tokenizer):
        return after[1], after[0]
    cls, sep = (
        first if first is not None else other
        for first, other in (
            (tokenizer.cls_token_id, tokenizer.bos_token_id),
            (tokenizer.sep_token_id, tokenizer.eos_token_id),
        )
    )
    return cls, (-1 if sep is None and len(before) == 1 and not after else sep)


def closing_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many tokens close a sequence of a corpus: one, two as in XLNet's, or none."""
    return 2 if puts_cls_last(tokenizer) else int(special_ids(tokenizer)["sep"] >= 0)


def _around(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text, whatever the text is."""
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return [], []
    word = tokenizers.models.WordLevel({"word": 0}, unk_token="word")
    found = processor.process(tokenizers.Tokenizer(word).encode("word"))
    place = found.special_tokens_mask.index(0)
    return found.ids[:place], found.ids[place + 1 :]


def puts_between(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts a token between two texts."""
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return False
    word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0}, unk_token="word"))
    found = processor.process(word.encode("word"), word.encode("word"))
    first, second = (n for n, special in enumerate(found.special_tokens_mask) if not special)
    return second > first + 1


def role_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Tokens that stand for something beside the text: written in a text, they are text.

    All others that were added to a vocabulary, as ``[NUM]`` or ``<url>``, are tokens of the text.
    """
    roles = ("pad", "cls", "sep", "mask", "unk", "bos", "eos")
    found = {getattr(tokenizer, f"{role}_token") for role in roles}
    found |= set(tokenizer.convert_ids_to_tokens(sum(_around(tokenizer), [])))
    return tuple(sorted(str(token) for token in found if token is not None))


def never_masked(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids of all special tokens, ascending; other added tokens are ordinary ones.

    Special is also what the tokenizer puts around a text, whether it is marked so or not.
    """
    added = tokenizer.added_tokens_decoder.items()
    marked = {index for index, token in added if token.special}
    return tuple(sorted(marked.union(tokenizer.all_special_ids, *_around(tokenizer))))


def puts_cls_last(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer's own sequences are ``... <sep> <cls>``, as XLNet's are.

    In those of mBART-25 the code of a language stands there.
    """
    before, after = _around(tokenizer)
    return not before and len(after) == 2
