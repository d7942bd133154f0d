"""Repair: what is proven damaged goes, and stage one gives the same bytes again."""

import errno
import json
import mmap
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from distilcache.data.cache.manifest import TOTALS
from distilcache.data.cache.shards import shard_path
from distilcache.data.errors import UserError
from distilcache.data.storage import files
from distilcache.data.verify.repair import remove_damaged
from distilcache.data.verify.run import Settings, verify_cache
from distilcache.stages.teacher_cache import calibration_runs
from tests.damage import check, flip_at
from tests.data.hostile.hostile_support import write_manifest


def wrong_total(path, name):
    """One count of the manifest, whose seal is right."""
    values = json.loads((path / "manifest.json").read_text())
    values["totals"][name] += 1
    write_manifest(path, values)


DAMAGE = {
    "tar": lambda c: flip_at(shard_path(c, 0, 1)),
    "tar header": lambda c: flip_at(shard_path(c, 1, 0), 0.001),
    "tar padding": lambda c: flip_at(shard_path(c, 1, 0), 0.999),
    "tar cut": lambda c: os.truncate(shard_path(c, 0, 1), 700),
    "tar gone": lambda c: shard_path(c, 0, 1).unlink(),
    "tar of another shard": lambda c: shutil.copy(shard_path(c, 0, 0), shard_path(c, 0, 1)),
    "marker": lambda c: flip_at(shard_path(c, 0, 1).with_suffix(".json")),
    "marker gone": lambda c: shard_path(c, 0, 1).with_suffix(".json").unlink(),
    "marker of another shard": lambda c: shutil.copy(
        shard_path(c, 0, 0).with_suffix(".json"), shard_path(c, 0, 1).with_suffix(".json")
    ),
    "shard of another place": lambda c: [
        shutil.copy(shard_path(c, 0, 0).with_suffix(s), shard_path(c, 1, 0).with_suffix(s))
        for s in (".tar", ".json")
    ],
    "index": lambda c: flip_at(c / "index.arrow"),
    "index gone": lambda c: (c / "index.arrow").unlink(),
    "manifest": lambda c: flip_at(c / "manifest.json"),
    "manifest gone": lambda c: (c / "manifest.json").unlink(),
    "total of bytes": lambda c: wrong_total(c, "bytes"),
    "total of clipped codes": lambda c: wrong_total(c, "clipped_codes"),
    "provenance": lambda c: flip_at(c / "provenance.json", 0.3),
    "provenance gone": lambda c: (c / "provenance.json").unlink(),
    "codec": lambda c: flip_at(c / "teacher" / "hidden_codec_3.safetensors"),
    "much": lambda c: [flip_at(shard_path(c, 0, 0)), flip_at(shard_path(c, 1, 1), 0.2),
                       flip_at(c / "index.arrow"), flip_at(c / "manifest.json")],
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


@pytest.mark.parametrize("name", TOTALS)
def test_every_total_of_the_manifest_is_verified(copy, name):
    wrong_total(copy, name)
    faults = list(verify_cache(copy, Settings(workers=1)))
    assert faults
    assert "manifest.json" in remove_damaged(copy, faults)


def test_the_manifest_of_another_cache_costs_only_itself(copy, small_cache, rebuild, tree, sound):
    before = tree(copy)
    shutil.copy(small_cache() / "manifest.json", copy / "manifest.json")
    faults = list(verify_cache(copy, Settings(workers=1)))
    assert [fault.text for fault in faults] == [
        f"cache: {copy / 'manifest.json'} must be of the cache of its shards, got that of another"
    ]
    assert remove_damaged(copy, faults) == ["manifest.json"]
    assert tree(copy) == {n: digest for n, digest in before.items() if n != "manifest.json"}
    rebuild(copy)
    assert tree(copy) == before == tree(sound)


def test_the_provenance_of_another_cache_costs_only_itself(copy, small_cache, tree):
    before = tree(copy)
    shutil.copy(small_cache() / "provenance.json", copy / "provenance.json")
    (fault,) = faults = list(verify_cache(copy, Settings(workers=1)))
    assert "provenance.json must be the manifest's provenance" in fault.text
    assert remove_damaged(copy, faults) == ["provenance.json (restored from the manifest)"]
    assert tree(copy) == before


def test_all_but_the_shards_of_another_cache_costs_no_shard(copy, small_cache, tree):
    """Which of the two should be there cannot be told."""
    for name in ("index.arrow", "manifest.json", "provenance.json"):
        shutil.copy(small_cache() / name, copy / name)
    shutil.copytree(small_cache() / "teacher", copy / "teacher", dirs_exist_ok=True)
    before = tree(copy)
    (fault,) = faults = list(verify_cache(copy, Settings(workers=1)))
    assert "must hold shards of its own, got those of another cache" in fault.text
    assert remove_damaged(copy, faults) == []
    (copy / "manifest.json").unlink()
    assert not [name for name in remove_damaged(copy, list(verify_cache(copy, Settings())))]
    assert tree(copy) == {n: digest for n, digest in before.items() if n != "manifest.json"}


@pytest.mark.parametrize("damage", ["tar", "index", "much"])
def test_a_repair_that_is_killed_leaves_no_cache_with_holes(copy, rebuild, tree, sound, damage):
    """The manifest goes first: with it a cache counts as complete."""
    before = tree(copy)
    DAMAGE[damage](copy)
    faults = list(verify_cache(copy, Settings(workers=1)))
    unlink, gone = Path.unlink, []

    def killed(self, **options):
        if gone:
            raise KeyboardInterrupt
        gone.append(self.name)
        unlink(self, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_damaged(copy, faults)
    assert gone == ["manifest.json"]
    remove_damaged(copy, list(verify_cache(copy, Settings(workers=1))))
    rebuild(copy)
    assert tree(copy) == before == tree(sound)


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


@pytest.mark.parametrize("name", ["shard-000001.json", "manifest.json"])
def test_what_opens_and_cannot_be_read_is_not_removed(copy, monkeypatch, name):
    """As over NFS, where the server fails after the file was opened."""
    own = files.open_plain

    def failing(path):
        file = own(path)
        if path.name == name:
            file.read = lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        return file

    monkeypatch.setattr(files, "open_plain", failing)
    faults = list(verify_cache(copy, Settings(workers=1)))
    assert faults
    assert all(f"{name}: Input/output error" in fault.text for fault in faults)
    monkeypatch.undo()
    assert remove_damaged(copy, faults) == []
    assert check(copy) == []


def test_an_index_that_cannot_be_mapped_is_not_removed(copy, monkeypatch):
    def refused(*_, **options):
        raise OSError(errno.ENODEV, "No such device")

    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", refused)
        faults = list(verify_cache(copy, Settings(workers=1)))
    assert [fault.text.rpartition("got: ")[2] for fault in faults] == ["[Errno 19] No such device"]
    assert remove_damaged(copy, faults) == []
    assert check(copy) == []


def test_files_that_are_not_of_the_cache_are_named_and_kept(copy):
    (copy / "teacher" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (copy / "notes.txt").write_text("mine")
    faults = list(verify_cache(copy, Settings(workers=1)))
    assert [f.text.rpartition("/")[2] for f in faults] == [
        "pytorch_model.bin must not be there: it is not a file of this teacher; move it away"
    ]
    assert remove_damaged(copy, faults) == []
    (copy / "teacher" / "pytorch_model.bin").rename(copy.parent / "pytorch_model.bin")
    assert check(copy) == []


def test_what_desktops_and_notebooks_leave_is_no_fault(copy):
    """Names that begin with a dot are not the cache's, as docs/format.md says."""
    for folder in (copy, copy / "teacher", copy / "shards", copy / "shards" / "r00"):
        for name in (".DS_Store", "._config.json", "._shard-000000.json"):
            (folder / name).write_bytes(b"Mac OS X")
        (folder / ".ipynb_checkpoints").mkdir()
    assert check(copy) == check(copy, fast=True) == []


def test_a_new_manifest_names_no_copies_that_an_editor_left(copy, rebuild, tree, sound):
    names = "config.json~", "config (copy).json"
    for name in names:
        shutil.copy(copy / "teacher" / "config.json", copy / "teacher" / name)
    (copy / "manifest.json").unlink()
    rebuild(copy)
    found = [text.partition(" must not be there")[0].rpartition("/")[2] for text in check(copy)]
    assert found == sorted(names)
    for name in names:
        (copy / "teacher" / name).unlink()
    assert tree(copy) == tree(sound)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_checkpoint_is_saved_again(copy, rebuild, tree, sound, name):
    flip_at(copy / "teacher" / name)
    faults = list(verify_cache(copy, Settings(workers=1)))
    (text,) = [fault.text for fault in faults]
    assert f"{name} must have sha256" in text
    assert remove_damaged(copy, faults) == ["manifest.json", f"teacher/{name}"]
    rebuild(copy)
    assert tree(copy) == tree(sound)


def test_a_codec_that_comes_out_differently_is_refused(copy, rebuild, monkeypatch):
    """Shards written with two codecs would be silently wrong."""
    path = copy / "teacher" / "hidden_codec_3.safetensors"
    path.unlink()
    (copy / "manifest.json").unlink()
    calibrate = calibration_runs.calibrate

    def another(*args, **options):
        codec = calibrate(*args, **options)
        return replace(codec, mean=codec.mean + 1)

    with monkeypatch.context() as patched:
        patched.setattr(calibration_runs, "calibrate", another)
        with pytest.raises(UserError, match="must be the codec that the shards were written with"):
            rebuild(copy)
    assert not path.exists()
    rebuild(copy)
    assert check(copy) == []


def test_an_unfinished_cache_is_verified_as_far_as_it_is(copy, rebuild, tree, sound):
    (copy / "manifest.json").unlink()
    (copy / "index.arrow").unlink()
    shard_path(copy, 1, 0).with_suffix(".json").unlink()
    flip_at(shard_path(copy, 0, 1))
    found = check(copy)
    assert len(found) == 2
    assert "must be complete, got no manifest.json" in found[0]
    assert "shard-000001.tar" in found[1]
    assert "must" in found[1]
    remove_damaged(copy, list(verify_cache(copy, Settings(workers=1))))
    assert not shard_path(copy, 0, 1).exists()
    rebuild(copy)
    assert tree(copy) == tree(sound)
