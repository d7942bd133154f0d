"""What ``distilcache verify`` does: checks, repair, rerun, and the text for people."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache, read_manifest
from distilcache.data.errors import UserError, require
from distilcache.data.progress import Bar
from distilcache.data.storage.locks import locked
from distilcache.data.storage.remote import is_url, located
from distilcache.data.verify.notes import default_state
from distilcache.data.verify.remote_verify import remote_shards
from distilcache.data.verify.repair import remove_damaged
from distilcache.data.verify.run import Settings, verify_cache
from distilcache.data.verify.shard_check import Fault
from distilcache.pipeline.report.text import text_table


def verify_command(
    path: str,
    *,
    workers: int,
    fast: bool,
    repair: bool,
    state: Path | None,
    blocks: int | None,
    seed: int,
    device: str,
    **limits: float | None,
) -> tuple[dict[str, Any], str, str]:
    """Run what the options ask for.

    Returns:
        Values for JSON, the text for people, and why the cache does not pass ("": it does).
    """
    require(blocks is None or blocks > 0, f"verify: --rerun must be 1 block or more, got {blocks}")
    require(seed >= 0, f"verify: --seed must be 0 or more, got {seed}")
    given = {name: limit for name, limit in limits.items() if limit is not None}
    for name in given:
        option = f"--{name.replace('_', '-')}"
        require(blocks is not None, f"verify: {option} must come with --rerun N, got it alone")
    faults, removed = run_verify(path, workers=workers, fast=fast, mend=repair, state=state)
    lines = [fault.text for fault in faults] + [f"removed: {name}" for name in removed]
    values: dict[str, Any] = {"path": str(path), "faults": [fault.text for fault in faults]}
    values["removed"] = removed
    if faults:
        found = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        failure = f"verify: {path} must be whole, got {found} (listed above)"
        again = f"publish CACHE {path}" if is_url(path) else "teacher-cache"
        if removed:
            failure += f"; run distilcache {again} to make again what was removed"
        elif any(fault.remade for fault in faults):
            failure += f"; repeat with --repair, then run distilcache {again}"
        return values, "\n".join(lines), failure
    totals = Cache.open(path).manifest.totals
    text = f"verify: {path}: {totals['shards']} shards, {totals['blocks']} blocks: no fault"
    failure = ""
    if blocks:
        names = {n: n.removeprefix("max_").removeprefix("min_") for n in given}
        rows = run_rerun(path, blocks, seed, device, {names[n]: x for n, x in given.items()})
        values["rerun"] = rows
        text += "\n\n" + rerun_table(rows)
        failed = [row["name"] for row in rows if not row["passed"]]
        if failed:
            failure = (
                f"verify: {path} must hold what its teacher says, got figures beyond their limits: "
                f"{'; '.join(failed)}"
            )
    return values, text, failure


def run_verify(
    path: str, *, workers: int, fast: bool, mend: bool, state: Path | None
) -> tuple[list[Fault], list[str]]:
    """Check a cache, and with ``mend`` remove what is damaged.

    Returns:
        Faults, and the files that were removed.
    """
    require(workers >= 0, f"verify: --workers must be 0 (one per core) or more, got {workers}")
    folder, settings = located(path), Settings(workers=workers, fast=fast, state=state)
    if isinstance(folder, str):
        with remote_shards(folder, fast=fast) as shards:
            remote = replace(
                settings, fetch=shards.fetch, stamp=shards.stamp, identities=shards.identities
            )
            faults = _faults(shards.folder, remote)
            return faults, shards.remove(faults) if mend else []
    require(folder.is_dir(), f"verify: CACHE must be the folder of a teacher cache, got {path}")
    with locked(folder, "verify") if mend else contextlib.nullcontext():
        faults = _faults(folder, settings)
        return faults, remove_damaged(folder, faults) if mend else []


def _faults(folder: Path, settings: Settings) -> list[Fault]:
    """What is wrong with a cache, behind a progress bar."""
    total = None
    with contextlib.suppress(UserError):
        total = read_manifest(folder).totals["bytes"]
    with Bar(total=total, unit="B", unit_scale=True, desc="verify") as bar:

        def progress(size: int, known: bool) -> None:
            bar.initial += size if known else 0  # the rate is that of this run
            bar.update(size)

        state = settings.state or default_state(folder)
        return list(verify_cache(folder, replace(settings, state=state, progress=progress)))


def run_rerun(
    path: str, blocks: int, seed: int, device: str, limits: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Run the teacher again on some blocks; the figures as plain values."""
    from distilcache.stages.verify.rerun import RerunSettings, rerun

    cache = Cache.open(path)
    blocks = min(blocks, cache.num_blocks)
    with Bar(total=blocks, unit="block", desc="rerun") as bar:
        settings = RerunSettings(
            blocks=blocks, seed=seed, device=device, limits=limits, progress=bar.update
        )
        return [{**asdict(row), "passed": row.passed} for row in rerun(cache, settings)]


def rerun_table(rows: list[dict[str, Any]]) -> str:
    """The figures as a table."""
    cells = []
    for row in rows:
        sign = "at most" if row["at_most"] else "at least"
        limit = "none" if row["limit"] is None else f"{sign} {row['limit']:.4g}"
        cells.append([row["name"], f"{row['value']:.4g}", limit, "" if row["passed"] else "FAILED"])
    return text_table(["", "found", "limit", ""], cells)
