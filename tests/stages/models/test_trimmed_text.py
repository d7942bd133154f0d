"""Trimmed tokenizers on 1 MB of real text that they have not seen."""

import json
import lzma

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from distilcache.stages.models.trimmed_tokenizer import choose, trim

pytestmark = [pytest.mark.slow, pytest.mark.shared_data]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def lines_of(path, size):
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [line for line in file.read(size).split("\n") if line.strip()]


def word_piece(shared, lines):
    return Tokenizer.from_file(str(shared / "teacher/tokenizer.json"))


def byte_level(shared, lines):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(lines, trainer)
    return made


def unigram(shared, lines):
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=20_000, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(lines, trainer)
    return made


@pytest.mark.parametrize("kind", [word_piece, byte_level, unigram])
def test_no_new_unknown_token_and_the_same_text_back(shared, tmp_path, kind):
    """Counted over 40 MB, with 8,000 ids; opened by tokenizers alone and by AutoTokenizer."""
    training = lines_of(shared / "corpus/wiki_train_100MB.txt.xz", 40_000_000)
    heldout = lines_of(shared / "corpus/wiki_valid_2MB.txt.xz", 1_000_000)
    old = kind(shared, training[: len(training) // 8])
    counts_V = np.zeros(old.get_vocab_size(), np.int64)
    for start in range(0, len(training), 5000):
        found = old.encode_batch(training[start : start + 5000], add_special_tokens=False)
        ids = np.concatenate([encoding.ids for encoding in found])
        counts_V += np.bincount(ids, minlength=len(counts_V))
    state = json.loads(old.to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(trim(state, choose(state, counts_V, 8000))))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    own, opened = Tokenizer.from_file(str(path)), AutoTokenizer.from_pretrained(tmp_path)
    assert own.get_vocab_size() == 8000
    unknown = state["model"].get("unk_token") or "<unk>"
    before, after = old.encode_batch(heldout), own.encode_batch(heldout)
    assert [e.ids for e in after] == opened(heldout)["input_ids"]
    for old_line, new_line in zip(before, after, strict=True):
        counts = [
            line.ids.count(tokenizer.token_to_id(unknown))
            for tokenizer, line in ((old, old_line), (own, new_line))
        ]
        assert counts[0] == counts[1]
        if not counts[0]:
            assert old.decode(old_line.ids) == own.decode(new_line.ids)
    print(kind.__name__, "fertility", sum(map(len, after)) / sum(map(len, before)))
