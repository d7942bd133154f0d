import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data.errors import UserError
from data.tokenizers import (
    load_tokenizer,
    saved_fingerprint,
    special_ids,
    tokenizer_fingerprint,
    train_wordpiece,
    vocabulary_size,
)

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"The {a} {b} walked – slowly, {i} times – to Zürich!" for i in range(30)
             for a in ("old", "young", "tall") for b in ("man", "woman", "dog")]  # fmt: skip

PRINT_FINGERPRINT = """
from tests_documents import DOCUMENTS
from data.tokenizers import tokenizer_fingerprint, train_wordpiece
print(tokenizer_fingerprint(train_wordpiece(DOCUMENTS, 320)))
"""


def test_trained_tokenizer_opens_as_a_bert_tokenizer(tmp_path):
    trained = train_wordpiece(DOCUMENTS, 320)
    trained.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.is_fast
    assert [opened.decode([i]) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert special_ids(opened) == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    ids = opened("The OLD man walked to Zurich!")["input_ids"]
    assert (ids[0], ids[-1]) == (2, 3)
    assert opened.decode(ids, skip_special_tokens=True) == "the old man walked to zurich!"
    assert vocabulary_size(opened) == len(opened) <= 320
    assert sorted(opened.get_vocab().values()) == list(range(len(opened)))
    assert tokenizer_fingerprint(opened) == tokenizer_fingerprint(trained)


def test_a_saved_tokenizer_is_known_by_its_file(tmp_path):
    trained = train_wordpiece(DOCUMENTS, 320)
    trained.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    assert saved_fingerprint(path) == tokenizer_fingerprint(trained)
    whole = path.read_text()
    for text in ("", "{}", whole[:-9], "[" * 100_000, whole.replace('"##a"', '"##A"')):
        path.write_text(text)
        assert saved_fingerprint(path) != tokenizer_fingerprint(trained)


def test_training_is_the_same_in_every_process(tmp_path):
    (tmp_path / "tests_documents.py").write_text(f"DOCUMENTS = {DOCUMENTS!r}\n")
    here = tokenizer_fingerprint(train_wordpiece(DOCUMENTS, 320))
    done = subprocess.run(
        [sys.executable, "-c", PRINT_FINGERPRINT],
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here
    for _ in range(5):  # the library's own hash seeds differ from call to call
        assert tokenizer_fingerprint(train_wordpiece(DOCUMENTS, 320)) == here


def test_fingerprint_ignores_truncation_and_sees_the_vocabulary():
    tokenizer = train_wordpiece(DOCUMENTS, 320)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], truncation=True, padding=True, max_length=8)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["zzz"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_missing_tokenizers(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"a folder or a hub id.*not exist; bring the teacher"):
        load_tokenizer(str(tmp_path / "none"), "bring the teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"without tokenizer files"):
        load_tokenizer(str(tmp_path / "empty"))
    monkeypatch.setattr("data.hub.hub_answers", lambda *_: False)
    with pytest.raises(UserError, match="hub id that can be reached, .*pass its folder") as caught:
        load_tokenizer("no-such-owner/no-such-model")
    assert "\n" not in str(caught.value)


def test_tokenizer_without_mask():
    tokenizer = train_wordpiece(DOCUMENTS, 320)
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="without mask_token"):
        special_ids(tokenizer)
