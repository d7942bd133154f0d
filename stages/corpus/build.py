"""Text to token blocks: read, split, cut into units, tokenise in parallel, commit.

    documents ──by hash──▶ train, heldout ──chunk_bytes──▶ units ──workers──▶ parts ──▶ manifest

A unit depends only on the sources and settings, so a repeated command finds the parts of an
interrupted one and makes the rest.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from distilcache.data.cores import cores
from distilcache.data.corpus.manifest import SPLITS
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, require
from distilcache.data.progress import Bar
from distilcache.data.storage.files import (
    make_folder,
    new_folder,
    read_json,
    remove_temporaries,
    write_json,
)
from distilcache.data.storage.locks import FILE as LOCK
from distilcache.data.storage.locks import locked
from distilcache.stages.corpus.account import Lost, Unusable, no_training_text, remarks, say
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.corpus.finish import finish_corpus
from distilcache.stages.corpus.pool import run_units
from distilcache.stages.corpus.text.fingerprints import fingerprint, unchanged
from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.corpus.text.sources import resolve_sources
from distilcache.stages.corpus.units import Passage, cut_units, split_documents
from distilcache.stages.corpus.unknown import Sample
from distilcache.stages.corpus.worker import PartSettings
from distilcache.stages.models.piece_tokenizer import PieceTokenizer
from distilcache.stages.models.special_tokens import puts_cls_last, role_tokens, special_ids
from distilcache.stages.models.tokenizers import (
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from distilcache.stages.models.wordpiece import train_wordpiece

TRAIN_SAMPLE_BYTES = 1 << 25
"""Bytes at the start of the text that a tokenizer is trained on."""


def build_corpus(
    config: CorpusConfig,
    out: Path,
    tokenizer: str,
    needs: str = "",
    revision: str = "",
    *,
    sample: bool = False,
) -> Corpus:
    """Build the corpus in ``out``; finish an interrupted one, reuse a finished one.

    Args:
        config: Recipe section ``[corpus]``.
        out: Folder of the corpus.
        tokenizer: Folder or hub id of a tokenizer; ``train``: train one on the text.
        needs: What the recipe requires; shown if a path is missing.
        revision: Revision of a tokenizer on the hub; "": the newest.
        sample: It is thrown away after a measurement: nothing is remarked on it.

    Raises:
        UserError: Sources or tokenizer do not fit, or ``out`` has other content.
    """
    out = Path(out)
    sources = resolve_sources(config.sources, needs, say)
    heldout = resolve_sources(config.heldout_sources, needs, say)
    trained = tokenizer == "train"
    loaded = None if trained else load_tokenizer(tokenizer, needs, revision=revision)
    if loaded is not None:
        special_ids(loaded)  # Refuses it before anything is written.
    request = _request(config, loaded, sources, heldout)
    if _is_finished(out, request):
        say(f"{out} is finished and reused")
        return Corpus.open(out)
    fresh = not out.exists() or _is_empty(out)
    try:
        make_folder(out)
    except OSError as error:
        raise UserError(
            f"corpus: output must be a folder that can be made, got {out}: {error.strerror}; "
            "choose another root"
        ) from None
    with locked(out, "corpus"):
        try:
            remove_temporaries(out)
            write_json(out / "build.json", request)
            documents = split_documents(config, sources, heldout)
            size = _total_bytes(config, sources + heldout)
            with contextlib.closing(documents):
                found = _build(config, out, loaded, documents, size)
            for line in () if sample else found:
                say(line)
        except UserError as error:
            useful = any(out.glob("train/part-*.arrow")) and not isinstance(error, Unusable)
            if fresh and not useful:
                shutil.rmtree(out)  # It only has what this call began.
            raise
    return Corpus.open(out)


def _request(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    sources: list[Source],
    heldout: list[Source],
) -> dict[str, Any]:
    """The settings and sources that decide the corpus."""
    values = asdict(config)
    del values["workers"]
    if tokenizer is None:
        values["tokenizer"] = "train"
    else:
        values["tokenizer"] = f"sha256:{tokenizer_fingerprint(tokenizer)}"
        del values["vocab_size"]
    values["sources_found"] = [fingerprint(source) for source in sources + heldout]
    values["heldout_found"] = len(heldout)  # of these, the last ones
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _is_empty(out: Path) -> bool:
    """Whether a folder holds nothing, or what a run left that was killed as it began."""
    return all(p.name == LOCK or fnmatch(p.name, ".build.json.*.tmp") for p in out.iterdir())


def _is_finished(out: Path, request: dict[str, Any]) -> bool:
    """Whether the corpus is finished; an error if ``out`` has other content."""
    if not out.exists() or (out.is_dir() and _is_empty(out)):
        return False
    require(
        (out / "build.json").is_file(),
        f"corpus: output must be an absent or empty folder or a corpus, got {out}; "
        "choose another name or root",
    )
    finished = (out / "manifest.json").exists()
    there = read_json(out / "build.json", "corpus: build.json", remedy=f"; delete {out}")
    require(
        isinstance(there, dict)
        and isinstance(there.get("sources_found"), list)
        and all(isinstance(item, dict) for item in there["sources_found"]),
        f"corpus: {out / 'build.json'} must have the settings of a corpus, got something else; "
        f"delete {out}",
    )
    if finished and there.get("tokenizer") == "train" and request["tokenizer"] != "train":
        # Trained on the text then, given now: it may be the same one.
        trained = Corpus.open(out).manifest.tokenizer_sha256
        there = {**there, "tokenizer": f"sha256:{trained}"}
        there.pop("vocab_size", None)
    if differing := _differing(there, request, finished):
        fields = "; ".join(_difference(k, there.get(k), request.get(k)) for k in differing)
        raise UserError(
            f"corpus: {out} must be from the same settings and sources, got another: {fields}; "
            "put that back to use this corpus and what is made from it, or choose another name or "
            "root"
        )
    return finished


def _differing(there: dict[str, Any], request: dict[str, Any], finished: bool) -> list[str]:
    """Names of the fields that differ; sources by what they hold, not by how they are named."""
    named = ("sources", "heldout_sources")
    by_content = (*named, "sources_found", "heldout_found")
    differing = [
        key
        for key in sorted(there.keys() | request.keys())
        if key not in by_content and there.get(key) != request.get(key)
    ]
    same_names = all(there.get(key) == request[key] for key in named)
    if same_names and not finished:
        return differing  # Each part has the hash of its text: parts of unchanged text stay valid.
    # Until 0.2.0 nobody wrote down how many are held out.
    same_split = there.get("heldout_sources") == request["heldout_sources"]
    if (
        there.get("heldout_found", request["heldout_found"] if same_split else -1)
        != (request["heldout_found"])
    ):
        differing.append("heldout_sources")
    old, new = there["sources_found"], request["sources_found"]
    if len(old) != len(new) or not all(map(unchanged, old, new)):
        differing.append("sources_found")
    return differing


def _difference(name: str, there: Any, asked: Any) -> str:
    if name != "sources_found":
        return f"{name} is {there!r} there and {asked!r} now"
    old = {str(item.get("source")): item for item in there}
    new = {item["source"]: item for item in asked}
    both = old.keys() & new.keys()
    changed = sorted((old.keys() | new.keys()) - {k for k in both if unchanged(old[k], new[k])})
    changed = changed or sorted(new)  # in another order
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"text is new, gone or changed: {', '.join(changed[:3])}{more}"


def _total_bytes(config: CorpusConfig, sources: list[Source]) -> int | None:
    """Approximate bytes of text, if known without reading it."""
    if all(source.kind == "txt" and not source.compression for source in sources):
        sizes = [source.size() for source in sources]
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes):
            return min(sum(known), config.max_bytes or sum(known))
    return config.max_bytes or None


def _build(
    config: CorpusConfig,
    out: Path,
    tokenizer: PreTrainedTokenizerFast | None,
    documents: Iterator[Passage],
    total_bytes: int | None,
) -> list[str]:
    """Make the corpus; returns remarks on it."""
    if tokenizer is None:
        tokenizer, documents = _train_tokenizer(config.vocab_size, documents)
    settings = PartSettings(
        folder=str(out),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        packing=config.packing,
        max_length=config.max_length,
        min_tokens=config.min_tokens,
        block_sequences=config.block_sequences,
        vocab_size=vocabulary_size(tokenizer),
        special_ids=special_ids(tokenizer),
        role_tokens=role_tokens(tokenizer),
        cls_last=puts_cls_last(tokenizer),
        by_code=isinstance(tokenizer, PieceTokenizer),
    )
    _save_tokenizer(tokenizer, out / "tokenizer")
    for name in SPLITS:
        make_folder(out / name)
    sample = Sample()
    units = cut_units(sample.watch(documents), config.chunk_bytes)
    with Bar(desc="corpus", unit="B", unit_scale=True, total=total_bytes) as bar:
        tally = run_units(
            settings,
            units,
            workers=config.workers or cores(),
            pool_from=2 * config.chunk_bytes,
            progress=bar.update,
        )
    if tally.kept:
        say(f"{tally.kept} finished parts are kept")
    lost = sample.lost(settings) if tally.unknown else Lost()
    manifest = finish_corpus(out, settings, tokenizer, tally, lost)
    asked = 0.0 if config.heldout_sources else config.heldout_fraction
    return list(remarks(settings, manifest, str(tokenizer.name_or_path), lost, asked))


def _train_tokenizer(
    vocab_size: int, documents: Iterator[Passage]
) -> tuple[PreTrainedTokenizerFast, Iterator[Passage]]:
    """Train on the start of the text; returns the tokenizer and the whole stream again."""
    first: list[Passage] = []
    size = 0
    with Bar(desc="corpus: reading", unit="B", unit_scale=True) as bar:
        for passage in documents:
            first.append(passage)
            size += len(passage.data)
            bar.update(len(passage.data))
            if size >= TRAIN_SAMPLE_BYTES:
                break
    sample = [passage.text for passage in first if passage.split == "train"]
    require(
        bool(sample),
        "corpus: sources must give text to train a tokenizer on, got "
        f"{no_training_text(sum(passage.begins for passage in first))}",
    )
    say(f"training a tokenizer on {size / 1e6:.1f} MB of text")
    return train_wordpiece(sample, vocab_size), chain(first, documents)


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer in place of that of an interrupted run, perhaps of other text."""
    try:
        with new_folder(folder) as part:
            tokenizer.save_pretrained(part)
            if isinstance(tokenizer, PieceTokenizer):
                tokenizer.backend_tokenizer.save(str(part / "tokenizer.json"))
    except UserError:
        raise
    except Exception as error:  # of the Rust library
        raise UserError(
            f"corpus: {folder} must be writable, got: {error}; free space or choose another "
            "root, then repeat the command"
        ) from None
