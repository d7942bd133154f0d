"""Held-out text and models that evaluation refuses in one line."""
# ruff: noqa: F811

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from distilcache.data.errors import UserError
from distilcache.stages.evaluate.run import ModelEntry
from tests.stages.evaluate.evaluate_support import (
    VOCAB,
    MemoryCorpus,
    evaluate,
    model,
    models,  # noqa: F401
    open_corpus,  # noqa: F401
    random_blocks,
    save,
)


@pytest.mark.parametrize("blocks", [None, []])
def test_no_heldout_text_is_refused(open_corpus, models, blocks):
    open_corpus(MemoryCorpus(blocks))
    with pytest.raises(UserError, match="held-out text, got none"):
        evaluate(models)


def test_held_out_text_without_a_token_to_mask_is_refused(open_corpus, models):
    special = np.array([[2, 1, 1, 1, 3]] * 4)
    lengths = np.full(4, 5, dtype=np.int64)
    open_corpus(MemoryCorpus([(special.ravel().astype(np.uint16), lengths)]))
    with pytest.raises(UserError, match="only special and unknown ones in 4 sequences"):
        evaluate(models)


def test_missing_folder_is_refused(open_corpus, tmp_path):
    open_corpus(MemoryCorpus(random_blocks()))
    with pytest.raises(UserError, match=r"'gone' must be a folder, .*which does not exist"):
        evaluate([ModelEntry("gone", "student", tmp_path / "nowhere")])


def test_missing_or_pickled_weights_are_refused(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    weights = models[0].path / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(
        UserError, match=r"weights in model\.safetensors, got pytorch_model.bin alone"
    ):
        evaluate(models)


def test_damaged_weights_are_refused(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    weights = models[0].path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="1,000 bytes. whose header is cut off") as caught:
        evaluate(models)
    assert "\n" not in str(caught.value)


def test_model_without_lm_head_is_refused(open_corpus, tmp_path):
    open_corpus(MemoryCorpus(random_blocks()))
    path = save(model("bert").base_model, tmp_path / "headless")
    with pytest.raises(UserError, match=r"without cls\.predictions\.") as caught:
        evaluate([ModelEntry("headless", "teacher", path)])
    assert "\n" not in str(caught.value)


def test_other_shape_of_a_weight_is_refused(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    weights = models[0].path / "model.safetensors"
    tensors = load_file(weights)
    name = "bert.encoder.layer.0.output.dense.weight"
    save_file({**tensors, name: torch.zeros(3, 3)}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="evaluate: model 'teacher' must"):
        evaluate(models)


def test_other_vocabulary_is_refused(open_corpus, tmp_path):
    open_corpus(MemoryCorpus(random_blocks()))
    path = save(model("bert", vocab=90), tmp_path / "small")
    with pytest.raises(UserError, match="vocabulary must have the corpus's 100 tokens, got 90"):
        evaluate([ModelEntry("small", "student", path)])


def test_a_tokenizer_of_other_ids_is_refused(open_corpus, models, tmp_path):
    """As many ids, two of them of other words: nothing else would tell."""
    words = {f"word{i}": i for i in range(VOCAB)}
    swapped = {**words, "word7": 8, "word8": 7}
    for folder, vocabulary in ((tmp_path / "tokenizer", words), (models[1].path, swapped)):
        folder.mkdir(exist_ok=True)
        Tokenizer(WordLevel(vocabulary)).save(str(folder / "tokenizer.json"))
    corpus = open_corpus(MemoryCorpus(random_blocks()))
    assert evaluate(models)  # a corpus that has no such file
    corpus.path = tmp_path
    wanted = "model '1x32': tokenizer must have the corpus's token ids, got another one for 'word7'"
    with pytest.raises(UserError, match=wanted):
        evaluate(models)
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", models[1].path)
    assert evaluate(models)


def test_a_model_of_no_numbers_is_refused(open_corpus, models):
    """Its KL to the teacher came out as 0."""
    open_corpus(MemoryCorpus(random_blocks()))
    weights = models[1].path / "model.safetensors"
    tensors = load_file(weights)
    tensors["vocab_projector.bias"].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="'1x32' must give numbers .* got an MLM loss of nan"):
        evaluate(models)


def test_too_few_positions_are_refused(open_corpus, tmp_path):
    open_corpus(MemoryCorpus(random_blocks()))
    path = save(model("bert", positions=8), tmp_path / "short")
    with pytest.raises(UserError, match="max_length 16, got 8"):
        evaluate([ModelEntry("short", "student", path)])


def test_roles_are_checked(models):
    with pytest.raises(UserError, match="role of x must be one of"):
        ModelEntry("x", "pupil", Path("x"))
    with pytest.raises(UserError, match="teacher must be one model, got 2"):
        evaluate([models[0], models[0]])
    with pytest.raises(UserError, match="at least one model"):
        evaluate([])
