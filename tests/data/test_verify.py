"""``verify``: every bit that flips is seen or harmless; repair gives the same bytes again."""

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import verify
from data.cache import Cache
from data.errors import UserError
from data.files import sha256_json, write_json
from data.notes import default_state
from data.shard_check import ShardReport
from data.shards import shard_path
from data.verify import Settings, remove_damaged, verify_cache
from stages.teacher_cache import plan

FLIPS = 1000


@pytest.fixture(scope="module")
def sound(small_cache) -> Path:
    return small_cache(corpus={"documents": 30}, rounds=2, hidden_layers=(1, -1))


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "copy")


@pytest.fixture
def rebuild(build_cache_in, small_corpus, small_teacher):
    """Stage one, on the folder of a cache."""

    def make(path):
        corpus = small_corpus(documents=30)
        return build_cache_in(path, corpus, small_teacher, rounds=2, hidden_layers=(1, -1))

    return make


def check(path, **settings) -> list[str]:
    faults = list(verify_cache(path, Settings(**{"workers": 1, **settings})))
    assert all("\n" not in fault.text for fault in faults)
    return [fault.text for fault in faults]


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def read_all(path):
    """Everything that stage two reads of a cache, as bytes."""
    cache = Cache.open(path)
    blocks = [
        {name: values.tobytes() for name, values in cache.read_block(i).items()}
        for i in range(cache.num_blocks)
    ]
    head = {n: t.numpy().tobytes() for n, t in cache.lm_head().state_dict(keep_vars=True).items()}
    codecs = [cache.hidden_codec(h.layer) for h in cache.encoding.hidden]
    cache.check_teacher()
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


# ---- repair ----------------------------------------------------------------------------------


def flipped(path, place=0.5):
    flip(path, int(8 * path.stat().st_size * place))


