"""Text to token ids, in any process: no transformers and no torch.

Legend: ``B`` documents, ``T`` tokens of all of them.
"""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from distilcache.data.corpus.packing import Array
from distilcache.data.errors import UserError, reason_of
from distilcache.stages.models.pieces import CutFirst
from distilcache.stages.models.tokenizer_kinds import merges_of

_HIDDEN = "\0"
"""Prefix of the names of role tokens while text is tokenised; no text file contains it."""

Tokens = tuple[Array, npt.NDArray[np.int64]]
"""Token ids of some documents, uint [T], and tokens per document, int64 [B]."""


def open_tokenizer(content: str, roles: Sequence[str]) -> Tokenizer:
    """A tokenizer for plain text: nothing is added, truncated or padded.

    A text that contains "[MASK]" must not put a mask token into the corpus, but an added token such
    as "[NUM]" stays one token. The library's ``encode_special_tokens`` splits both, and a Unigram
    or word-level model still finds "[MASK]" in its vocabulary. So tokens with a role get names that
    no text contains.

    Args:
        content: Content of a ``tokenizer.json``.
        roles: Tokens that are plain text within a text: mask, pad, cls, sep and the like.
    """
    state = json.loads(content)
    names = {role: _HIDDEN + role for role in roles}
    for token in state["added_tokens"]:
        if token["content"] in names:  # Normalisation could restore the old name.
            token |= {"content": names[token["content"]], "normalized": False}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [(names.get(token, token), score) for token, score in model["vocab"]]
    if model.get("merges"):  # Those of roles are of tokens that the vocabulary no longer has.
        within = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            (a, b) for a, b in merges_of(model) if names.keys().isdisjoint((a, b, a + b[within:]))
        ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    state["post_processor"] = state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


def tokenise(tokenizer: Tokenizer | CutFirst, documents: list[str], dtype: npt.DTypeLike) -> Tokens:
    """Token ids of some documents.

    Raises:
        UserError: The tokenizer has no token for something in them, and no unknown token.
    """
    try:
        found = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    except Exception as error:  # the library's own type is Exception
        raise UserError(
            "corpus: tokenizer must have a token for each word and letter of the text, or an "
            f"unknown token, got {reason_of(error)}; take other words out of the text, or use "
            "another tokenizer"
        ) from None
    ids = [np.array(encoding.ids, dtype=dtype) for encoding in found]
    return np.concatenate(ids), np.array([len(i) for i in ids], dtype=np.int64)
