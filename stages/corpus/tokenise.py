"""Text to token ids, in any process: no transformers and no torch.

Legend: ``B`` documents, ``T`` tokens of all of them.
"""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from distilcache.data.corpus.packing import Array

PIECE_CHARS = 1 << 19
"""Text per call of the tokenizer: its encodings take some 30 times the memory of the text."""
_HIDDEN = "\0"
"""What the name of a role's token begins with while text is encoded: no text file holds it."""

Tokens = tuple[Array, npt.NDArray[np.int64]]
"""Token ids of some documents, uint [T], and their numbers, int64 [B]."""


def open_tokenizer(content: str, roles: Sequence[str]) -> Tokenizer:
    """A tokenizer as it cuts plain text: nothing added, cut off or padded.

    A text that speaks of "[MASK]" must not put a mask into the corpus, while a tokenizer's own
    "[NUM]" is a token there as everywhere. The library's ``encode_special_tokens`` cuts both, and
    lets a Unigram or word-level model find "[MASK]" again among its pieces. So tokens that have a
    role get names that no text has.

    Args:
        content: Of a ``tokenizer.json``.
        roles: Tokens that are text where a text holds them: mask, pad, cls, sep and their like.
    """
    state = json.loads(content)
    names = {role: _HIDDEN + role for role in roles}
    for token in state["added_tokens"]:
        if token["content"] in names:  # normalized, the name might become the old one
            token |= {"content": names[token["content"]], "normalized": False}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [(names.get(token, token), score) for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    state["post_processor"] = state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


def tokenise(tokenizer: Tokenizer, documents: list[str], dtype: npt.DTypeLike) -> Tokens:
    """Token ids of one piece's documents."""
    found = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype=dtype) for encoding in found]
    return np.concatenate(ids), np.array([len(i) for i in ids], dtype=np.int64)


def cut_pieces(documents: list[str]) -> Iterator[list[str]]:
    """Stretches of about ``PIECE_CHARS`` characters, none empty."""
    piece: list[str] = []
    size = 0
    for document in documents:
        piece.append(document)
        size += len(document)
        if size >= PIECE_CHARS:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def utf8_bytes(documents: list[str]) -> int:
    """Bytes of some text."""
    return sum(len(text.encode()) for text in documents)
