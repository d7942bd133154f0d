"""Where the examples of a task are: files, folders as data sets are published, or the hub.

::

    data/SST-2/train.tsv, dev.tsv              GLUE; also .jsonl, .parquet with the hub's columns
    data/MNLI/train.tsv, dev_matched.tsv, dev_mismatched.tsv
    data/aclImdb/{train,test}/{pos,neg}/*.txt  or {train,test}.jsonl, .parquet
    data/SQuAD/train-v1.1.json, dev-v1.1.json
    data/sst2/train-00000-of-00001.parquet     a data set as it lies on the hub

A task of one's own names its files itself.
"""

from collections.abc import Sequence
from pathlib import Path

from distilcache.data.errors import UserError, require
from distilcache.data.split_names import named_split
from distilcache.stages.evaluate.tasks.catalogue import Task
from distilcache.stages.evaluate.tasks.records import HUB, Location

ENDINGS = (".tsv", ".csv", ".jsonl", ".parquet", ".json")
_ABOUT = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
"""Files that describe a data set."""


def locate(task: Task, data: str) -> dict[str, Location]:
    """Where the parts of a task are, by ``train`` and the suffixes of its held-out splits.

    Args:
        task: The task.
        data: Folder with a folder per task; empty: the Hugging Face hub. Of no use for a task of
            one's own, which names its files.

    Returns:
        Paths; on the hub ``hf:NAME[/CONFIG]:SPLIT``. A task of one's own without held-out examples
        has ``train`` alone.

    Raises:
        UserError: A file is missing.
    """
    if any(task.files):
        return _own(task)
    parts = (("train", task.train), *task.dev)
    splits = ("train", *task.hub_dev)
    if not data:
        name = "/".join(task.hub)
        return {part: f"{HUB}{name}:{s}" for (part, _), s in zip(parts, splits, strict=True)}
    root = Path(data).expanduser()
    require(
        root.is_dir(),
        f"tasks: data must be a folder with {task.folder}/ in it, got {data!r}, which is none; "
        "correct tasks.data, or leave it empty to read from the Hugging Face hub",
    )
    folders = _folders(task, root)
    found: dict[str, Location] = {}
    for (part, stem), split in zip(parts, splits, strict=True):
        there = _usual_place(task, folders, stem)
        for folder in folders:
            there = there or _of_split(folder, split)
        if there is None:
            missing = root / task.folder / stem
            raise UserError(
                f"tasks: data of {task.name} must be in {missing}{_usual(task)}, got no such file; "
                f"put it there, correct tasks.data, or leave {task.name} out"
            )
        found[part] = there
    return found


def _usual_place(task: Task, folders: Sequence[Path], stem: str) -> Location | None:
    """The file, or aclImdb's folder, of the name that the task's publisher gave it."""
    places = [folder / f"{stem}{end}" for folder in folders for end in ENDINGS]
    if task.name == "imdb":
        places += [folder / stem for folder in folders if (folder / stem / "pos").exists()]
    return next((path for path in places if path.exists()), None)


def _folders(task: Task, root: Path) -> list[Path]:
    """Where a task's files may be: in a folder of its name, or of the hub's; or in ``root``."""
    names = dict.fromkeys((task.folder, task.name.upper(), task.name))
    names["/".join((task.hub[0].rpartition("/")[2], *task.hub[1:]))] = None
    folders = [root / name for name in names]
    return [*folders, root] if root.absolute().name in names else folders


def _usual(task: Task) -> str:
    return {"imdb": "/{pos,neg}", "squad": ".json"}.get(task.name, ".tsv")


def _own(task: Task) -> dict[str, Location]:
    """The files that a task of one's own names, and the validation split that lies beside them."""
    train, held_out = task.files
    found = {"train": _own_place(task, train, ("train",))}
    if held_out:
        found[""] = _own_place(task, held_out, ("validation", "test"))
    elif there := _of_split(Path(train).expanduser(), "validation"):
        found[""] = there
    return found


def _own_place(task: Task, place: str, splits: Sequence[str]) -> Location:
    """A place that a task of one's own names; of a data set's folder the first of some splits."""
    if place.startswith(HUB):
        require(
            place.count(":") == 2 and all(place.split(":")),
            f"tasks: a data set on the hub must read hf:NAME[/CONFIG]:SPLIT, got {place!r} for "
            f"{task.name}",
        )
        return place
    path = Path(place).expanduser()
    require(
        path.is_dir() or (path.is_file() and path.suffix in ENDINGS),
        f"tasks: the {'training' if 'train' in splits else 'validation'} examples of {task.name} "
        f"must be a {', '.join(ENDINGS)} file, a folder with a data set, or hf:NAME:SPLIT, got "
        f"{place!r}{'' if path.exists() else ', which does not exist'}",
    )
    files = _data_files(path) if path.is_dir() else {}
    if not files:
        return path  # A file, or what datasets has saved.
    for split in splits:
        if there := _of_split(path, split):
            return there
    others = {named.label for name in files if (named := named_split(name))}
    require(
        not others,
        f"tasks: {path} must have a split {' or '.join(splits)}, got {', '.join(sorted(others))}; "
        "name another folder, or a file",
    )
    return _as_place(_of_one_kind([*files.values()]))


def _data_files(folder: Path) -> dict[str, Path]:
    """Files with rows by their paths below a folder, in their order; hidden ones do not count."""
    inside = sorted(folder.rglob("*")) if folder.is_dir() else []
    paths = {path.relative_to(folder): path for path in inside}
    return {
        below.as_posix(): path
        for below, path in paths.items()
        if path.suffix in ENDINGS
        and path.name not in _ABOUT
        and not any(part.startswith((".", "_")) for part in below.parts)
        and path.is_file()
    }


def _of_split(folder: Path, split: str) -> Location | None:
    """The files of a split in the folder of a data set, found by their names.

    Raises:
        UserError: They are of several configurations, or of several splits.
    """
    named = {path: named_split(name) for name, path in _data_files(folder).items()}
    fits = _of_one_kind([path for path, found in named.items() if found and found.fits(split)])
    found: dict[str, dict[str, list[Path]]] = {}
    for path in fits:
        if name := named[path]:
            found.setdefault(name.folder, {}).setdefault(name.label, []).append(path)
    if not found:
        return None
    require(
        len(found) == 1,
        f"tasks: {folder} must hold one configuration of a data set, got "
        f"{', '.join(name.rstrip('/') or '.' for name in found)}; take the folder of one, as in "
        f"{folder / next(filter(None, found), '')}",
    )
    (labels,) = found.values()
    one = labels.get(split) or next(iter(labels.values()))
    require(
        split in labels or len(labels) == 1,
        f"tasks: {folder} must hold one split {split}, got {', '.join(labels)}; name a file of "
        f"one, as in {one[0]}",
    )
    return _as_place(one)


def _of_one_kind(files: Sequence[Path]) -> list[Path]:
    """Those in parquet, which is what the hub has, or else those of the first other ending."""
    kinds = sorted({path.suffix for path in files}, key=(".parquet", *ENDINGS).index)
    return [path for path in files if path.suffix in kinds[:1]]


def _as_place(files: Sequence[Path]) -> Location:
    return tuple(files) if len(files) > 1 else files[0]
