"""The corpus on disk: token sequences in blocks, mapped into memory.

    <corpus>/
      manifest.json               written last: a corpus without it is not finished
      build.json                  its settings and sources
      tokenizer/                  a Hugging Face fast tokenizer
      token_counts.arrow          column ``count``: tokens per id over the train split
      train/part-000000.arrow     Arrow IPC file; a record batch is a block of sequences in
                                  column ``ids``: list<uint16>, list<uint32> for large vocabularies
      train/part-000000.json      commit marker of that part
      heldout/part-000000.arrow

Shapes: ``B`` sequences, ``T`` tokens, ``V`` vocabulary.
"""

import re
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilcache.data.corpus.manifest import (
    REBUILD,
    CorpusManifest,
    SplitEntry,
    parts_of,
    read_manifest,
)
from distilcache.data.corpus.packing import Array
from distilcache.data.corpus.parts import check_part
from distilcache.data.corpus.words import continuations
from distilcache.data.errors import UserError, reason_of, require
from distilcache.data.masks.masking import MaskedBlock, MaskingConfig, mask_block
from distilcache.data.storage.files import hash_of, read_json

MAX_OPEN_PARTS = 64
"""Parts that are mapped at the same time, to limit file descriptors."""
_HUB_NAME = re.compile("hf:(?://datasets/)?([^/:@]+(?:/[^/:@]+)?)")
"""The data set of ``hf:OWNER/NAME/CONFIG:SPLIT`` or ``hf://datasets/OWNER/NAME@main/FILE``."""


class Corpus:
    """A finished corpus, opened for reading."""

    def __init__(self, path: Path, manifest: CorpusManifest) -> None:
        self.path = path
        self.manifest = manifest
        self.tokenizer_dir = path / "tokenizer"
        self._splits: dict[str, CorpusSplit] = {}

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """Open the corpus in ``path``.

        Raises:
            UserError: It is missing, not finished, of another version, or a part has another size.
        """
        path = Path(path)
        manifest = read_manifest(path)
        require(
            (path / "tokenizer" / "tokenizer.json").is_file(),
            f"corpus: {path} must hold tokenizer/tokenizer.json, got none; {REBUILD}",
        )
        for name, part in parts_of(manifest):
            file = path / name / part["file"]
            size = file.stat().st_size if file.is_file() else -1
            require(
                size == part["bytes"],
                f"corpus: {file} must have {part['bytes']} bytes, got "
                f"{'no such file' if size < 0 else f'{size} bytes'}; {REBUILD}",
            )
        return cls(path, manifest)

    def tokenizer_fault(self, folder: Path) -> str:
        """Compare a folder's copies of the tokenizer's files with what was made.

        Returns:
            The path of the first that is missing or differs, with both hashes; "": all are there.
        """
        for name, wanted in self.manifest.tokenizer_files.items():
            file = folder / name
            found = hash_of(file)
            if found != wanted:
                return f"{file} must have sha256 {wanted[:16]}, got {found[:16]}"
        return ""

    @cached_property
    def token_counts(self) -> npt.NDArray[np.int64]:
        """int64 [V]: occurrences of each id in the train split."""
        file = self.path / "token_counts.arrow"
        try:
            with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
                counts = reader.read_all().column("count").to_numpy()
        except (OSError, pa.ArrowInvalid, KeyError):
            raise UserError(
                f"corpus: {file} must be a readable Arrow file, got a damaged one; {REBUILD}"
            ) from None
        require(
            counts.shape == (self.manifest.vocab_size,),
            f"corpus: {file} must have {self.manifest.vocab_size} rows, got {len(counts)}; "
            f"{REBUILD}",
        )
        total, tokens = int(counts.sum()), self.manifest.splits["train"]["tokens"]
        require(
            total == tokens and int(counts.min()) >= 0,
            f"corpus: {file} must count {tokens} tokens, got {total}: it is damaged; {REBUILD}",
        )
        return np.asarray(counts, dtype=np.int64)

    @cached_property
    def continuations(self) -> npt.NDArray[np.int8]:
        """How each id stands in a word, int8 [V], see :func:`continuations`.

        Raises:
            UserError: The tokenizer does not mark where words begin or end.
        """
        file = self.tokenizer_dir / "tokenizer.json"
        tokenizer = read_json(file, "corpus: tokenizer", remedy=f"; {REBUILD}")
        return continuations(tokenizer, self.manifest.vocab_size)

    def masked(
        self, split: str, block: int, masking: MaskingConfig, round_index: int = 0
    ) -> tuple[MaskedBlock, npt.NDArray[np.int64]]:
        """A block of ``train`` or ``heldout``, masked, and tokens per sequence int64 [B]."""
        manifest = self.manifest
        ids, lengths = self.split(split).block(block)
        masked = mask_block(
            ids,
            lengths,
            config=masking,
            round_index=round_index,
            block_index=block,
            special_ids=manifest.all_special_ids,
            mask_id=manifest.special_ids["mask"],
            vocab_size=manifest.vocab_size,
            token_counts=self.token_counts,
            continues=self.continuations if masking.unit == "word" else None,
        )
        return masked, lengths

    @cached_property
    def datasets(self) -> list[str]:
        """Data sets on the Hugging Face hub that its training text comes from, by their ids."""
        path = self.path / "build.json"
        build = read_json(path, "corpus: build.json") if path.is_file() else {}
        sources = build.get("sources") if isinstance(build, dict) else None
        found = (_HUB_NAME.match(str(name)) for name in sources or [])
        return list(dict.fromkeys(match[1] for match in found if match))

    def split(self, name: str) -> "CorpusSplit":
        """The blocks of ``train`` or ``heldout``."""
        require(
            name in self.manifest.splits,
            f"corpus: split must be one of {', '.join(self.manifest.splits)}, got {name!r}",
        )
        if name not in self._splits:  # One for all threads: it knows what it has checked.
            made = CorpusSplit(self.path / name, self.manifest.splits[name])
            self._splits.setdefault(name, made)
        return self._splits[name]


