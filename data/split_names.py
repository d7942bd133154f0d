"""Splits of data sets by the names of their files, as the library ``datasets`` finds them.

::

    sst2/train-00000-of-00002.parquet    a data set as it lies on the hub
    default/train/0000.parquet           the same in its branch of converted files
    train.jsonl, my-dev.csv              a file per split
"""

import re
from typing import NamedTuple

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""The words that name a split, as whole words."""
_WORD_ENDS = re.compile(r"[-._ 0-9]+")
_PACKED = re.compile(r"\.(?:gz|zst|xz|bz2)$", re.IGNORECASE)
_SHARD = re.compile(r"(.+?)[-.]\d{5}-of-\d{5}.*")


class NamedSplit(NamedTuple):
    """What the path of a file says."""

    folder: str
    """Folder of the data set, or of its configuration; ends in ``/`` or is empty."""
    split: str
    """``train``, ``validation`` or ``test``."""
    label: str
    """The name itself, such as ``validation_matched``."""

    def fits(self, split: str) -> bool:
        """Whether the name has all words of a split's name, such as ``validation_matched``."""
        own = set(_WORD_ENDS.split(self.label)) | {self.split}
        return set(_WORD_ENDS.split(split)) <= own


def named_split(path: str) -> NamedSplit | None:
    """The split that a file is of, by its path below the data set's folder; None: it names none.

    The name of a shard counts first, then the nearest folder, then the file's name.
    """
    *folders, file = path.split("/")
    shard = _SHARD.fullmatch(file)
    if shard and (split := _split(shard[1])):
        return NamedSplit("".join(f"{name}/" for name in folders), split, shard[1])
    for at in reversed(range(len(folders))):
        if split := _split(folders[at]):
            return NamedSplit("".join(f"{n}/" for n in folders[:at]), split, folders[at])
    label = _PACKED.sub("", file).rpartition(".")[0].rstrip("-._ 0123456789")
    split = _split(label)
    return NamedSplit("".join(f"{name}/" for name in folders), split, label) if split else None


def _split(name: str) -> str:
    words = set(_WORD_ENDS.split(name))
    return next((split for split, known in SPLITS.items() if known & words), "")
