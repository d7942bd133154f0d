"""Files are whole or absent, after a power cut too."""

import os

import pytest

from distilcache.data.storage.files import sync_folder, sync_tree, write_atomically, write_json
from tests.durability import node, recorded


def test_bytes_are_on_the_disk_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    with recorded(monkeypatch) as events:
        write_atomically(tmp_path / "new" / "file", lambda file: (file.write(b"x" * 9), None)[1])
    assert events.check() == {"file"}
    file, folder = node(tmp_path / "new" / "file"), node(tmp_path / "new")
    assert [e[1:3] for e in events] == [("sync", {file}), ("name", {file}), ("sync", {folder})]


def test_all_bytes_are_synced(tmp_path, monkeypatch):
    """Not those alone that Python had handed on: a file is flushed first."""
    sizes = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
        write_json(tmp_path / "a.json", {"a": 1})
    assert sizes[0] == (tmp_path / "a.json").stat().st_size > 0


def test_a_tree_is_synced_with_all_that_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    for name in ("one", "inner/two"):
        (tmp_path / "tree" / name).write_text(name)
    with recorded(monkeypatch) as events:
        sync_tree(tmp_path / "tree")
        (tmp_path / "tree").rename(tmp_path / "named")
        sync_folder(tmp_path)
    assert events.check() == {"named"}


def test_the_recorder_sees_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with recorded(monkeypatch) as events:
        (tmp_path / "file").rename(tmp_path / "named")
    with pytest.raises(AssertionError, match="before its bytes"):
        events.check()
    with recorded(monkeypatch) as events, (tmp_path / "named").open() as file:
        os.fsync(file.fileno())
        (tmp_path / "named").rename(tmp_path / "again")
    with pytest.raises(AssertionError, match="never synced"):
        events.check()
