"""The teacher of a cache: does it fit the corpus, and its checkpoint in ``teacher/``."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from distilcache.data.cache.schema import Encoding
from distilcache.data.cache.teacher_files import codec_path
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import sync_folder, sync_tree, temporary_of
from distilcache.stages.models.hub import quiet
from distilcache.stages.models.tokenizers import saved_fingerprint
from distilcache.stages.teacher_cache import fit
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.provenance import holds_weights
from distilcache.stages.teacher_cache.teacher import Teacher

WEIGHTS = "model.safetensors"


def check_fit(
    teacher: Teacher, name: str, corpus: Corpus, config: CacheConfig, revision: str = ""
) -> None:
    """Check that corpus and settings fit the teacher, see :mod:`fit`."""
    manifest = corpus.manifest
    wanted = fit.Wanted(
        tokenizer_sha256=manifest.tokenizer_sha256,
        vocab_size=manifest.vocab_size,
        special_ids=manifest.special_ids,
    )
    fit.check_tokenizer(fit.tokenizer_of(name, revision), name, teacher.vocab_size, wanted)
    splits = manifest.splits.values()
    even = all(
        split["sequences"] <= 1 or split["tokens"] == split["sequences"] * manifest.max_length
        for split in splits
    )
    fit.check_settings(teacher.model.config, manifest.max_length, even, config)


def check_maskable(corpus: Corpus) -> None:
    """Check that the corpus holds tokens that can be masked.

    Raises:
        UserError: All of its tokens are special or unknown ones.
    """
    special = list(corpus.manifest.all_special_ids)
    tokens = int(corpus.token_counts.sum())
    require(
        tokens > int(corpus.token_counts[special].sum()),
        f"cache: corpus must hold tokens that can be masked, got special and unknown ones alone "
        f"({tokens:,}) in {corpus.path}; make it anew with a tokenizer that knows its text",
    )


def check_tokenizer(corpus: Corpus, kept: Path) -> None:
    """Check that the corpus has the tokenizer that made it, and that the cache has the same.

    Raises:
        UserError: A file is damaged or another one, so ids would stand for other words.
    """
    wanted = corpus.manifest.tokenizer_sha256
    remedies = {
        corpus.tokenizer_dir: "restore it, or make the corpus anew in another folder",
        kept: "delete it and repeat the command, which copies the corpus's",
    }
    for folder, remedy in remedies.items():
        path = folder / "tokenizer.json"
        if path.is_file():
            found = saved_fingerprint(path)
            require(
                found == wanted,
                f"cache: {path} must be the tokenizer that the corpus was made with (sha256 "
                f"{wanted[:16]}), got {found[:16]}; {remedy}",
            )
    fault = corpus.tokenizer_fault(corpus.tokenizer_dir)
    require(not fault, f"cache: {fault}; {remedies[corpus.tokenizer_dir]}")


def check_copies(corpus: Corpus, out: Path) -> None:
    """Check the tokenizer in a cache before a manifest vouches for it.

    Raises:
        UserError: A file is damaged.
    """
    if not (out / "manifest.json").exists():
        fault = corpus.tokenizer_fault(out / "teacher")
        require(
            not fault,
            f"cache: {fault}; delete it and repeat the command, which copies the corpus's",
        )


def stage_teacher(out: Path, teacher: Teacher | None, corpus: Corpus) -> Path:
    """Write the teacher's checkpoint and tokenizer into a temporary folder in the cache."""
    staged = temporary_of(out / "teacher")
    try:
        if teacher is not None:
            # Tensor names are the library's present ones; an old checkpoint may have others.
            with quiet():
                teacher.model.save_pretrained(
                    staged, max_shard_size="1000GB", save_original_format=False
                )
            # Weights are written readable by their owner only; a cache is as open as its folder.
            (staged / WEIGHTS).chmod((staged / "config.json").stat().st_mode & 0o777)
        else:
            staged.mkdir()
        for name in _tokenizer_files(corpus):
            shutil.copy(corpus.tokenizer_dir / name, staged / name)
        sync_tree(staged)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise UserError(
            f"cache: {out} must be writable and have room for the teacher, got: "
            f"{getattr(error, 'strerror', None) or error}; free space and repeat the command"
        ) from None
    return staged


def put_teacher(staged: Path, kept: Path) -> None:
    """Move the staged folder into place; where there is one, its weights and what is missing.

    The folder is there where another process has put the same there first, or where its weights
    are not the teacher's.
    """
    try:
        staged.rename(kept)
    except OSError:
        if not kept.is_dir():
            raise
        for file in staged.iterdir():
            if file.name == WEIGHTS or not (kept / file.name).exists():
                file.replace(kept / file.name)
        sync_folder(kept)
    sync_folder(kept.parent)


def is_whole(kept: Path, corpus: Corpus, teacher: Teacher | None) -> bool:
    """Whether a teacher's folder has all files of the tokenizer and, of a teacher, its own."""
    names = _tokenizer_files(corpus)
    if teacher is not None:
        names.append("config.json")
    return all((kept / name).is_file() for name in names) and (
        teacher is None or holds_weights(kept, teacher.model)
    )


def _tokenizer_files(corpus: Corpus) -> list[str]:
    """Names of the tokenizer's files, without what else lies in its folder.

    Corpora of version 0.2.0 and before do not list them.
    """
    plain = (path.name for path in sorted(corpus.tokenizer_dir.iterdir()) if path.is_file())
    listed = corpus.manifest.tokenizer_files
    return [name for name in plain if (name in listed if listed else name[0] != ".")]


def in_place(out: Path, encoding: Encoding) -> bool:
    """Whether nothing is left to write before the shards."""
    coded = [stored for stored in encoding.states if stored.dtype == "coded"]
    needed = [out / "provenance.json", out / "teacher", *(codec_path(out, n) for n in coded)]
    return all(path.exists() for path in needed)
