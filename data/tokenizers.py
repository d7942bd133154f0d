"""Fast tokenizers: load, identify, save, and train a small WordPiece one."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from data.errors import UserError, require

BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In the order of their ids, 0 to 4."""
TRAINED_MAX_LENGTH = 512
"""``model_max_length`` of a trained tokenizer: BERT's."""
MAX_ALPHABET = 1000
"""Characters a trained vocabulary keeps at most: the limit BERT's vocabulary was made with."""
MIN_ALPHABET = 64
"""Characters a trained vocabulary may always keep: letters, digits, punctuation."""
HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_tokenizer(path_or_hub_id: str, needs: str = "") -> PreTrainedTokenizerFast:
    """Open a fast tokenizer from a folder or the Hugging Face hub.

    Args:
        path_or_hub_id: Folder with a tokenizer, or a hub id.
        needs: What the recipe says must be at hand; appended where the folder is missing.

    Raises:
        UserError: The folder or hub id cannot be read, or holds no fast tokenizer.
    """
    suffix = f"; {needs}" if needs else ""
    path = Path(path_or_hub_id)
    if path.exists():
        local = True
    else:
        require(
            _HUB_ID.fullmatch(path_or_hub_id) is not None,
            f"corpus: tokenizer must be an existing folder or a hub id, got {path_or_hub_id!r}"
            f"{suffix or '; pass the path of a folder with tokenizer.json'}",
        )
        local = not hub_answers(path_or_hub_id)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path_or_hub_id, local_files_only=local)
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError and its parsers' own types here.
        reason = " ".join(str(error).split())[:200]
        if path.exists():
            raise UserError(
                f"corpus: tokenizer must be a folder with a fast tokenizer, got "
                f"{path_or_hub_id!r} ({reason}); it needs tokenizer.json or vocab.txt"
            ) from None
        raise UserError(
            f"corpus: tokenizer must be a hub id that can be reached, got {path_or_hub_id!r}; "
            f"pass the path of a local folder instead, or connect to the hub{suffix}"
        ) from None
    require(
        getattr(tokenizer, "backend_tokenizer", None) is not None,
        f"corpus: tokenizer must be a fast one, got {type(tokenizer).__name__} from "
        f"{path_or_hub_id!r}; convert it to tokenizer.json",
    )
    for key in ("is_local", "local_files_only"):  # how it was opened is no part of what it is
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def hub_answers(hub_id: str) -> bool:
    """Ask the hub once whether it has this id.

    transformers' own retries take most of a minute to give up.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S)
    except Exception:  # No network, offline mode, no such id: the local copy is all there is.
        return False
    return True


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the tokenizer's model and vocabulary, whatever its truncation and padding."""
    return _fingerprint(tokenizer.backend_tokenizer.to_str())


def saved_fingerprint(path: Path) -> str:
    """:func:`tokenizer_fingerprint` of a ``tokenizer.json``; "no tokenizer" where it is none."""
    try:
        return _fingerprint(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return "no tokenizer"


def _fingerprint(text: str) -> str:
    state = json.loads(text)
    state["truncation"] = state["padding"] = None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest token id, added tokens included."""
    return 1 + max(int(i) for i in tokenizer.get_vocab().values())


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of pad, cls, sep, mask and unk; unk is -1 where the tokenizer has none.

    Raises:
        UserError: The tokenizer lacks one of the first four: it is no masked-LM tokenizer.
    """
    ids = {n: getattr(tokenizer, f"{n}_token_id") for n in ("pad", "cls", "sep", "mask", "unk")}
    missing = [f"{n}_token" for n in ("pad", "cls", "sep", "mask") if ids[n] is None]
    require(
        not missing,
        f"corpus: tokenizer must have mask, cls, sep and pad tokens, got one without "
        f"{', '.join(missing)}; use the tokenizer of a masked language model",
    )
    return {name: -1 if value is None else int(value) for name, value in ids.items()}


def role_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Tokens that stand for something beside the text: written in a text, they are text.

    All others that were added to a vocabulary, as ``[NUM]`` or ``<url>``, are tokens of the text.
    """
    roles = ("pad", "cls", "sep", "mask", "unk", "bos", "eos")
    found = {getattr(tokenizer, f"{role}_token") for role in roles}
    return tuple(sorted(str(token) for token in found if token is not None))


def never_masked(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids of all special tokens, ascending; other added tokens are ordinary ones."""
    added = tokenizer.added_tokens_decoder.items()
    marked = {index for index, token in added if token.special}
    return tuple(sorted(marked.union(tokenizer.all_special_ids)))


def puts_cls_last(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer's own sequences are ``... <sep> <cls>``, as XLNet's are."""
    around = tokenizer.backend_tokenizer.encode("").ids
    places = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep")}
    if not set(places.values()) <= set(around):
        return False  # it adds none itself
    return int(around.index(places["cls"])) > int(around.index(places["sep"]))


def train_wordpiece(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing BERT tokenizer; the same documents give the same vocabulary.

    The library's trainer numbers the ``##x`` characters in hash order and breaks ties between
    merges by those numbers, so two runs differ. Handing it the whole alphabet in sorted order
    (the ``##x`` as special tokens) leaves nothing to hash order.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(tokenizer.normalizer.normalize_str(document))
    ranked = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(ranked[: min(MAX_ALPHABET, max(MIN_ALPHABET, vocab_size // 32))])
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    inner = [f"##{c}" for c in alphabet if len(split(f"a{c}")) == 1]  # no punctuation
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT_SPECIAL_TOKENS, *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ids = dict(zip((token for token, _ in vocabulary), itertools.count(), strict=False))
    trained = BertTokenizer(vocab=ids, do_lower_case=True, model_max_length=TRAINED_MAX_LENGTH)
    return trained
