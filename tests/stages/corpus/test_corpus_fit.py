"""Text of which a tokenizer knows little is told, or refused, with the form that it would know."""
# ruff: noqa: F811

import itertools
import json

import pytest
from transformers import BertTokenizer, EsmTokenizer

from tests.stages.corpus.corpus_support import (
    config,
    failure,
    text,  # noqa: F401
    tokenizer,  # noqa: F401
)
from tests.stages.corpus.test_corpus_account import said

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"


@pytest.fixture
def dna(tmp_path):
    """A tokenizer like the Nucleotide Transformer's: runs of three letters, and single letters."""
    folder = tmp_path / "dna"
    folder.mkdir()
    runs = ["".join(run) for run in itertools.product("ACGT", repeat=3)]
    words = ["<unk>", "<pad>", "<mask>", "<cls>", *runs, *"ACGTN"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "config.json").write_text(json.dumps({"model_type": "esm"}))
    EsmTokenizer(str(folder / "vocab.txt"), eos_token=None).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def proteins(tmp_path):
    """A tokenizer like ProtBERT's: single letters with spaces between them."""
    folder = tmp_path / "proteins"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    return str(folder)


def fasta(path, sequence: str, records: int):
    """Records with other names than sequences, in lines of 60 letters."""
    lines = [sequence[at : at + 60] for at in range(0, len(sequence), 60)]
    path.write_text("".join(f">chr{i}\n" + "\n".join(lines) + "\n" for i in range(records)))
    return path


def lines_on(out, capsys, path, tokenizer, **options) -> list[str]:
    lines = said(capsys, config(path, heldout_fraction=0.0, **options), out, tokenizer)
    return [line for line in lines if "of the characters" in line]


def test_soft_masked_dna(tmp_path, dna, capsys):
    path = fasta(tmp_path / "genome.fa", "ACGTTGACA" * 30 + "acgttgaca" * 10, 40)
    [line] = lines_on(tmp_path / "out", capsys, path, dna)
    assert "25.00 % of the characters at the start of the text are unknown" in line
    assert dna in line
    assert "; in upper case 0.00 % are: change the text so" in line
    path.write_text(path.read_text().upper())
    assert lines_on(tmp_path / "upper", capsys, path, dna) == []


def test_proteins_without_spaces(tmp_path, proteins, capsys):
    for copies, packing in ((4, "blocks"), (4, "lines"), (5, "blocks")):
        path = fasta(tmp_path / "proteins.fasta", LETTERS * copies, 40)
        settings = config(path, packing=packing, heldout_fraction=0.0)
        message = failure(settings, tmp_path / "out", proteins)
        assert "got 100.00 % of the characters" in message
        assert "; with a space between letters 0.00 % are" in message
        assert not (tmp_path / "out").exists()
    path = fasta(tmp_path / "spaced.fasta", " ".join(LETTERS) + " ", 40)
    assert lines_on(tmp_path / "out", capsys, path, proteins) == []


def test_words_too_long_for_a_word_piece(tmp_path, tokenizer, capsys):
    path = tmp_path / "log.txt"
    path.write_text("\n\n".join(["the old boat " * 30 + "a" * 100] * 50))
    assert lines_on(tmp_path / "fit", capsys, path, tokenizer) == []
    path.write_text("\n\n".join(["the old boat " * 30 + "a" * 101] * 50))
    [line] = lines_on(tmp_path / "out", capsys, path, tokenizer)
    assert f"{100 * 101 / (300 + 101):.2f} % of the characters" in line
    assert "; without words of over 100 characters 0.00 % are" in line


def test_few_tokens_may_be_many_characters(tmp_path, tokenizer, capsys):
    path = tmp_path / "mixed.txt"
    path.write_text("\n\n".join(["the old boat " * 30 + "ዶሮ" * 20] * 50))
    [line] = lines_on(tmp_path / "out", capsys, path, tokenizer)
    assert f"{100 * 40 / (300 + 40):.2f} % of the characters" in line
    assert line.endswith(f"unknown to {tokenizer}")


def test_only_the_start_of_long_text_is_looked_at(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("distilcache.stages.corpus.fit.SAMPLE_CHARACTERS", 1000)
    path = tmp_path / "late.txt"
    path.write_text("the old boat " * 500 + "ዶሮ " * 500)
    assert lines_on(tmp_path / "out", capsys, path, tokenizer) == []
