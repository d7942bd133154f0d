"""Special and added tokens in text: those with a role are text, all others are tokens."""
# ruff: noqa: F811

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.tokenise import open_tokenizer
from distilcache.stages.models.special_tokens import never_masked, role_tokens
from tests.stages.corpus.corpus_support import (
    DOCUMENTS,
    config,
    make_documents,
    read_sequences,
    tokenizer,  # noqa: F401
)

ROLES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.fixture
def own(tmp_path, tokenizer):
    """The tokenizer of a teacher with tokens of its own, special ones and others."""
    made = AutoTokenizer.from_pretrained(tokenizer)
    made.add_tokens(["<url>", AddedToken("@GENE$", normalized=False)])
    made.add_special_tokens({"additional_special_tokens": ["[NUM]"]})
    made.save_pretrained(tmp_path / "own")
    path = tmp_path / "own" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["added_tokens"].append(  # special by the flag of its file alone
        state["added_tokens"][-1] | {"id": len(made), "content": "[LAB]"}
    )
    path.write_text(json.dumps(state))
    return str(tmp_path / "own")


def test_added_tokens_stay_whole_and_roles_are_text(own):
    plain = AutoTokenizer.from_pretrained(own)
    content = plain.backend_tokenizer.to_str()
    found = open_tokenizer(content, role_tokens(plain))

    def ids(text):
        return found.encode(text, add_special_tokens=False).ids

    for text in (*DOCUMENTS[:20], "the [NUM]boat <url> @GENE$[LAB] ዶ <URL>", ""):
        assert ids(text) == plain(text, add_special_tokens=False)["input_ids"]
    own_ids = plain.convert_tokens_to_ids(["[NUM]", "<url>", "@GENE$", "[LAB]"])
    assert set(own_ids) <= set(ids("the [NUM]boat <url> @GENE$[LAB]"))
    for role in ("[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]"):
        split = plain(f"the {role} boat", add_special_tokens=False, split_special_tokens=True)
        assert ids(f"the {role} boat") == split["input_ids"]
        assert len(split["input_ids"]) > 4
    num, _, _, lab = own_ids
    assert never_masked(plain) == (0, 1, 2, 3, 4, num, lab)


@pytest.mark.parametrize("normalized", [True, False])
def test_no_kind_of_model_finds_a_role_in_the_text(tmp_path, normalized):
    """The library's own switch leaves ``<mask>`` to the pieces of a Unigram or word-level model."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.train_from_iterator(
        make_documents(50, seed=1),
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=ROLES, unk_token="<unk>", show_progress=False
        ),
    )
    words = {token: i for i, token in enumerate([*ROLES, "the", "boat"])}
    words = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.ByteLevel()
    letters.train_from_iterator(
        make_documents(50, seed=1),
        trainers.BpeTrainer(vocab_size=300, special_tokens=ROLES, show_progress=False),
    )
    for made in (unigram, words, letters):
        made.add_special_tokens([AddedToken(token, normalized=normalized) for token in ROLES])
        found = open_tokenizer(made.to_str(), ROLES)
        assert found.encode("the boat").ids == made.encode("the boat").ids
        assert (3 in found.encode("ዶ").ids) == (made is not letters)  # it falls back on bytes
        for role in ("<s>", "<pad>", "</s>", "<mask>"):
            assert made.token_to_id(role) in made.encode(f"the {role} boat").ids
            assert made.token_to_id(role) not in found.encode(f"the {role} boat").ids


@pytest.mark.parametrize("as_lists", [True, False])
@pytest.mark.parametrize("prefix", ["", "##"])
def test_merges_of_roles_are_not_done(as_lists, prefix):
    """A BPE that was trained on text about ``<mask>`` makes it of its letters, and goes on."""
    pairs = [("<", "m"), ("<m", "a"), ("s", "k"), ("<ma", "sk"), ("<mask", ">"), ("<mask>", "s")]
    made = [a + b for a, b in pairs]
    if prefix:  # of all pieces but the first
        pairs = [(a if a[0] == "<" else prefix + a, prefix + b) for a, b in pairs]
        made = [a + b.removeprefix(prefix) for a, b in pairs]
    letters = [*"<mask>s", *(prefix + c for c in "<mask>s")]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(["<unk>", "<mask>", *letters, *made]))}
    options = {"continuing_subword_prefix": prefix} if prefix else {}
    whole = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", **options))
    state = json.loads(whole.to_str())
    if not as_lists:
        state["model"]["merges"] = [" ".join(pair) for pair in pairs]
    found = open_tokenizer(json.dumps(state), ["<unk>", "<mask>"])
    assert found.encode("<mask>s").tokens == ["<mask", prefix + ">", prefix + "s"]
    assert vocab["<mask>"] not in found.encode("<mask>").ids
    assert whole.encode("<mask>s").tokens == ["<mask>s"]
    assert whole.encode("<mask>").ids == [vocab["<mask>"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_own_tokens_in_a_corpus(tmp_path, own, workers):
    plain = AutoTokenizer.from_pretrained(own)
    line = "the [NUM] boat <url> sailed @GENE$ over [MASK] and [SEP] the sea"
    documents = [f"{line}, {i}" for i in range(100)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    options = {"packing": "lines", "max_length": 64, "heldout_fraction": 0.0}
    options |= {"workers": workers, "chunk_bytes": 1024}
    corpus = build_corpus(config(tmp_path / "a.txt", **options), tmp_path / "out", own)
    body = np.concatenate([s[1:-1] for s in read_sequences(corpus, "train")])
    own_ids = plain.convert_tokens_to_ids(["[NUM]", "<url>", "@GENE$"])
    assert np.bincount(body)[own_ids].tolist() == [100, 100, 100]
    assert not {0, 2, 4}.intersection(body.tolist())
    assert set(corpus.manifest.all_special_ids) - {0, 1, 2, 3, 4} == set(
        plain.convert_tokens_to_ids(["[NUM]", "[LAB]"])
    )
