"""``distilcache push``: a finished model as a repository of the Hugging Face hub."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, one_line, require
from distilcache.data.storage.files import read_json
from distilcache.pipeline.report.text import short_bytes

OF_A_RUN = ("training.json", "metrics.jsonl")
"""Files of a student that say how its training went; they stay here."""


def push_command(
    folder: Path, repo: str, private: bool, revision: str
) -> tuple[dict[str, Any], str]:
    """Send a model in one commit; its repository is made where there is none.

    Args:
        folder: Of a student, or of another model in Hugging Face layout.
        repo: ``OWNER/NAME``, or ``NAME`` of one's own.
        private: Whether only its owner may see it.
        revision: Branch, made where there is none; "": ``main``.

    Returns:
        Values for JSON, and the text for people.

    Raises:
        UserError: Bad input; nothing was sent then. Or the hub refuses.
    """
    _check_name(repo)
    files = dict(_files(folder))
    place, commit = _sent(files, repo, private, revision, f"{folder.resolve().name} by distilcache")
    values: dict[str, Any] = {
        "path": str(folder),
        "repo": place.repo_id,
        "url": str(place),
        "commit": commit,
        "files": sorted(files),
        "bytes": sum(path.stat().st_size for path in files.values()),
    }
    size = short_bytes(values["bytes"])
    return values, f"push: {folder} is at {place} ({len(files)} files, {size})"


def _sent(
    files: Mapping[str, Path], repo: str, private: bool, revision: str, message: str
) -> tuple[Any, str]:
    """The repository, and the commit that has put all files into it."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    require(
        get_token() is not None,
        "push: hub must know who you are, got no token; run hf auth login, or set HF_TOKEN",
    )
    api = HfApi()
    try:
        place = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(place.repo_id).private:
            raise UserError(
                f"push: repository must be private, got {place.repo_id}, which everybody sees; "
                "make it private on the hub, or leave --private out"
            )
        if revision:
            api.create_branch(place.repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            place.repo_id,
            [
                CommitOperationAdd(name, _for_hub(path, place.repo_id))
                for name, path in files.items()
            ],
            commit_message=message,
            revision=revision or None,
        )
    except UserError:
        raise
    except Exception as error:  # the client's own types, and those of the network
        raise UserError(
            f"push: hub must take {repo}, got: {one_line(error)}; check the name, the token's "
            "rights and the network, then repeat the command"
        ) from None
    return place, done.oid


def _check_name(repo: str) -> None:
    """Refuse a name that the hub would refuse, before anything is asked of it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(
            f"push: REPO must be OWNER/NAME or NAME of letters, digits, - _ . (at most 96; not - "
            f"or . at an end, no -- or .., not ending in .git), got {repo!r}; choose another name"
        ) from None


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of what belongs to a finished model, those of its modules as well.

    Raises:
        UserError: There is none, or it is not finished, or damaged.
    """
    from distilcache.stages.student_train.output import read_record, require_sound

    require(
        (folder / "config.json").is_file() and any(folder.glob("*.safetensors")),
        f"push: STUDENT must be the folder of a finished model, got {folder} without config.json "
        "or weights; pass one of <root>/<name>/students",
    )
    require_sound(folder, "push")
    require(
        not (folder / "training.json").is_file() or "result" in read_record(folder, "push"),
        f"push: STUDENT must be a finished model, got {folder}, whose training has not ended; run "
        "the command that trains it again",
    )
    modules = folder / "modules.json"
    listed = read_json(modules, "push: modules.json") if modules.is_file() else []
    try:
        folders = ["", *(module["path"] for module in listed)]
    except (TypeError, KeyError):
        raise UserError(
            f"push: {modules} must list modules with their paths, got something else; export the "
            "student again"
        ) from None
    onnx = ["onnx"] if (folder / "onnx").is_dir() else []
    for name in sorted({*folders, *onnx}):
        # git keeps no empty folders, as those of modules without settings are
        for path in sorted((folder / name).glob("*")):
            if path.is_file() and not path.name.startswith(".") and path.name not in OF_A_RUN:
                yield path.relative_to(folder).as_posix(), path


def _for_hub(path: Path, repo: str) -> Path | bytes:
    """A file as it is; of a card's examples the model is the one on the hub."""
    from distilcache.stages.models.cards import PLACE

    if path.name != "README.md":
        return path
    return path.read_bytes().replace(json.dumps(PLACE).encode(), json.dumps(repo).encode())
