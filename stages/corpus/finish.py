"""The end of a corpus build: leftovers out, token counts and manifest in."""

import re
from pathlib import Path
from typing import Any

from data.corpus import SPLITS, CorpusManifest, PartEntry, SplitEntry
from data.errors import require
from data.files import sha256_json, write_bytes, write_json
from data.parts import encode_counts
from stages.corpus.pool import Tally
from stages.corpus.worker import PartSettings, part_name

NO_TRAINING_TEXT = (
    "corpus: sources must give at least one training sequence, got none; add text, or lower "
    "corpus.max_length or corpus.heldout_fraction"
)
_OURS = re.compile(r"part-\d{6}\.(arrow|json)|\.part-\d{6}\.(arrow|json)\.\d+\.tmp")


def finish_corpus(
    out: Path, settings: PartSettings, all_special_ids: tuple[int, ...], tally: Tally
) -> CorpusManifest:
    """Write what makes the corpus complete; the manifest comes last.

    Args:
        out: Folder of the corpus.
        settings: What the parts have in common.
        all_special_ids: Ids that are never masked.
        tally: Every committed unit.

    Raises:
        UserError: There is no training sequence.
    """
    splits = {name: _entry(tally.markers(name)) for name in SPLITS}
    require(splits["train"]["sequences"] > 0, NO_TRAINING_TEXT)
    for name in SPLITS:
        _sweep(out / name, tally.markers(name))
    write_bytes(out / "token_counts.arrow", encode_counts(tally.counts))
    texts = {name: [m["text_sha256"] for _, m in tally.markers(name)] for name in SPLITS}
    manifest = CorpusManifest(
        packing=settings.packing,
        max_length=settings.max_length,
        vocab_size=settings.vocab_size,
        token_dtype=settings.dtype.name,
        tokenizer_sha256=settings.tokenizer_sha256,
        special_ids=settings.special_ids,
        all_special_ids=all_special_ids,
        source_fingerprint=sha256_json(texts),
        splits=splits,
    ).seal()
    write_json(out / "manifest.json", manifest.to_dict())
    return manifest


def _entry(markers: list[tuple[int, dict[str, Any]]]) -> SplitEntry:
    def total(field: str) -> int:
        return sum(marker.get(field, 0) for _, marker in markers)

    return SplitEntry(
        documents=total("documents"),
        sequences=total("sequences"),
        tokens=total("tokens"),
        blocks=total("blocks"),
        dropped_tokens=total("dropped_tokens"),
        parts=[_part(index, marker) for index, marker in markers if marker["sequences"]],
    )


def _part(index: int, marker: dict[str, Any]) -> PartEntry:
    return PartEntry(
        file=part_name(index),
        blocks=marker["blocks"],
        sequences=marker["sequences"],
        tokens=marker["tokens"],
        bytes=marker["bytes"],
        sha256=marker["sha256"],
    )


def _sweep(folder: Path, markers: list[tuple[int, dict[str, Any]]]) -> None:
    """Remove what an interrupted run left: temporary files, parts of text no longer there."""
    kept = {part_name(index) for index, marker in markers if marker["sequences"]}
    kept |= {str(Path(part_name(index)).with_suffix(".json")) for index, _ in markers}
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and file.name not in kept:
            file.unlink()
