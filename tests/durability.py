"""Whether files would survive a power cut: what is synced, and when, around every rename."""

import contextlib
import os
import threading
from pathlib import Path


class Events(list):
    """``(thread, "sync", {inode})`` and ``(thread, "name", {inodes of what gets it}, folder)``."""

    def check(self) -> set[str]:
        """Every name that was given is durable; returns the names.

        Its bytes were synced before it got the name, and the folder of the name right after, before
        the same thread gave another one.
        """
        named = set()
        for at, (thread, what, nodes, *rest) in enumerate(self):
            if what != "name":
                continue
            folder, name = rest
            before = set().union(*(e[2] for e in self[:at] if e[1] == "sync"))
            assert nodes <= before, f"{name} got its name before its bytes were synced"
            after = [e for e in self[at + 1 :] if e[0] == thread]
            assert after, f"the folder of {name} was never synced"
            assert after[0][1:] == ("sync", {folder}), f"the folder of {name} was not synced next"
            named.add(name)
        return named


def node(path) -> tuple[int, int]:
    """A file or folder, whatever its name; ``path`` may be a descriptor."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def recorded(monkeypatch):
    """Events of this process until the end of the block."""
    events = Events()
    sync = os.fsync

    def fsync(descriptor):
        sync(descriptor)
        events.append((threading.get_ident(), "sync", {node(descriptor)}))

    def giving(rename):
        def call(source, target, **options):
            tree = {node(source), *(node(path) for path in Path(source).rglob("*"))}
            rename(source, target, **options)
            place = Path(target)
            name = (threading.get_ident(), "name", tree, node(place.parent), place.name)
            events.append(name)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        for name in ("replace", "rename", "link"):
            patch.setattr(os, name, giving(getattr(os, name)))
        yield events