DAMAGE = {
    "tar": lambda c: flipped(shard_path(c, 0, 1)),
    "tar header": lambda c: flipped(shard_path(c, 1, 0), 0.001),
    "tar padding": lambda c: flipped(shard_path(c, 1, 0), 0.999),
    "tar cut": lambda c: os.truncate(shard_path(c, 0, 1), 700),
    "tar gone": lambda c: shard_path(c, 0, 1).unlink(),
    "tar of another shard": lambda c: shutil.copy(shard_path(c, 0, 0), shard_path(c, 0, 1)),
    "marker": lambda c: flipped(shard_path(c, 0, 1).with_suffix(".json")),
    "marker gone": lambda c: shard_path(c, 0, 1).with_suffix(".json").unlink(),
    "marker of another shard": lambda c: shutil.copy(
        shard_path(c, 0, 0).with_suffix(".json"), shard_path(c, 0, 1).with_suffix(".json")
    ),
    "shard of another place": lambda c: [
        shutil.copy(shard_path(c, 0, 0).with_suffix(s), shard_path(c, 1, 0).with_suffix(s))
        for s in (".tar", ".json")
    ],
    "index": lambda c: flipped(c / "index.arrow"),
    "index gone": lambda c: (c / "index.arrow").unlink(),
    "manifest": lambda c: flipped(c / "manifest.json"),
    "manifest gone": lambda c: (c / "manifest.json").unlink(),
    "provenance": lambda c: flipped(c / "provenance.json", 0.3),
    "provenance gone": lambda c: (c / "provenance.json").unlink(),
    "codec": lambda c: flipped(c / "teacher" / "hidden_codec_3.safetensors"),
    "much": lambda c: [flipped(shard_path(c, 0, 0)), flipped(shard_path(c, 1, 1), 0.2),
                       flipped(c / "index.arrow"), flipped(c / "manifest.json")],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_and_stage_one_give_the_same_bytes(copy, sound, rebuild, tree, damage):
    before = tree(copy)
    DAMAGE[damage](copy)
    hurt = {name for name, digest in before.items() if tree(copy).get(name) != digest}
    faults = list(verify_cache(copy, Settings(workers=2)))
    assert faults
    removed = remove_damaged(copy, faults)
    left = tree(copy)
    gone = before.keys() - left.keys()
    # Stage one writes anew what has lost its marker, or the manifest that vouched for it.
    void = {name.replace(".json", ".tar") for name in gone} | {"provenance.json"}
    void |= {"index.arrow"} if "manifest.json" in hurt else set()
    assert hurt - void <= gone
    # A shard goes as a whole, and the manifest with it; nothing else that was sound goes.
    also = {name.replace(".tar", ".json") for name in hurt}
    also |= {n.replace(".json", ".tar") for n in hurt} if "another" in damage else set()
    assert gone <= hurt | also | {"manifest.json"}
    assert {n for n in left if left[n] != before.get(n)} <= void
    assert len(removed) >= len(gone - hurt)
    rebuild(copy)
    assert tree(copy) == before == tree(sound)
    assert check(copy) == []


def test_what_cannot_be_read_is_not_removed(copy, monkeypatch):
    """A disk or a right that fails proves nothing."""
    own = Path.open

    def failing(self, *args, **options):
        if self.name == "shard-000001.tar":
            raise OSError(5, "Input/output error")
        return own(self, *args, **options)

    monkeypatch.setattr(Path, "open", failing)
    faults = list(verify_cache(copy, Settings(workers=1)))
    assert [f.text for f in faults] == [
        "cache: shard shard-000001.tar must be readable, got: Input/output error"
    ] * 2
    monkeypatch.undo()
    assert remove_damaged(copy, faults) == []
    assert check(copy) == []


def test_files_that_are_not_of_the_cache_are_named_and_kept(copy):
    (copy / "teacher" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (copy / "notes.txt").write_text("mine")
    faults = list(verify_cache(copy, Settings(workers=1)))
    assert [f.text.rpartition("/")[2] for f in faults] == [
        "pytorch_model.bin must not be there: it is no file of this teacher"
    ]
    assert remove_damaged(copy, faults) == []
    assert (copy / "teacher" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_checkpoint_is_saved_again(copy, rebuild, tree, sound, name):
    flipped(copy / "teacher" / name)
    faults = list(verify_cache(copy, Settings(workers=1)))
    (text,) = [fault.text for fault in faults]
    assert f"{name} must have sha256" in text
    assert remove_damaged(copy, faults)[0] == f"teacher/{name}"
    rebuild(copy)
    assert tree(copy) == tree(sound)


def test_a_codec_that_comes_out_differently_is_refused(copy, rebuild, monkeypatch):
    """Shards written with two codecs would be silently wrong."""
    path = copy / "teacher" / "hidden_codec_3.safetensors"
    path.unlink()
    (copy / "manifest.json").unlink()
    calibrate = plan.calibrate

    def another(*args):
        codec = calibrate(*args)
        return replace(codec, mean=codec.mean + 1)

    with monkeypatch.context() as patched:
        patched.setattr(plan, "calibrate", another)
        with pytest.raises(UserError, match="must be the codec that the shards were written with"):
            rebuild(copy)
    assert not path.exists()
    rebuild(copy)
    assert check(copy) == []


def test_an_unfinished_cache_is_verified_as_far_as_it_is(copy, rebuild, tree, sound):
    (copy / "manifest.json").unlink()
    (copy / "index.arrow").unlink()
    shard_path(copy, 1, 0).with_suffix(".json").unlink()
    flipped(shard_path(copy, 0, 1))
    found = check(copy)
    assert len(found) == 2
    assert "must be complete, got no manifest.json" in found[0]
    assert "shard-000001.tar" in found[1]
    assert "must" in found[1]
    remove_damaged(copy, list(verify_cache(copy, Settings(workers=1))))
    assert not shard_path(copy, 0, 1).exists()
    rebuild(copy)
    assert tree(copy) == tree(sound)


def test_another_version_is_not_damage(copy):
    path = copy / "manifest.json"
    values = {**json.loads(path.read_text()), "schema_version": 9}
    values["sha256"] = sha256_json({n: v for n, v in values.items() if n != "sha256"})
    write_json(path, values)
    with pytest.raises(UserError, match="schema_version must be 2, got 9"):
        check(copy)
    assert path.exists()


def test_no_cache(tmp_path):
    with pytest.raises(UserError, match="must hold a teacher cache, got none"):
        check(tmp_path)


# ---- fast, threads, going on -----------------------------------------------------------------


def test_fast_reads_no_shard(copy, monkeypatch):
    flipped(shard_path(copy, 0, 1))
    opened = []
    own = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **o: (opened.append(self),
                                                             own(self, *a, **o))[1])  # fmt: skip
    assert check(copy, fast=True) == []
    assert not [p for p in opened if p.suffix in (".tar", ".safetensors")]
    monkeypatch.undo()
    os.truncate(shard_path(copy, 0, 1), 700)
    (copy / "teacher" / "config.json").unlink()
    found = check(copy, fast=True)
    assert len(found) == 2
    assert "shard-000001.tar must be" in found[0]
    assert "config.json must be there" in found[1]


def test_any_number_of_threads_says_the_same(copy):
    for shard in ((0, 1), (1, 0), (1, 1)):
        flipped(shard_path(copy, *shard))
    alone = check(copy)
    assert len(alone) >= 3
    assert check(copy, workers=4) == alone
    assert threading.active_count() < 5 or not [
        t for t in threading.enumerate() if t.name.startswith("distilcache-verify")
    ]


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
    flipped(shard_path(copy, 0, 1))
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
    flipped(shard_path(copy, 0, 1))
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


def test_a_folder_that_cannot_be_written_is_verified(copy, monkeypatch):
    own = Path.mkdir

    def refused(self, *args, **options):
        if self.name == ".verify":
            raise PermissionError(13, "Permission denied")
        return own(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    assert check(copy, state=default_state(copy)) == []
