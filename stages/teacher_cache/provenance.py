"""What a cache is made from: compared when a run goes on, recorded for readers."""

import contextlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from distilcache.data.cache.cache import Cache, read_manifest
from distilcache.data.cache.schema import SCHEMA_VERSION
from distilcache.data.cache.shards import read_marker
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, reason_of, require
from distilcache.data.masks.masking import MaskingConfig
from distilcache.data.storage.files import open_plain, read_json, sha256_json, write_json
from distilcache.stages.models.cards import masked_line, origin_of_teacher
from distilcache.stages.models.checkpoints import configuration
from distilcache.stages.models.families import SILENT_FIELDS
from distilcache.stages.models.hub import place_on_hub
from distilcache.stages.models.tokenizers import load_tokenizer
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.config import CacheConfig

FREE_FIELDS = ("rounds", "batch_tokens", "row_chunk")
"""Cache fields that may change between runs: they do not change what is stored."""
RECORDED = ("distilcache", "torch", "transformers", "numpy", "pyarrow", "zstandard")


def identity_of(
    build: Build,
    corpus: Corpus,
    teacher_sha256: str | None,
    dtype: str,
    ensemble_sha256: Sequence[str],
) -> dict[str, Any]:
    """Everything that decides the content of the shards.

    ``teacher_sha256`` is the hash of the checkpoint in the cache, None where no teacher is run;
    ``ensemble_sha256`` are those of the teachers that are averaged with it.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "corpus_fingerprint": corpus.manifest.fingerprint,
        "tokenizer_sha256": corpus.manifest.tokenizer_sha256,
        "teacher_sha256": teacher_sha256,
        "dtype": dtype if teacher_sha256 else None,
        **_settings(build.masking, build.config, run=teacher_sha256 is not None),
        **({"ensemble_sha256": list(ensemble_sha256)} if ensemble_sha256 else {}),
    }


def _settings(masking: MaskingConfig, config: CacheConfig, *, run: bool) -> dict[str, Any]:
    """Masking and cache settings of an identity; without ``run`` no teacher is."""
    stored = {k: v for k, v in asdict(config).items() if k not in FREE_FIELDS}
    if not config.relation_layer:  # As in caches of before these fields.
        stored = {k: v for k, v in stored.items() if not k.startswith("relation_")}
    stored["logit_positions"] = config.logit_positions or config.positions
    if not run:
        stored = {k: stored[k] for k in ("mask_only", "blocks_per_shard")}
    masked = asdict(masking)
    if masked["unit"] == "token":  # caches made before there was a choice do not name it
        del masked["unit"]
    return {
        "masking": masked,
        "cache": {k: list(v) if isinstance(v, tuple) else v for k, v in stored.items()},
    }


def check_settings_of(cache: Cache, masking: MaskingConfig, config: CacheConfig) -> None:
    """Refuse a finished cache of other settings: its students would pass for those of these.

    Raises:
        UserError: Lists the fields that differ, or the cache has fewer rounds.
    """
    _require_same(Path(cache.path), settings_that_differ(cache, masking, config))
    require(
        cache.manifest.rounds >= config.rounds,
        f"cache: {cache.path} must have the {config.rounds} rounds of the recipe, got "
        f"{cache.manifest.rounds}; run distilcache teacher-cache first",
    )


def settings_that_differ(
    cache: Cache, masking: MaskingConfig, config: CacheConfig
) -> list[tuple[str, Any, Any]]:
    """Fields of masking and cache with their values in a finished cache and now, where not equal.

    None: not set, which is the default.
    """
    asked = _settings(masking, config, run=not config.mask_only)
    made = cache.manifest.provenance["identity"]
    return _differences({name: made[name] for name in asked}, asked)


def environment_of(build: Build, corpus: Corpus, device: str) -> dict[str, Any]:
    """What does not decide the content, but helps to explain it, and the cards of students."""
    commit = "".join(place_on_hub(*named)[1] for named in build.checkpoints[:1])
    return {
        "teacher": build.teacher,
        **({"teacher_revision": build.teacher_revision} if build.teacher_revision else {}),
        **({"teacher_commit": commit} if commit else {}),
        **({"ensemble": list(build.ensemble)} if build.ensemble else {}),
        "device": device,
        "python": platform.python_version(),
        "git_revision": build.revision,
        "packages": {name: _version(name) for name in RECORDED},
        "card": _for_cards(build, corpus),
    }


def _for_cards(build: Build, corpus: Corpus) -> dict[str, Any]:
    """What the cards of students say of teacher and text; of several teachers what all share."""
    origins = [origin_of_teacher(*named) for named in build.checkpoints]
    shared = {
        name: value
        for name, value in (origins[0] if origins else {}).items()
        if all(other.get(name) == value for other in origins)
    }
    ids = [origin["base_model"] for origin in origins if "base_model" in origin]
    values = {
        **shared,
        "base_model": ids[0] if len(ids) == 1 else ids,
        "datasets": corpus.datasets,
        "example": masked_line(corpus, load_tokenizer(str(corpus.tokenizer_dir))),
    }
    return {name: value for name, value in values.items() if value}


def holds_weights(checkpoint: Path, model: Any) -> bool:
    """Whether a saved checkpoint holds exactly the weights of a model, bit for bit.

    Then the model need not be saved again to learn the hash of its file.
    """
    path = checkpoint / "model.safetensors"
    if not path.exists():
        return False
    state = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name in state]  # noqa: SIM118
            # Tied tensors are saved under one of their names.
            saved = {state[name].data_ptr() for name in names}
            return all(tensor.data_ptr() in saved for tensor in state.values()) and all(
                torch.equal(file.get_tensor(name), state[name].cpu()) for name in names
            )
    except (OSError, SafetensorError):
        return False


def settle_provenance(
    out: Path, identity: dict[str, Any], environment: Callable[[], dict[str, Any]]
) -> None:
    """Write the provenance of a new cache, or compare it with that of an existing one.

    Where the file is lost or damaged, the shards tell whether they are of this provenance.

    Raises:
        UserError: The folder holds something else, or a cache of another provenance; lists the
            fields that differ.
    """
    path = out / "provenance.json"
    there: Any = None
    with contextlib.suppress(UserError):
        there = read_json(path, "cache: provenance")
    old = there.get("identity") if isinstance(there, dict) else None
    if old == identity:
        return
    made_from = _identity_of_shards(out)
    if made_from == sha256_json(identity):
        finished = (out / "manifest.json").exists()
        known = read_manifest(out).provenance if finished else {}
        write_json(path, dict(known) or {"identity": identity, "environment": environment()})
    elif isinstance(old, dict):
        _require_same(out, _differences(old, identity))
    elif made_from or path.exists():
        raise UserError(
            f"cache: {path} must say what the cache is made from, got none or a damaged file; "
            "restore it from a copy, or use another name or root"
        )
    elif out.exists() and not all(p.name.endswith((".tmp", ".lock")) for p in out.iterdir()):
        raise UserError(
            f"cache: {out} must be empty or a teacher cache, got other files; choose another "
            "root or name, or move them away"
        )
    else:
        write_json(path, {"identity": identity, "environment": environment()})


def _identity_of_shards(out: Path) -> str:
    """Hash of the identity that the first sound marker names; "": there is none."""
    for path in sorted(out.glob("shards/r*/shard-*.json")):
        with contextlib.suppress(UserError):
            return str((read_marker(path.with_suffix(".tar")) or {})["identity"])
    return ""


def check_configuration(out: Path, config: Any) -> None:
    """Compare a teacher's configuration with that of the copy in the cache, where there is one.

    The same weights with another number of attention heads, another activation or epsilon are
    another teacher, which the hash of the weights does not show.

    Raises:
        UserError: Lists the fields that differ.
    """
    kept = out / "teacher" / "config.json"
    if not kept.exists():
        return
    try:
        open_plain(kept).close()
        old = configuration(kept.parent, "teacher")
    except (OSError, UserError) as error:
        raise UserError(
            f"cache: {kept} must be a teacher's configuration, got: {reason_of(error)}; delete "
            "the file and repeat the command, which saves it again"
        ) from None
    _require_same(out, _differences(settings_of(old), settings_of(config), "teacher.config"))


def settings_of(config: Any) -> dict[str, Any]:
    """The fields of a model's configuration that may change its outputs."""
    return {k: v for k, v in config.to_dict().items() if k not in SILENT_FIELDS}


def _require_same(out: Path, differing: list[tuple[str, Any, Any]]) -> None:
    if differing:
        fields = [f"{name} was {_short(old)}, now {_short(new)}" for name, old, new in differing]
        raise UserError(
            f"cache: {out} must have been made with the same settings, got differing fields: "
            f"{'; '.join(fields)}; put them back to use this cache, or use another name or root "
            "for a new one"
        )


def _differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted names of the leaves that differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if old == new else [(where, old, new)]


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
