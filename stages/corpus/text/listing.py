"""Lines on what a list of files tells: copies, missing parts, text of another split or kind."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from distilcache.data.split_names import named_split
from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.corpus.text.streams import COMPRESSIONS

_SHARD = re.compile(r"(.+[-.])(\d{5})(-of-(\d{5}).*)")


def say_odd(text: str, sources: Sequence[Source], say: Callable[[str], None]) -> None:
    """Tell what is odd among the files of a folder or glob, ``text``; all of them are read."""
    files = [source for source in sources if source.of_many]
    kinds = Counter(source.kind for source in files).most_common()
    if len(kinds) > 1:
        found = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
        say(f"{text} has files of several kinds, and all are read: {found}")
    shards: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for source in files:
        if match := _SHARD.fullmatch(source.name):
            shards[match[1], match[3], match[4]].add(match[2])
    for (start, end, total), numbers in shards.items():
        if len(numbers) < int(total):
            say(f"{len(numbers):,} of the {int(total):,} files {start}*{end} are there")
    named = [(source.name, named_split(PurePosixPath(source.name).name)) for source in files]
    others = [name for name, split in named if split and split.split != "train"]
    if len(named) > len(others) > 0:
        say(
            "files whose names say validation or test are read as any other; name the others "
            f"alone to leave them out: {others[0]}{_more(others)}"
        )


def say_again(sources: Sequence[Source], say: Callable[[str], None]) -> None:
    """Tell of files that are named twice, as by a folder and a glob, and of a.txt with a.txt.gz."""
    files = Counter(
        os.path.realpath(source.path)
        if source.filesystem is None
        else source.filesystem.unstrip_protocol(source.path)
        for source in sources
        if source.kind not in ("hf", "docstrings")
    )
    again = [path for path, count in files.items() if count > 1]
    if again:
        say(f"files that are named more than once are read as often: {again[0]}{_more(again)}")
    same: dict[str, list[str]] = {}
    for path in files:
        ending = PurePosixPath(path).suffix
        packed = ending.lower() in COMPRESSIONS
        same.setdefault(path.removesuffix(ending) if packed else path, []).append(path)
    copies = [" and ".join(sorted(paths)) for paths in same.values() if len(paths) > 1]
    if copies:
        say(
            "files that differ by their compression alone are all read; if they are copies, move "
            f"one away: {copies[0]}{_more(copies)}"
        )


def _more(found: Sequence[str]) -> str:
    return f" and {len(found) - 1:,} more" if found[1:] else ""
