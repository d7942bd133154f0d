"""Recipe section ``[corpus]``."""

from collections.abc import Callable
from dataclasses import dataclass

from distilcache.data.errors import require, require_choice, require_least
from distilcache.stages.corpus.text.readers import DOCUMENTS, Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Where the text comes from and how it becomes token sequences."""

    sources: tuple[str, ...] = ("docstrings",)
    """Files, directories, globs or fsspec URLs: .txt; .json, .jsonl, .ndjson (one object per line,
    or one array); .csv; .tsv (without quotes); .fasta, .fa, .faa, .fna (a record is a document);
    each plain or with .gz, .zst, .xz; .parquet; .arrow; and folders that ``datasets`` has saved. Of
    a data set name one split, or list each as a source. Of a directory other files are left out,
    and .json files where they are no more than half; a line says so. ``hf:NAME[/CONFIG]:SPLIT`` is
    a Hugging Face dataset (extra ``hub``), ``docstrings[:PACKAGE]`` the docstrings of the installed
    packages. Text is UTF-8."""
    heldout_sources: tuple[str, ...] = ()
    """Sources of held-out text. Empty: documents are held out of ``sources`` by hash."""
    heldout_fraction: float = 0.02
    """Fraction of documents held out where ``heldout_sources`` is empty."""
    document: str = ""
    """What ends a document of a text file: ``blank_line``, ``line``, or ``file`` (only its end).
    Empty: ``line`` where ``packing`` is ``lines``, else ``blank_line``. In other sources each row
    is a document, or each line of its text where ``line`` is written here. A document is held out
    as a whole."""
    text_field: str = "text"
    """Field or column that holds the text, in all sources but text files; ``doc.text`` for a field
    within a field."""
    on_bad_row: str = "stop"
    """What happens where a row has no text in that field: ``stop``, or ``skip`` it and report how
    many."""
    packing: str = "blocks"
    """``blocks``: documents are joined by separators and cut into full sequences (no padding).
    ``lines``: each line is a sequence. Longer lines are split; those with fewer than ``min_tokens``
    tokens, or with half of them unknown, are dropped and counted."""
    max_length: int = 128
    """Tokens per sequence, special tokens included."""
    min_tokens: int = 4
    """Shortest sequence in tokens, special tokens included; shorter ones are dropped. With 4, one
    token is left besides a masked one. DistilBERT used 12."""
    tokenizer: str = ""
    """Path or hub id of a tokenizer. Empty: the teacher's own. ``train``: a WordPiece
    vocabulary trained on this corpus; so also where it is empty and the project trains its own
    teacher. With ``cache_from`` both mean that of the cache."""
    vocab_size: int = 8192
    """Vocabulary size where the tokenizer is trained."""
    max_bytes: int = 0
    """Stop after this many UTF-8 bytes of training text; 0: take everything."""
    chunk_bytes: int = 16_777_216
    """Bytes of text per part of the corpus: what a killed run makes again."""
    block_sequences: int = 512
    """Sequences per block."""
    workers: int = 0
    """Tokenising processes; 0: one per core."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(bool(self.sources), "corpus: sources must name at least one source, got none")
        require_choice("corpus", self, packing=("blocks", "lines"), on_bad_row=("stop", "skip"))
        require(
            self.document in ("", *DOCUMENTS),
            f"corpus: document must be one of {', '.join(DOCUMENTS)} or empty, got "
            f"{self.document!r}",
        )
        require(
            8 <= self.max_length <= 65535,
            f"corpus: max_length must be between 8 and 65535 tokens, got {self.max_length}",
        )
        require(
            3 <= self.min_tokens <= self.max_length,
            f"corpus: min_tokens must be between 3 and max_length ({self.max_length}), got "
            f"{self.min_tokens}",
        )
        require(
            0 <= self.heldout_fraction < 1,
            f"corpus: heldout_fraction must be at least 0 and below 1, got {self.heldout_fraction}",
        )
        require(
            1 <= self.block_sequences <= 65535,
            f"corpus: block_sequences must be between 1 and 65535, got {self.block_sequences}",
        )
        require(
            self.block_sequences * self.max_length < 1 << 31,
            "corpus: block_sequences x max_length must be below 2^31 tokens, got "
            f"{self.block_sequences} x {self.max_length}",
        )
        require_least("corpus", self, 1024, "chunk_bytes")
        require_least("corpus", self, 0, "max_bytes", "workers")
        require(
            self.tokenizer != "train" or self.vocab_size >= 300,
            f"corpus: vocab_size must be at least 300, got {self.vocab_size}",
        )

    def reading(self, say: Callable[[str], None], workers: int = 1) -> Reading:
        """How documents are taken out of the sources; ``say`` is told what is left out."""
        return Reading(
            text_field=self.text_field,
            document=self.document or ("line" if self.packing == "lines" else "blank_line"),
            split_rows=self.document == "line",
            skip_bad_rows=self.on_bad_row == "skip",
            workers=workers,
            say=say,
        )
