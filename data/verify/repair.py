"""Repair: what is removed of a damaged cache, and what is restored."""

from collections.abc import Iterable
from pathlib import Path

from distilcache.data.cache.cache import read_manifest
from distilcache.data.storage.files import sync_folder, write_json
from distilcache.data.verify.shard_check import Fault

RESTORED = "provenance.json (restored from the manifest)"


def plan_repair(path: Path, faults: Iterable[Fault]) -> tuple[bool, list[Path]]:
    """What faults of the cache in ``path`` call for.

    Returns:
        Whether the provenance is to be restored from the manifest, and the files to delete, in
        their order.
    """
    faults = list(faults)
    damaged = dict.fromkeys(file for fault in faults for file in fault.damaged)
    restores = (provenance := path / "provenance.json") in damaged
    damaged.pop(provenance, None)
    if any(fault.remade for fault in faults):
        # First: without it nothing takes the cache for complete, however far this comes.
        damaged = {path / "manifest.json": None, **damaged}
    return restores, list(damaged)


def remove_damaged(path: Path, faults: list[Fault]) -> list[str]:
    """Remove files that are certainly damaged, so that stage one makes them again.

    Call it with the cache locked.

    Returns:
        Files that were removed or restored, relative to the cache.
    """
    restores, damaged = plan_repair(path, faults)
    done = []
    if restores:
        write_json(path / "provenance.json", dict(read_manifest(path).provenance))
        done.append(RESTORED)
    for file in damaged:
        if file.is_file() or file.is_symlink():
            file.unlink()
            sync_folder(file.parent)
            done.append(str(file.relative_to(path)))
    return done
