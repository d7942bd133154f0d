"""Tokenizers that cut text by Python code: Japanese words by MeCab, PhoBERT's and XLM's pieces.

No ``tokenizer.json`` can hold such code. Here the code cuts a text into pieces, and a fast
tokenizer gives these their ids: of one kind with all others to whatever asks for ids, special
tokens or text.
"""

import copy
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_python import Trie

from distilcache.stages.models.pieces import SEPARATOR, UNKNOWN

WORD_END, WITHIN_WORD, METASPACE = "</w>", "@@", "\u2581"
"""How vocabularies mark a piece that ends a word, does not end it, or begins it."""
_ROLES = ("unk", "bos", "eos", "sep", "cls", "pad", "mask")


class PieceTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
    """A fast tokenizer of the pieces that a slow one, the code, makes of a text.

    Ids are those of the slow one; of two texts that are cut to an odd number of tokens the last one
    goes to the second, as in all fast tokenizers. Places in the text (``offsets``) count characters
    of the pieces.

    Args:
        slow: A tokenizer of transformers that is written in Python, or cuts words by Python as
            RoFormer's does.
    """

    def __init__(self, slow: PreTrainedTokenizer) -> None:
        self.slow = slow
        self.pieces = cutter(slow)
        super().__init__(
            tokenizer_object=_backend(slow),
            name_or_path=slow.name_or_path,
            model_max_length=slow.model_max_length,
            model_input_names=slow.model_input_names,
            padding_side=slow.padding_side,
            truncation_side=slow.truncation_side,
            extra_special_tokens=list(slow.extra_special_tokens),
            **{f"{role}_token": getattr(slow, f"{role}_token") for role in _ROLES},
        )

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        pair = None if text_pair is None else self._cut(text_pair)
        return super()._encode_plus(self._cut(text), pair, **options)

    def _cut(self, text: Any) -> Any:
        """A text, or texts in lists and tuples."""
        return self.pieces(text) if isinstance(text, str) else type(text)(map(self._cut, text))

    def save_pretrained(self, save_directory: Any, **options: Any) -> tuple[str, ...]:
        """Save the slow tokenizer's files, which plain transformers opens."""
        self.slow.init_kwargs["model_input_names"] = self.model_input_names
        saved: tuple[str, ...] = self.slow.save_pretrained(save_directory, **options)
        if self.slow.is_fast:
            self.slow.save_vocabulary(str(save_directory))
        for role, name in self.slow.vocab_files_names.items():
            if read := getattr(self.slow, role, None):
                # As it was read: BERTweet's class writes merges that it cannot read.
                shutil.copyfile(read, Path(save_directory) / name)
        return saved


def cutter(slow: PreTrainedTokenizer, roles: Iterable[str] = ()) -> Callable[[str], str]:
    """A function from a text to its pieces, with ``SEPARATOR`` between them.

    Args:
        slow: The tokenizer.
        roles: Special tokens that are plain text in a text.
    """
    known = slow.get_vocab().keys() - set(roles)
    if not slow.is_fast:
        slow = copy.copy(slow)
        slow.tokens_trie = Trie()
        for token in slow.added_tokens_encoder.keys() & known:
            slow.tokens_trie.add(token)

    def pieces(text: str) -> str:
        found = slow.tokenize(text)
        return SEPARATOR.join(piece if piece in known else UNKNOWN for piece in found)

    return pieces


def _backend(slow: PreTrainedTokenizer) -> Tokenizer:
    """Ids of pieces, and text of ids."""
    vocab = slow.get_vocab()
    backend = Tokenizer(models.WordLevel(vocab, unk_token=slow.unk_token))
    if slow.is_fast or getattr(slow, "subword_tokenizer_type", "") == "wordpiece":
        # A piece is in the vocabulary and stays whole; masks know by the prefix what is a word.
        backend.model = models.WordPiece(vocab, unk_token=slow.unk_token)
        backend.decoder = decoders.WordPiece(cleanup=False)
    elif any(token.endswith(WORD_END) for token in vocab):
        backend.decoder = decoders.BPEDecoder(suffix=WORD_END)
    elif any(token.startswith(METASPACE) for token in vocab):
        backend.decoder = decoders.Metaspace()
    backend.pre_tokenizer = pre_tokenizers.Split(SEPARATOR, "removed")
    backend.post_processor = _around(slow)
    added = (token for _, token in sorted(slow.added_tokens_decoder.items()))
    for token in added:
        plain = AddedToken(token.content, special=token.special, normalized=False)
        (backend.add_special_tokens if token.special else backend.add_tokens)([plain])
    return backend


def _around(slow: PreTrainedTokenizer) -> processors.TemplateProcessing:
    """What the slow tokenizer puts around a text and around two, with token types."""
    texts: tuple[list[int], ...] = ([-1], [-2])
    names = {-1: "$A", -2: "$B"}
    templates = []
    for given in (texts[:1], texts):
        ids = slow.build_inputs_with_special_tokens(*given)
        types = slow.create_token_type_ids_from_sequences(*given)
        names |= {i: slow.convert_ids_to_tokens(i) for i in ids if i >= 0}
        templates.append([f"{names[i]}:{kind}" for i, kind in zip(ids, types, strict=True)])
    special = [(token, i) for i, token in names.items() if i >= 0]
    return processors.TemplateProcessing(
        single=templates[0], pair=templates[1], special_tokens=special
    )
