"""Where a checkpoint or tokenizer is: a folder, or a hub id. No torch here."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, require, tell

HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def folder_of(name: str | Path, *, where: str, revision: str = "", needs: str = "") -> Path | None:
    """The folder of a checkpoint; None where the hub has to be asked for it.

    A hub id that the hub does not answer for is looked for among what was downloaded before.

    Args:
        name: Folder or hub id; a ``Path`` is a folder.
        where: Stage and what is asked for, for errors: ``teacher: model``.
        revision: Branch, tag or commit on the hub; "": the newest.
        needs: What to do where the folder is missing, for the error.

    Raises:
        UserError: There is no such folder, or nothing under the hub id, or a revision of a folder.
    """
    text, path = str(name), Path(name).expanduser()
    if isinstance(name, Path) or path.exists() or _HUB_ID.fullmatch(text) is None:
        require(
            path.is_dir(),
            f"{where} must be a folder{'' if isinstance(name, Path) else ' or a hub id'}, "
            f"got {text!r}, which does not exist; "
            f"{needs or 'correct the path'}",
        )
        require(
            not revision,
            f"{where} must be a hub id where a revision of it is asked for, got the folder "
            f"{text!r} and {revision!r}; leave the revision out",
        )
        return path
    if hub_answers(text, revision):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision or None, local_files_only=True))
    except Exception:  # nothing of it is here; the client's own types
        asked = f"{text!r}" + (f" at revision {revision!r}" if revision else "")
        raise UserError(
            f"{where} must be a folder, or a hub id that can be reached, got {asked}; correct the "
            "path, or download it where there is a network and pass its path"
            f"{f'; {needs}' if needs else ''}"
        ) from None


@cache
def hub_answers(hub_id: str, revision: str) -> bool:
    """Ask the hub, once a process, whether it has this id.

    transformers' own retries take most of a minute to give up.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(hub_id, revision=revision or None, timeout=HUB_TIMEOUT_S)
    except Exception:  # No network, offline mode, no such id: the local copy is all there is.
        return False
    return True


def place_on_hub(name: str, revision: str) -> tuple[str, str]:
    """Hub id and commit of a checkpoint; two empty texts where it is a plain folder.

    A folder that the hub's client has downloaded says what it is.
    """
    folder = folder_of(name, where="teacher: model", revision=revision)
    if folder is None:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT_S)
        except Exception:  # The network is gone since it was asked.
            return name, ""
        return name, info.sha or ""
    hub_id = downloaded_id(folder)
    return (hub_id, folder.name) if hub_id else ("", "")


def downloaded_id(folder: Path) -> str:
    """The hub id of a folder that the hub's client has downloaded; "": it is another one."""
    repository = folder.absolute().parent.parent.name
    if folder.absolute().parent.name != "snapshots" or not repository.startswith("models--"):
        return ""
    return repository.removeprefix("models--").replace("--", "/", 1)


def names_on_hub(name: str, revision: str) -> list[str]:
    """Names of the files of a hub id, without those in folders."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT_S)
    return [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]


def source(folder: Path | None, revision: str) -> dict[str, Any]:
    """Where ``from_pretrained`` may look, and that it runs no code of a checkpoint."""
    place = {"revision": revision or None} if folder is None else {"local_files_only": True}
    return {"trust_remote_code": False, **place}


def own_code(settings: Mapping[str, Any]) -> str:
    """What to do with a checkpoint that cannot be read, where its code lies beside it; else "".

    ``settings`` are those of its config.json, or of its tokenizer_config.json.
    """
    files = code_files(settings)
    remedy = "which distilcache does not run; use a model that transformers holds"
    return f"its code lies in the repository ({files}), {remedy}" if files else ""


def tell_own_code(
    settings: Mapping[str, Any], classes: Collection[str], used: Any, what: str
) -> None:
    """One line where a checkpoint names code for one of these classes, and opens without it.

    transformers takes its own class for a type that it knows, in silence.

    Args:
        settings: As in :func:`own_code`.
        classes: Those of transformers that stand for what is read of the checkpoint.
        used: What has been opened.
        what: Stage, what was asked for, and name of the checkpoint.
    """
    if files := code_files(settings, classes):
        tell(
            f"{what} has code of its own ({files}), which distilcache does not run: it is read as "
            f"transformers' {type(used).__name__}; if the code computes anything else, use another "
            "checkpoint"
        )


def code_files(settings: Mapping[str, Any], classes: Collection[str] = ()) -> str:
    """Files of code that ``auto_map`` names for some classes, or for any; "": there are none."""
    named = settings.get("auto_map") or {}
    entries = named if isinstance(named, dict) else {"AutoTokenizer": named}
    chosen = [entry for kind, entry in entries.items() if kind in classes or not classes]
    names = [c for e in chosen for c in ([e] if isinstance(e, str) else e or []) if c]
    return ", ".join(sorted({f"{c.rpartition('--')[2].rpartition('.')[0]}.py" for c in names}))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence load tables and bars of transformers; what matters in them is checked."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
