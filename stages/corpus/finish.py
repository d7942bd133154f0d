"""The end of a corpus build: remove leftovers, write token counts and manifest."""

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from distilcache.data.corpus.manifest import SPLITS, CorpusManifest, PartEntry, SplitEntry
from distilcache.data.corpus.parts import encode_counts
from distilcache.data.storage.files import hashes_of, sha256_json, write_bytes, write_json
from distilcache.stages.corpus.account import Lost, check_text
from distilcache.stages.corpus.pool import Tally
from distilcache.stages.corpus.worker import PartSettings, part_name
from distilcache.stages.models.special_tokens import never_masked

_OURS = re.compile(r"part-\d{6}\.(arrow|json)|\.part-\d{6}\.(arrow|json)\.\d+\.tmp")


def finish_corpus(
    out: Path,
    settings: PartSettings,
    tokenizer: PreTrainedTokenizerFast,
    tally: Tally,
    lost: Lost,
) -> CorpusManifest:
    """Write token counts and, last, the manifest, which makes the corpus complete.

    Raises:
        Unusable: The training text is of no use.
    """
    splits = {name: _entry(tally.markers(name)) for name in SPLITS}
    special = never_masked(tokenizer)
    ordinary = int(tally.counts.sum() - tally.counts[list(special)].sum())
    check_text(settings, splits, ordinary, str(tokenizer.name_or_path), lost)
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
        all_special_ids=special,
        source_fingerprint=sha256_json(texts),
        splits=splits,
        tokenizer_files=hashes_of(out / "tokenizer"),
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
        text_tokens=total("text_tokens"),
        unknown_tokens=total("unknown_tokens"),
        dropped_tokens=total("dropped_tokens"),
        short_sequences=total("short_sequences"),
        unknown_sequences=total("unknown_sequences"),
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
    """Remove leftovers of an interrupted run: temporary files, parts of text that was removed."""
    kept = {part_name(index) for index, marker in markers if marker["sequences"]}
    kept |= {str(Path(part_name(index)).with_suffix(".json")) for index, _ in markers}
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and file.name not in kept:
            file.unlink()
