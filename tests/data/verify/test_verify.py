"""``verify``: every bit that flips is seen or harmless; a run that was interrupted goes on."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.shards import SEAL, shard_path
from distilcache.data.errors import UserError
from distilcache.data.storage.files import sha256_json
from distilcache.data.verify import run as verify
from distilcache.data.verify.notes import default_state
from distilcache.data.verify.shard_check import ShardReport
from tests.command_line import refusal, run
from tests.damage import check, flip, flip_at, sealed

FLIPS = 1000


def read_all(path):
    """Everything that stage two reads of a cache, as bytes."""
    cache = Cache.open(path)
    blocks = [
        {name: values.tobytes() for name, values in cache.read_block(i).items()}
        for i in range(cache.num_blocks)
    ]
    head = {
        n: t.numpy().tobytes()
        for n, t in cache.teacher.lm_head().state_dict(keep_vars=True).items()
    }
    codecs = [cache.teacher.hidden_codec(h.layer) for h in cache.encoding.hidden]
    cache.teacher.check()
    return blocks, head, [(c.step, c.limits, c.synthesis.numpy().tobytes()) for c in codecs]


def test_a_thousand_flipped_bits(copy):
    """Half of them anywhere, half of them in a file chosen first, so that small files get theirs.

    Harmless, and then read as before: JSON that means the same.
    """
    rng = np.random.default_rng(0)
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    sizes = np.array([p.stat().st_size for p in files])
    # What is read after a flip depends on the file alone, so the others are read once.
    before = read_all(copy)
    harmless = []
    for number in range(FLIPS):
        share = sizes / sizes.sum() if number % 2 else None
        chosen = int(rng.choice(len(files), p=share))
        bit = int(rng.integers(8 * sizes[chosen]))
        file = files[chosen]
        flip(file, bit)
        faults = check(copy)
        if not faults:
            harmless.append((file.name, bit))
            assert file.suffix == ".json", (file, bit)
        if not faults or number % 20 == 0:
            try:
                assert read_all(copy) == before
            except UserError:
                assert faults
        flip(file, bit)
    assert len(harmless) <= FLIPS // 100, harmless
    assert check(copy) == []


def test_reading_is_right_or_refused_whatever_bit_flips(copy):
    """What stage two reads: no flip in a frame, index, manifest, codec or head goes unseen."""
    before = read_all(copy)
    rng = np.random.default_rng(1)
    files = [p for p in sorted(copy.rglob("*")) if p.is_file() and p.name != "provenance.json"]
    said = []
    for _ in range(150):
        file = files[rng.integers(len(files))]
        bit = int(rng.integers(8 * file.stat().st_size))
        flip(file, bit)
        try:
            assert read_all(copy) == before
        except UserError as error:
            said.append(str(error))
        flip(file, bit)
    assert len(said) > 50
    assert all("\n" not in text for text in said)


def test_another_version_is_not_damage(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "schema_version": 9})))
    with pytest.raises(UserError, match="schema_version must be 2, got 9"):
        check(copy)
    assert path.exists()


def test_no_cache(tmp_path):
    with pytest.raises(UserError, match="must hold a teacher cache, got none"):
        check(tmp_path)


# ---- fast, threads, going on -----------------------------------------------------------------


def test_fast_reads_no_shard(copy, monkeypatch):
    flip_at(shard_path(copy, 0, 1))
    opened = []
    own = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **o: (opened.append(self),
                                                             own(self, *a, **o))[1])  # fmt: skip
    assert check(copy, fast=True) == []
    # Loaders of earlier tests may still be reading caches of theirs.
    own_files = [p for p in opened if p.is_relative_to(copy)]
    assert own_files
    assert not [p for p in own_files if p.suffix in (".tar", ".safetensors")]
    monkeypatch.undo()
    os.truncate(shard_path(copy, 0, 1), 700)
    (copy / "teacher" / "config.json").unlink()
    found = check(copy, fast=True)
    assert len(found) == 2
    assert "shard-000001.tar must be" in found[0]
    assert "config.json must be there" in found[1]


def test_any_number_of_threads_says_the_same(copy):
    for shard in ((0, 1), (1, 0), (1, 1)):
        flip_at(shard_path(copy, *shard))
    alone = check(copy)
    assert len(alone) >= 3
    assert check(copy, workers=4) == alone
    assert not [t for t in threading.enumerate() if t.name.startswith("distilcache-verify")]


def test_a_share_of_the_cores_gives_as_many_threads(copy, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    pools, own = [], verify.ThreadPoolExecutor
    monkeypatch.setattr(
        verify, "ThreadPoolExecutor", lambda count, name: pools.append(count) or own(count, name)
    )
    assert check(copy, workers=0) == []
    assert pools == [3]


def stopping_after(count, monkeypatch, read):
    own = verify.check_shard

    def failing(task, *args, **options) -> ShardReport:
        if len(read) == count:
            raise KeyboardInterrupt
        read.append((task.round, task.shard))
        return own(task, *args, **options)

    monkeypatch.setattr(verify, "check_shard", failing)


def test_an_interrupted_run_goes_on_where_it_was(copy, sound, tree, monkeypatch):
    state = default_state(copy)
    shards = Cache.open(copy).manifest.totals["shards"]
    flip_at(shard_path(copy, 0, 1))
    read, again, seen = [], [], []
    stopping_after(3, monkeypatch, read)
    with pytest.raises(KeyboardInterrupt):
        check(copy, state=state)
    assert len(state.read_text().splitlines()) == 1 + 2  # the damaged one is no sound one
    # A shard that changes between the runs is read again.
    shutil.copy(shard_path(copy, 1, 1), copy / "x")
    os.replace(copy / "x", shard_path(copy, 1, 1))
    os.utime(shard_path(copy, 0, 0))
    monkeypatch.undo()
    stopping_after(shards + 1, monkeypatch, again)
    found = check(copy, state=state, progress=lambda size, known: seen.append((size, known)))
    assert len(found) == 1
    assert "shard-000001.tar" in found[0]
    assert sorted({*read, *again}) == sorted(again + [s for s in read if s not in again])
    assert (0, 0) in again
    assert (0, 1) in again
    assert (0, 2) not in again
    assert [known for _, known in seen].count(True) == 1
    assert not state.parent.exists()


def test_notes_of_another_cache_or_half_a_line_are_not_believed(copy):
    state = default_state(copy)
    state.parent.mkdir()
    flip_at(shard_path(copy, 0, 1))
    entry = shard_path(copy, 0, 1).stat()
    marker = shard_path(copy, 0, 1).with_suffix(".json").stat()
    line = f"0 1 {entry.st_size} {entry.st_mtime_ns} {marker.st_mtime_ns}"
    manifest = Cache.open(copy).manifest
    identity = sha256_json(manifest.provenance["identity"])
    about = f"1 {manifest.index_sha256} {identity}"
    for text in (f"1 other {identity}\n{line}\n", f"{about}\n{line}", "\xff\0", ""):
        state.parent.mkdir(exist_ok=True)
        state.write_text(text)
        assert len(check(copy, state=state)) == 1, text
    state.parent.mkdir()
    state.write_text(f"{about}\n{line}\n")
    assert check(copy, state=state) == []


@pytest.mark.parametrize("content", [b"my text\n", b"1 a b\n", b"\xff\0", b"x" * 999])
def test_notes_take_the_place_of_no_other_file(copy, tmp_path, content):
    state = tmp_path / "state"
    state.write_bytes(content)
    line = refusal(run("verify", copy, "--state", state))
    assert "verify: --state must be a file of verify's notes or a new one, got" in line
    assert state.read_bytes() == content


def test_notes_take_the_place_of_no_pipe(copy, tmp_path, capsys):
    os.mkfifo(tmp_path / "state")
    assert check(copy, state=tmp_path / "state") == []
    assert "must be writable to keep notes, got: not a plain file" in capsys.readouterr().err
    assert (tmp_path / "state").is_fifo()


def test_on_a_full_disk_everything_is_checked_and_the_notes_are_missed(
    copy, tmp_path, capsys, monkeypatch
):
    state, own = tmp_path / "state", Path.open

    def full(self, *args, **options):
        writes = self == state and "w" in args
        return own(Path("/dev/full") if writes else self, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    flip_at(shard_path(copy, 0, 1))
    (fault,) = check(copy, state=state)
    assert "shard-000001.tar" in fault
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"verify: {state} must be writable to keep notes, got: No space left")


def test_a_folder_that_cannot_be_written_is_verified(copy, monkeypatch):
    own = Path.mkdir

    def refused(self, *args, **options):
        if self.name == ".verify":
            raise PermissionError(13, "Permission denied")
        return own(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    assert check(copy, state=default_state(copy)) == []


def test_a_marker_of_another_cache_is_named_without_reading_its_shard(copy):
    """It is sound in itself, and of the same place and size."""
    path = shard_path(copy, 0, 1).with_suffix(".json")
    marker = json.loads(path.read_text())
    del marker[SEAL]
    marker["identity"] = "0" * 64
    path.write_text(json.dumps(marker | {SEAL: sha256_json(marker)}))
    wanted = "cache: marker of shard shard-000001.tar must be as written, got that of another cache"
    assert check(copy, fast=True) == [wanted]
