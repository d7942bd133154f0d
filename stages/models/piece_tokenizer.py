"""Tokenizers that cut text by Python code: Japanese words by MeCab, PhoBERT's and XLM's pieces.

No ``tokenizer.json`` can hold such code. Here the code cuts a text into pieces, and a fast
tokenizer gives these their ids: of one kind with all others to whatever asks for ids, special
tokens or text.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_python import Trie
from transformers.tokenization_utils_base import TruncationStrategy

from distilcache.data.corpus.words import METASPACE, WORD_END
from distilcache.data.errors import require
from distilcache.stages.models.pieces import SEPARATOR, UNKNOWN
from distilcache.stages.models.tokenizer_files import TokenizerFiles

_ROLES = ("unk", "bos", "eos", "sep", "cls", "pad", "mask")


class PieceTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
    """A fast tokenizer of the pieces that a slow one, the code, makes of a text.

    Ids are those of the slow one. Places in the text (``offsets``) are not: they count characters
    of the pieces.

    Args:
        slow: A tokenizer of transformers that is written in Python, or cuts words by Python as
            RoFormer's does.
        files: By name, the content of the files that its vocabulary was read from.
    """

    def __init__(self, slow: PreTrainedTokenizer, files: Mapping[str, bytes]) -> None:
        self.slow = slow
        self.files = files
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
        first, second = self._cut(text), None if text_pair is None else self._cut(text_pair)
        longest_first = options.get("truncation_strategy") == TruncationStrategy.LONGEST_FIRST
        if second is not None and longest_first and not self.slow.is_fast:
            first, second = self._shortened(first, second, options["max_length"])
        return super()._encode_plus(first, second, **options)

    def _cut(self, text: Any) -> Any:
        """A text, or texts in lists and tuples."""
        return self.pieces(text) if isinstance(text, str) else type(text)(map(self._cut, text))

    def _shortened(self, first: Any, second: Any, longest: int) -> tuple[Any, Any]:
        """Pairs cut as tokenizers in Python cut them.

        Where an odd number of pieces is left, those in Rust keep one more of the second text.
        """
        if not isinstance(first, str):
            pairs = [self._shortened(*pair, longest) for pair in zip(first, second, strict=True)]
            return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        texts = [text.split(SEPARATOR) if text else [] for text in (first, second)]
        lengths = [len(text) for text in texts]
        over = max(0, sum(lengths) + self.num_special_tokens_to_add(pair=True) - longest)
        difference = min(abs(lengths[0] - lengths[1]), over)
        off = [(over - difference) // 2, (over - difference + 1) // 2]
        off[lengths[0] <= lengths[1]] += difference
        left = self.truncation_side == "left"
        kept = [t[n:] if left else t[: len(t) - n] for t, n in zip(texts, off, strict=True)]
        return SEPARATOR.join(kept[0]), SEPARATOR.join(kept[1])

    def save_pretrained(self, save_directory: Any, **options: Any) -> tuple[str, ...]:
        """Save the slow tokenizer's files, which plain transformers opens.

        Those of the vocabulary are copies. BERTweet's class writes merges that it cannot read, and
        Japanese BERTs' other ids where a word stands in vocab.txt twice.
        """
        names = self.slow.init_kwargs["model_input_names"] = self.model_input_names
        self.slow.model_input_names = names
        saved: tuple[str, ...] = self.slow.save_pretrained(save_directory, **options)
        if self.slow.is_fast:
            self.slow.save_vocabulary(str(save_directory))
        for name, content in self.files.items():
            (Path(save_directory) / name).write_bytes(content)
        return saved


def fits_a_file(tokenizer: Any) -> bool:
    """Whether a tokenizer.json can hold it: not where Python code cuts words, as RoFormer's."""
    try:
        tokenizer.backend_tokenizer.to_str()
    except Exception:  # the library's own type is Exception
        return False
    return True


def of_pieces(slow: Any, files: TokenizerFiles) -> PieceTokenizer:
    """The :class:`PieceTokenizer` of a checkpoint's tokenizer.

    Args:
        slow: The tokenizer.
        files: What it was read from.

    Raises:
        UserError: It gives more than the ids of a text, or reads text otherwise than it was meant.
    """
    kind, name, where = type(slow), str(files.place), files.where
    vocabulary = _vocabulary(kind, files)
    ways = ("__call__", "_encode_plus", "prepare_for_model")
    require(
        slow.is_fast or all(getattr(kind, w) is getattr(PreTrainedTokenizer, w) for w in ways),
        f"{where} must make ids of texts alone, got {kind.__name__} from {name!r}, which has other "
        "inputs as well (tables, shapes); use another model",
    )
    require(
        not (getattr(slow, "normalization", False) and slow.demojizer is None),
        f"{where} must have the package emoji to write emojis as words, as its normalization asks, "
        f"got none for {name!r}; pip install emoji",
    )
    merges = getattr(slow, "bpe_ranks", None)
    require(
        merges is None or (bool(merges) and all(len(pair) == 2 for pair in merges)),
        f"{where} must have merges of two pieces, got none or others in {' or '.join(vocabulary)} "
        f"of {name!r}, so that words fall into letters (a copy that BertweetTokenizer has saved "
        "is so); take the published file",
    )
    return PieceTokenizer(slow, vocabulary)


def _vocabulary(kind: Any, files: TokenizerFiles) -> dict[str, bytes]:
    """The files of a checkpoint that a tokenizer's class takes its vocabulary from."""
    found: dict[str, bytes] = {}
    for name in sorted(set(kind.vocab_files_names.values()) - {"tokenizer.json"}):
        if path := files.path(name):
            found[name] = path.read_bytes()
    return found


def cutter(slow: PreTrainedTokenizer, roles: Iterable[str] = ()) -> Callable[[str], str]:
    """A function from a text to its pieces, with ``SEPARATOR`` between them.

    Args:
        slow: The tokenizer.
        roles: Special tokens that are plain text in a text.
    """
    known = slow.get_vocab().keys() - set(roles)
    # PhoBERT's and BERTweet's classes leave a line feed at the end of the word before it.
    glued = not slow.is_fast and not any("\n" in token for token in known)
    if not slow.is_fast:
        settings, slow = vars(slow), object.__new__(type(slow))
        vars(slow).update(settings)  # copy.copy would load MeCab once more
        slow.tokens_trie = Trie()
        for token in slow.added_tokens_encoder.keys() & known:
            slow.tokens_trie.add(token)

    def pieces(text: str) -> str:
        found = slow.tokenize(text.replace("\n", " ") if glued else text)
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