class CorpusSplit:
    """Blocks of one split, numbered across its parts."""

    def __init__(self, folder: Path, entry: SplitEntry) -> None:
        self._folder = folder
        self._entry = entry
        blocks = [part["blocks"] for part in entry["parts"]]
        self._first_block = np.concatenate([[0], np.cumsum(blocks, dtype=np.int64)])
        self._readers: dict[int, Any] = {}
        self._checked: set[int] = set()
        self._lock = threading.Lock()  # blocks are read by prefetching threads, too
        self.num_blocks = int(entry["blocks"])

    @cached_property
    def block_sequences(self) -> npt.NDArray[np.int64]:
        """int64 [num_blocks]: sequences per block."""
        sizes = (self._batch(index).num_rows for index in range(self.num_blocks))
        return np.fromiter(sizes, dtype=np.int64)

    def block(self, index: int) -> tuple[Array, npt.NDArray[np.int64]]:
        """Block ``index`` as ids uint [T] (a view of the mapped file) and lengths int64 [B].

        The hash of a part is checked before its first block is returned.
        """
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        if (part := self._part_of(index)) not in self._checked:
            entry = self._entry["parts"][part]
            check_part(self._folder / entry["file"], entry["sha256"])
            self._checked.add(part)
        column = self._batch(index).column(0)
        offsets = column.offsets.to_numpy()
        ids = column.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]]
        return ids, np.diff(offsets).astype(np.int64)

    def _batch(self, index: int) -> Any:
        part = self._part_of(index)
        with self._lock:
            reader = self._readers.get(part)
            if reader is None:
                while len(self._readers) >= MAX_OPEN_PARTS:
                    self._readers.pop(next(iter(self._readers)))
                reader = self._readers[part] = self._open(part)
            try:
                return reader.get_batch(index - int(self._first_block[part]))
            except (OSError, pa.ArrowInvalid) as error:
                raise self._damaged(part, error) from None

    def _part_of(self, index: int) -> int:
        return int(np.searchsorted(self._first_block, index, side="right")) - 1

    def _open(self, part: int) -> Any:
        file = self._folder / self._entry["parts"][part]["file"]
        try:
            return pa.ipc.open_file(pa.memory_map(str(file)))
        except (OSError, pa.ArrowInvalid) as error:
            raise self._damaged(part, error) from None

    def _damaged(self, part: int, error: Exception) -> UserError:
        file = self._folder / self._entry["parts"][part]["file"]
        return UserError(
            f"corpus: {file} must be a readable Arrow file, got: {reason_of(error)}; {REBUILD}"
        )
