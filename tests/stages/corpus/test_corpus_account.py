"""What the console says of a text, and what is refused, with its true cause."""
# ruff: noqa: F811

import itertools

import pytest
from transformers import AutoTokenizer, BertTokenizer

from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.units import _hash64
from tests.stages.corpus.corpus_support import (
    DOCUMENTS,
    config,
    failure,
    text,  # noqa: F401
    tokenizer,  # noqa: F401
)

WORD = "ዶሮ"
"""Of a script that the vocabulary lacks: one unknown token."""


def said(capsys, settings, out, tokenizer) -> list[str]:
    build_corpus(settings, out, tokenizer)
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    return [line for line in lines if line.startswith("corpus: ") and "B/s" not in line]


def share(path, tokenizer) -> float:
    plain = AutoTokenizer.from_pretrained(tokenizer)
    ids = plain(path.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return ids.count(plain.unk_token_id) / len(ids)


def test_share_of_unknown_tokens(tmp_path, text, tokenizer, capsys):
    half = text.read_text().replace("boat", WORD)
    for name, content in (("few", text.read_text()), ("many", half)):
        text.write_text(content)
        lines = said(capsys, config(text), tmp_path / name, tokenizer)
        [line] = [line for line in lines if "unknown" in line]
        expected = share(text, tokenizer)
        assert f" {100 * expected:.2f} % of the tokens are unknown" in line
        assert ("hardly fits" in line and tokenizer in line) == (name == "many")
        assert (expected >= 0.03) == (name == "many")


@pytest.mark.parametrize(("word", "letters"), [("sea" * 40, 120), ("sailing" + WORD[0], 8)])
def test_characters_of_unknown_words_count(tmp_path, text, tokenizer, capsys, word, letters):
    """A word of more than 100 letters is one unknown token, and so is one with a foreign letter."""
    known = "the old harbour boat sailed north over the quiet sea"
    assert len(known.replace(" ", "")) == 43
    text.write_text("\n\n".join([f"{known} {word}"] * 30))
    lines = said(capsys, config(text, heldout_fraction=0.0), tmp_path / "out", tokenizer)
    [line] = [line for line in lines if "unknown" in line]
    expected = f"{100 * letters / (43 + letters):.2f}"
    assert f"9.09 % of the tokens are unknown (in place of about {expected} % of the ch" in line
    assert "hardly fits this text; choose a teacher" in line


def fasta(path, *sequences: str) -> str:
    path.write_text("".join(f">gene {i}\n{text}\n" for i, text in enumerate(sequences)))
    return str(path)


@pytest.fixture
def dna(tmp_path):
    """An ESM's, as the Nucleotide Transformer has: letters, and no small ones."""
    folder = tmp_path / "dna"
    folder.mkdir()
    names = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "GAT", *"ATCGN"]
    (folder / "vocab.txt").write_text("\n".join(names))
    (folder / "config.json").write_text('{"model_type": "esm"}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    return str(folder)


def test_small_letters_of_a_genome_are_lost_and_it_is_said(tmp_path, dna, capsys, monkeypatch):
    """70 letters are 50 tokens, 70 small ones behind them a single one."""
    genes = ["GATTACA" * 10 + "gattaca" * 10] * 40
    path = fasta(tmp_path / "half.fa", *genes)
    for name, chars in (("whole", 1 << 19), ("sampled", 1000)):
        monkeypatch.setattr("distilcache.stages.corpus.unknown.SAMPLE_CHARS", chars)
        lines = said(capsys, config(path, heldout_fraction=0.0), tmp_path / name, dna)
        [line] = [line for line in lines if "unknown" in line]
        assert "1.96 % of the tokens are unknown (in place of about 50.00 % of the characters)" in (
            line
        )
        assert f"{dna} hardly fits" in line
        assert "write the text in upper case: 100.00 % of that is known" in line
    upper = fasta(tmp_path / "upper.fa", *map(str.upper, genes))
    lines = said(capsys, config(upper, heldout_fraction=0.0), tmp_path / "upper", dna)
    assert any(line.endswith("0.00 % of the tokens are unknown") for line in lines)
    most = fasta(tmp_path / "most.fa", *["GATTACA" + "gattaca" * 19] * 40)
    message = failure(config(most, heldout_fraction=0.0), tmp_path / "most", dna)
    assert "16.67 % unknown tokens (in place of about 95.00 % of the characters)" in message
    assert "write the text in upper case" in message


@pytest.mark.parametrize(
    ("words", "sequence", "remedy"),
    [
        ([*"LAGVSERTIDPKQNFYMHWC"], "MKTAYIAKQR", "with spaces, as in 'M K T A'"),
        ([*"LAGVSERTIDPKQNFYMHWC"], "mktayiakqr", "in upper case with spaces, as in 'M K T A'"),
        (["".join(x) for x in itertools.product("ACGT", repeat=3)], "GATTACAGAT",
         "with spaces, as in 'GAT ATT TTA TAC'"),
    ],
    ids=["ProtBERT", "small", "DNABERT"],
)  # fmt: skip
def test_letters_that_must_stand_apart(tmp_path, words, sequence, remedy):
    """A WordPiece without inner pieces takes a whole sequence for one unknown word."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    made = BertTokenizer(vocab={name: i for i, name in enumerate(names)}, do_lower_case=False)
    made.save_pretrained(tmp_path / "own")
    path = fasta(tmp_path / "joined.fasta", *[sequence * 5] * 40)
    for packing in ("blocks", "lines"):
        message = failure(
            config(path, packing=packing, heldout_fraction=0.0),
            tmp_path / "out",
            str(tmp_path / "own"),
        )
        assert "100.00 % unknown tokens" in message
        assert f"write the text {remedy}: 100.00 % of that is known" in message
        assert "script" not in message
    size, text = len(words[0]), sequence.upper() * 5
    apart = [text[i : i + size] for i in range(len(text) - size + 1)]
    lines = [" ".join(apart[:20]), " ".join(apart[20:])]
    path = fasta(tmp_path / "apart.fasta", *["\n".join(lines)] * 40)
    train = build_corpus(
        config(path, heldout_fraction=0.0), tmp_path / "out", str(tmp_path / "own")
    ).manifest.splits["train"]
    assert train["text_tokens"] == 40 * len(apart)
    assert train["unknown_tokens"] == 0


def test_text_of_another_script_is_refused(tmp_path, text, tokenizer):
    text.write_text("\n\n".join([" ".join([WORD] * 40)] * 50))
    for packing in ("blocks", "lines"):
        settings = config(text, packing=packing, chunk_bytes=1024)
        message = failure(settings, tmp_path / "out", tokenizer)
        assert "100.00 % unknown tokens" in message
        assert tokenizer in message
        assert "corpus.tokenizer" in message
        assert not (tmp_path / "out").exists()
    text.write_text(f"{WORD}, " * 2000)  # half of the tokens are known: a comma
    assert share(text, tokenizer) == 0.5
    build_corpus(config(text, heldout_fraction=0.0), tmp_path / "out", tokenizer)


def test_special_tokens_alone_are_refused(tmp_path, text, tokenizer):
    made = AutoTokenizer.from_pretrained(tokenizer)
    made.add_special_tokens({"additional_special_tokens": ["[NUM]"]})
    made.save_pretrained(tmp_path / "own")
    text.write_text("[NUM] " * 500)
    settings = config(text, heldout_fraction=0.0)
    message = failure(settings, tmp_path / "out", str(tmp_path / "own"))
    assert "only special ones" in message


def test_short_lines_are_counted(tmp_path, text, tokenizer, capsys):
    long, short = "the old harbour boat sailed north over the quiet sea", "the boat"
    text.write_text("\n".join([long] * 30 + [short] * 20 + [f"{WORD} {WORD} {WORD} sea"] * 10))
    options = {"packing": "lines", "max_length": 64, "heldout_fraction": 0.0}
    lines = said(capsys, config(text, **options, min_tokens=12), tmp_path / "many", tokenizer)
    plain = AutoTokenizer.from_pretrained(tokenizer)
    sizes = [len(plain(line)["input_ids"]) for line in (long, short)]
    assert sizes == [12, 4]
    assert "30 of 60 sequences are dropped, with 21.05 % of the tokens: 30 have fewer than 12" in (
        "\n".join(lines)
    )
    lines = said(capsys, config(text, **options), tmp_path / "few", tokenizer)
    assert "10 of 60 sequences are dropped, with 10.53 % of the tokens: 0 have fewer than 4" in (
        "\n".join(lines)
    )
    entry = build_corpus(config(text, **options), tmp_path / "few", tokenizer).manifest
    assert entry.splits["train"]["unknown_sequences"] == 10
    assert entry.splits["train"]["unknown_tokens"] == 30
    assert entry.splits["train"]["text_tokens"] == 30 * 10 + 20 * 2 + 10 * 4


@pytest.mark.parametrize(
    ("content", "options", "cause"),
    [
        ("the boat\n" * 50, {"packing": "lines", "min_tokens": 12}, "50 lines of fewer than 12"),
        (f"{WORD} {WORD} {WORD} sea\n" * 50, {"packing": "lines"}, "50 that are half unknown"),
        ("the old boat", {"heldout_fraction": 1 - 1e-12}, "1 document, all held out"),
        (
            "the " * 300 + "\n\n" + "the " * 900,
            {"max_length": 1024, "chunk_bytes": 1024},
            "units too small",
        ),
        ("the", {"heldout_fraction": 0.0}, "1 token, fewer than one has"),
    ],
)
def test_nothing_left_names_the_cause(tmp_path, text, tokenizer, content, options, cause):
    text.write_text(content)
    settings = config(text, **{"heldout_fraction": 0.0} | options)
    assert cause in failure(settings, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_one_document_cannot_be_held_out(tmp_path, text, tokenizer, capsys):
    text.write_text("the old boat sailed\n" * 200)
    lines = said(capsys, config(text), tmp_path / "out", tokenizer)
    assert "corpus: no text is held out of 1 document; set corpus.document to what ends one" in (
        "\n".join(lines)
    )
    text.write_text("\n\n".join(["the old boat sailed over the sea"] * 3))
    lines = said(capsys, config(text), tmp_path / "three", tokenizer)
    assert "held out of 3 documents; raise corpus.heldout_fraction" in "\n".join(lines)
    (tmp_path / "other.txt").write_text("the")
    settings = config(text, heldout_sources=(str(tmp_path / "other.txt"),))
    lines = said(capsys, settings, tmp_path / "other", tokenizer)
    assert "the text held out, 1 document, is too short" in "\n".join(lines)


def test_much_more_held_out_than_asked_is_told(tmp_path, text, tokenizer, capsys):
    """One long document of a hundred has most of the text, and its hash holds it out."""
    long = (f"{i} " + "the old boat " * 2000 for i in itertools.count())
    held_out = next(one for one in long if _hash64(one.strip().encode()) < 0.02 * 2**64)
    text.write_text("\n\n".join([*DOCUMENTS, held_out]))
    corpus = build_corpus(config(text), tmp_path / "out", tokenizer)
    tokens = {name: split["text_tokens"] for name, split in corpus.manifest.splits.items()}
    share = tokens["heldout"] / sum(tokens.values())
    assert share > 0.3
    line = f"corpus: {100 * share:.2f} % of the text is held out, not 2.00 %: "
    assert line in capsys.readouterr().err
    text.write_text("\n\n".join(DOCUMENTS))
    for fraction in (0.02, 0.3):
        settings = config(text, heldout_fraction=fraction)
        assert not any(
            "of the text is held out" in line
            for line in said(capsys, settings, tmp_path / str(fraction), tokenizer)
        )
