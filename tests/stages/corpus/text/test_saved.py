"""Folders as ``datasets`` saves them (checked with its version 5.2.0), read without it."""

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilcache.data.split_names import named_split
from tests.data.reading import failure, read

TEXTS = [f"document {i}" for i in range(25)]


def save(folder, texts, shards):
    """What Dataset.save_to_disk leaves."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        part = pa.table({"text": texts[i * len(texts) // shards : (i + 1) * len(texts) // shards]})
        with pa.ipc.new_stream(str(folder / name), part.schema) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    (folder / "cache-0123.arrow").write_bytes(b"of a map over it")


def test_a_saved_data_set(tmp_path):
    save(tmp_path / "one", TEXTS, 11)
    assert read(tmp_path / "one") == TEXTS
    (tmp_path / "b.txt").write_text("beside it")
    assert read(tmp_path) == ["beside it", *TEXTS]
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "one"), "/saved", recursive=True)
    assert read("memory://saved") == TEXTS
    (tmp_path / "one" / "data-00003-of-00011.arrow").unlink()
    assert "data-00003-of-00011.arrow; save it again" in failure(tmp_path / "one")


def test_a_glob_over_a_saved_data_set(tmp_path, monkeypatch):
    folder = tmp_path / "one"
    save(folder, TEXTS, 2)
    stale = folder / "data-00000-of-00003.arrow"  # of a data set that was saved there before
    stale.write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    fsspec.filesystem("memory").put(str(folder), "/globbed", recursive=True)
    monkeypatch.chdir(folder)
    for given in (folder / "*.arrow", tmp_path / "*" / "d*", "*.arrow", "memory://globbed/*.arrow"):
        assert read(given) == TEXTS
    assert read(folder / "data-00001*.arrow") == TEXTS[12:]  # a part of it, as named
    (folder / "dataset_info.json").unlink()
    (folder / "cache-0123.arrow").unlink()
    assert read(folder / "*.arrow") == TEXTS[:12] + TEXTS  # files like others


def test_a_cache_of_data_sets_without_what_was_made_of_them(tmp_path):
    folder = tmp_path / "json" / "default-01" / "0.0.0"
    save(folder, TEXTS, 1)
    (folder / "state.json").unlink()
    (folder / "data-00000-of-00001.arrow").rename(folder / "json-train.arrow")
    assert read(tmp_path) == read(folder / "*") == read(folder / "*.arrow") == TEXTS
    (folder / "dataset_info.json").unlink()
    assert "cache-0123.arrow" in failure(tmp_path)


def test_other_text_beside_a_saved_data_set(tmp_path):
    save(tmp_path / "one", TEXTS, 1)
    (tmp_path / "one" / "notes.txt").write_text("A note.")
    assert read(tmp_path / "one" / "*.txt") == ["A note."]
    assert sorted(read(tmp_path / "one" / "*")) == sorted(["A note.", *TEXTS])


def test_splits_of_a_saved_data_set(tmp_path):
    root = tmp_path / "dict"
    save(root / "train", TEXTS, 1)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert read(root) == TEXTS
    save(root / "test", TEXTS[:3], 1)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    message = failure(root)
    assert "one split of a data set" in message
    assert f"with train, test; name one, as in {root}/train" in message
    assert read(root / "test") == TEXTS[:3]
    globs = [root / "*" / "*.arrow", root / "**" / "*.arrow", root / "t*" / "d*", root / "t*"]
    for given in (tmp_path, tmp_path / "*", *globs):
        assert f"name one, as in {root}/t" in failure(given)
    for given in (root / "tr*" / "*.arrow", root / "train" / "*"):
        assert read(given) == TEXTS
    fsspec.filesystem("memory").put(str(root), "/splits/of", recursive=True)
    assert "name one, as in memory:///splits/of/train" in failure("memory://splits")
    assert "with train, test" in failure("memory://splits/of/*/*.arrow")


def test_splits_of_a_saved_data_set_with_names_of_their_own(tmp_path, monkeypatch):
    """Which is which says dataset_dict.json alone."""
    for split in ("fold1", "fold2"):
        save(tmp_path / split, TEXTS, 1)
    assert read(tmp_path / "*" / "*.arrow") == TEXTS + TEXTS  # data sets beside each other
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["fold1", "fold2"]}))
    monkeypatch.chdir(tmp_path)
    for given in (tmp_path / "*" / "*.arrow", "*/*.arrow", "fold?/*"):
        assert "with fold1, fold2; name one, as in" in failure(given)
    assert read("fold2/*.arrow") == TEXTS


@pytest.mark.parametrize("shard", ["", "-00000-of-00001"])
def test_splits_in_a_cache_of_data_sets(tmp_path, shard):
    """The test split is no text to learn from."""
    folder = tmp_path / "imdb" / "0.0.0"
    save(folder, TEXTS, 1)
    (folder / "state.json").unlink()
    whole = folder / "data-00000-of-00001.arrow"
    (folder / f"my-imdb-train{shard}.arrow").write_bytes(whole.read_bytes())
    whole.rename(folder / f"my-imdb-test{shard}.arrow")
    for given in (tmp_path, folder, folder / "*.arrow"):
        message = failure(given)
        assert f"with test, train; name one, as in {folder}/*-test*.arrow" in message
    assert read(folder / "*-test*.arrow") == read(folder / f"my-imdb-train{shard}.arrow") == TEXTS


FORMS = ["{}-00000-of-00001.parquet", "{}-00000-of-00001-0a1b2c.parquet", "{}/0000.parquet",
         "c4-{}.00000-of-00008.jsonl", "{}.jsonl"]  # fmt: skip


def publish(folder, form, split):
    """A file of a clone of a data set on the hub."""
    file = folder / form.format(split)
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": TEXTS})
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    else:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))
    return file


@pytest.mark.parametrize("form", FORMS)
def test_splits_of_a_clone_of_the_hub(tmp_path, form):
    folder = tmp_path / "train" / "imdb" / "plain_text"  # A name above it says nothing.
    files = [publish(folder, form, split) for split in ("train", "unsupervised")]
    ending = files[0].suffix
    assert read(folder) == read(folder / "**" / f"*{ending}") == TEXTS + TEXTS
    publish(folder, form, "test")
    fsspec.filesystem("memory").put(str(folder), f"/{tmp_path.name}/hub", recursive=True)
    for given in (folder, folder / "**" / f"*{ending}", tmp_path, f"memory://{tmp_path.name}/hub"):
        message = failure(given)
        assert "must be one split of a data set, got" in message
        assert "with train, test; name one, as in" in message
    one = failure(folder).partition("as in ")[2].partition(", or ")[0]
    assert read(one) == read(files[0]) == TEXTS
    assert read(*files) == TEXTS + TEXTS


def test_text_files_and_other_words_are_no_splits(tmp_path):
    for name in ("test.txt", "train.txt"):
        (tmp_path / name).write_text(name)
    for name in ("contest", "training", "trainer", "devices"):
        publish(tmp_path, "{}.jsonl", name)
    assert len(read(tmp_path)) == 2 + 4 * len(TEXTS)


@pytest.mark.parametrize("form", FORMS)
def test_splits_are_those_that_datasets_finds(tmp_path, form):
    data_files = pytest.importorskip("datasets.data_files", reason="the extra 'hub'")
    names = ["train", "training", "dev", "val", "valid", "validation", "test", "eval", "contest",
             "my_dev", "train2", "evaluation", "testing", "devices", "unsupervised"]  # fmt: skip
    files = {name: publish(tmp_path, form, name) for name in names}
    found = data_files.get_data_patterns(str(tmp_path))
    wanted = {}
    for split, patterns in found.items():
        there = data_files.DataFilesList.from_patterns(patterns, base_path=str(tmp_path))
        wanted |= dict.fromkeys(map(Path, there), split)
    for file in files.values():
        named = named_split(file.relative_to(tmp_path).as_posix())
        assert (named and named.split) == (wanted.get(file) and str(wanted[file]))


def test_the_name_of_a_packed_split():
    assert named_split("train_0.jsonl.gz") == named_split("train_0.jsonl") == ("", "train", "train")


@pytest.mark.parametrize(
    ("log", "data"),
    [
        ("_delta_log/00000000000000000007.json", "part-0.parquet"),
        ("_delta_log/00000000000000000007.json", "year=2020/month=1/part-0.parquet"),
        (".hoodie/hoodie.properties", "2020/01/0.parquet"),
        ("metadata/00001-a.metadata.json", "data/0.parquet"),
        ("metadata/00001-a.metadata.json", "data/year=2020/0.parquet"),
    ],
)
def test_tables_with_old_rows_are_refused(tmp_path, log, data):
    for name in (log, data):
        (tmp_path / "table" / name).parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "table" / data)
    assert read(tmp_path / "table") == TEXTS
    assert read(tmp_path / "table" / data) == TEXTS
    (tmp_path / "table" / log).write_text("{}")
    fsspec.filesystem("memory").put(str(tmp_path / "table"), f"{tmp_path}/copy", recursive=True)
    for given in (tmp_path / "table", tmp_path / "table" / "**" / "*.parquet", tmp_path / "*"):
        assert "table, which keep old rows" in failure(given)
    assert "table, which keep old rows" in failure(f"memory:/{tmp_path}/copy")


@pytest.mark.parametrize("content", ["", "[]", '{"_data_files": []}', '{"_data_files": [3]}'])
def test_a_damaged_state(tmp_path, content):
    save(tmp_path / "one", TEXTS, 1)
    (tmp_path / "one" / "state.json").write_text(content)
    assert "state.json" in failure(tmp_path / "one")
