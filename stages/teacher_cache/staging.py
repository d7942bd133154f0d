"""The teacher in a cache: whether it fits the corpus, and its checkpoint in ``teacher/``."""

import os
import secrets
import shutil
from pathlib import Path

from safetensors import SafetensorError

from data.cache import codec_path
from data.corpus import Corpus
from data.encoder import mask_kind
from data.errors import UserError, require
from data.families import FAMILIES, Family
from data.files import sha256_file, sync_folder, sync_tree
from data.schema import Encoding
from data.tokenizers import (
    load_tokenizer,
    saved_fingerprint,
    special_ids,
    tokenizer_fingerprint,
)
from stages.teacher_cache.adapters import Teacher
from stages.teacher_cache.config import CacheConfig

WEIGHTS = "model.safetensors"


def check_fit(teacher: Teacher, name: str, corpus: Corpus, config: CacheConfig) -> None:
    """Tokenizer, lengths and top-k must fit the teacher."""
    manifest = corpus.manifest
    tokenizer = load_tokenizer(name)
    found = tokenizer_fingerprint(tokenizer)
    require(
        len(tokenizer) <= teacher.vocab_size,
        f"teacher: tokenizer must have at most the model's {teacher.vocab_size} ids, got "
        f"{len(tokenizer)} in {name!r}; use the tokenizer that the model was trained with",
    )
    require(
        found == manifest.tokenizer_sha256,
        f"teacher: tokenizer must be the one the corpus was made with (sha256 "
        f"{manifest.tokenizer_sha256[:16]}), got {found[:16]} ({len(tokenizer)} ids against "
        f"{manifest.vocab_size}) from {name!r}; make the corpus anew with that tokenizer",
    )
    roles = special_ids(tokenizer)
    require(
        roles == manifest.special_ids,
        f"teacher: tokenizer must have the special ids that the corpus was made with "
        f"({manifest.special_ids}), got {roles} from {name!r}; make the corpus anew with that "
        "tokenizer",
    )
    limit = teacher.max_length
    require(
        limit is None or manifest.max_length <= limit,
        f"corpus: max_length must be at most the teacher's {limit} positions, got "
        f"{manifest.max_length}; make the corpus anew with a smaller corpus.max_length",
    )
    family = FAMILIES.get(teacher.model.config.model_type, Family())
    lengths = {(split["sequences"], split["tokens"]) for split in manifest.splits.values()}
    require(
        not family.even or all(t == n * manifest.max_length for n, t in lengths),
        f"corpus: sequences must all be of one length for a teacher of type "
        f"{teacher.model.config.model_type!r} ({family.even}), got shorter ones; make the corpus "
        "anew with corpus.packing='blocks'",
    )
    policies = {"positions": config.positions, "logit_positions": config.logit_positions}
    for name, policy in policies.items():
        require(
            mask_kind(teacher.model.config) != "permutation" or policy in ("", "masked"),
            f"cache: {name} must be 'masked' for a teacher of type "
            f"{teacher.model.config.model_type!r}, got {policy!r}; it predicts masked positions "
            "alone",
        )
    require(
        config.top_k <= teacher.vocab_size,
        f"cache: top_k must be at most the vocabulary size {teacher.vocab_size}, got "
        f"{config.top_k}",
    )
    bad = [n for n in config.hidden_layers if not -1 <= n <= teacher.num_layers]
    require(
        not bad,
        f"cache: hidden_layers must lie between 0 and {teacher.num_layers} (or -1: the last), "
        f"got {bad}",
    )
    require(
        not config.residual_samples
        or not {-1, teacher.num_layers}.isdisjoint(config.hidden_layers),
        "cache: hidden_layers must hold the last layer (-1) where residual_samples is above 0, "
        f"got {list(config.hidden_layers)}; residuals are what replay from it gets wrong",
    )
    require(
        config.top_k > 0 or config.tail_samples > 0 or config.hidden_dtype != "none",
        "cache: top_k, tail_samples or hidden_dtype must store something, got 0, 0 and 'none'; set "
        "one of them, or cache.mask_only = true",
    )


def check_maskable(corpus: Corpus) -> None:
    """Whether the corpus holds tokens that can be masked: without any, nothing is learnt from it.

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
    """Whether the corpus still has the tokenizer that made it, and the cache a copy of that.

    Raises:
        UserError: A file is damaged or another one: ids would be read as other words.
    """
    wanted = corpus.manifest.tokenizer_sha256
    remedies = {
        corpus.tokenizer_dir: "restore it, or make the corpus anew in another folder",
        kept: "delete it and repeat the command, which copies the corpus's",
    }
    for folder, remedy in remedies.items():
        path = folder / "tokenizer.json"
        if path.exists():
            found = saved_fingerprint(path)
            require(
                found == wanted,
                f"cache: {path} must be the tokenizer that the corpus was made with (sha256 "
                f"{wanted[:16]}), got {found[:16]}; {remedy}",
            )


def for_all(name: str) -> str:
    """A checkpoint's name for other processes, which may have another working folder."""
    local = Path(name)
    return str(local.absolute()) if local.is_dir() else name


def stage_teacher(out: Path, teacher: Teacher | None, corpus: Corpus) -> Path:
    """Write the teacher's checkpoint and tokenizer into a temporary folder beside the cache."""
    staged = out / f".teacher.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        if teacher is not None:
            # Under today's names: those of the file that it came from may be others.
            teacher.model.save_pretrained(
                staged, max_shard_size="1000GB", save_original_format=False
            )
            # Weights come readable by their owner alone; a cache is as open as its folder.
            (staged / WEIGHTS).chmod((staged / "config.json").stat().st_mode & 0o777)
        else:
            staged.mkdir()
        for file in sorted(corpus.tokenizer_dir.iterdir()):
            shutil.copy(file, staged / file.name)
        sync_tree(staged)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise UserError(
            f"cache: {out} must be writable and have room for the teacher, got: "
            f"{getattr(error, 'strerror', None) or error}; free space and repeat the command"
        ) from None
    return staged


def put_teacher(staged: Path, kept: Path) -> None:
    """Move the staged folder into place, or the files that are missing there, and the weights.

    Another process may have put the same there first; or weights that were there have been found
    to be others than the teacher's, whose hash the cache knows.
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


def is_whole(kept: Path, corpus: Corpus) -> bool:
    """Whether a teacher's folder has its configuration and all files of the tokenizer."""
    names = [file.name for file in corpus.tokenizer_dir.iterdir()]
    return all((kept / name).is_file() for name in ("config.json", *names))


def in_place(out: Path, encoding: Encoding) -> bool:
    """Whether nothing is left to write before the shards."""
    coded = [h.layer for h in encoding.hidden if h.dtype == "coded"]
    needed = [out / "provenance.json", out / "teacher", *(codec_path(out, n) for n in coded)]
    return all(path.exists() for path in needed)


def check_weights(kept: Path, sha256: str) -> None:
    """Whether the checkpoint in a cache is still the one that the cache was begun with.

    Raises:
        UserError: It is not: what it says would be taken for the teacher's word.
    """
    path = kept / WEIGHTS
    require(
        path.is_file() and sha256_file(path) == sha256,
        f"cache: {path} must be the teacher that the cache was begun with, got other weights or "
        "none; repeat the command, which puts them right",
    )
