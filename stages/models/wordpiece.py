"""A small WordPiece vocabulary, trained on a corpus of one's own."""

import itertools
from collections import Counter
from collections.abc import Sequence

import tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In the order of their ids, 0 to 4."""
TRAINED_MAX_LENGTH = 512
"""``model_max_length`` of a trained tokenizer: BERT's."""
MAX_ALPHABET = 1000
"""Characters a trained vocabulary keeps at most: the limit BERT's vocabulary was made with."""
MIN_ALPHABET = 64
"""Characters a trained vocabulary may always keep: letters, digits, punctuation."""


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
