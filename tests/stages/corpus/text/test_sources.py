import gzip
import io
import json
import lzma
import os
import sys
import types
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from distilcache.data.errors import UserError
from distilcache.stages.corpus.text import documents, fingerprints, streams
from distilcache.stages.corpus.text.documents import iter_documents
from distilcache.stages.corpus.text.fingerprints import fingerprint
from distilcache.stages.corpus.text.readers import Reading
from distilcache.stages.corpus.text.sources import resolve_sources
from tests.data.reading import failure, read

TEXT = "First document.\nIts second line.\n\n  \nSecond: café – 日本.\r\n\r\nThird.\n"
DOCUMENTS = ["First document.\nIts second line.", "Second: café – 日本.", "Third."]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_text_in_every_compression(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](TEXT.encode()))
    assert read(path) == DOCUMENTS
    assert read(path, document="line") == [
        "First document.", "Its second line.", "Second: café – 日本.", "Third.",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", PACK)
def test_jsonl_in_every_compression(tmp_path, suffix):
    rows = [{"body": document, "text": 3} for document in DOCUMENTS] + [{"body": " "}]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix]("\n\n".join(map(json.dumps, rows)).encode()))
    assert read(path, text_field="body") == DOCUMENTS
    assert len(read(path, text_field="body", document="line")) == 3
    assert len(read(path, text_field="body", split_rows=True)) == 4


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "text": DOCUMENTS}), path)
    assert read(path) == DOCUMENTS
    assert "'body'" in failure(path, text_field="body")
    assert "got a number: " in failure(path, text_field="id")
    path.write_bytes(path.read_bytes()[:-9])
    assert str(path) in failure(path)


@pytest.mark.parametrize("suffix", PACK)
def test_small_reads_change_nothing(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](TEXT.encode()))
    monkeypatch.setattr(streams, "READ_BYTES", 1)  # splits characters and line ends
    assert read(path) == DOCUMENTS


def test_concatenated_members(tmp_path):
    for suffix, pack in PACK.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(pack(b"one\n\n") + pack(b"two\n"))
        assert read(path) == ["one", "two"]


def test_streams_of_xz_with_padding(tmp_path, monkeypatch):
    """xz(1): padding stands between streams, or after the last."""
    path = tmp_path / "a.txt.xz"
    one, two = lzma.compress(b"one\n\n"), lzma.compress(b"two\n\n" * 999)
    for size in (1, 1 << 20):
        monkeypatch.setattr(streams, "READ_BYTES", size)
        path.write_bytes(one + bytes(8) + two + bytes(4))
        assert read(path) == ["one", *["two"] * 999]
        for damaged in (one + b"\1" + two[1:], one + two[:-9], one + bytes(4) + b"more"):
            path.write_bytes(damaged)
            assert "an intact .xz file" in failure(path)


def test_folders_and_globs_are_sorted_and_recursive(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.jsonl", "sub/_d.txt", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert read(tmp_path) == ["a.txt", "b.txt", "sub/c.jsonl"]
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/_d.txt"]


def test_fsspec_urls():
    memory = fsspec.filesystem("memory")
    memory.pipe("/sources/a.txt", TEXT.encode())
    memory.pipe("/sources/b.txt.gz", gzip.compress(b"Fourth."))
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["Fifth."]}), table)
    memory.pipe("/sources/c.parquet", table.getvalue().to_pybytes())
    everything = [*DOCUMENTS, "Fourth.", "Fifth."]
    assert read("memory://sources") == everything
    assert read("memory://sources/*.txt*") == everything[:4]
    assert read("memory://sources/a.txt") == DOCUMENTS
    found = resolve_sources(["memory://sources/a.txt"])[0]
    assert fingerprint(found)["size"] == len(TEXT.encode())
    assert "memory://sources/none.txt" in failure("memory://sources/none.txt")
    fsspec.filesystem("memory").copy("/sources/a.txt", "/bracket/a[1].txt")
    fsspec.filesystem("memory").pipe("/bracket/a1.txt", b"What the pattern matches.")
    assert read("memory://bracket/a[1].txt") == DOCUMENTS
    assert "nosuch://" in failure("nosuch://a.txt")


class Server(fsspec.AbstractFileSystem):
    """What some servers give: no lengths, and content from its start on alone."""

    protocol = "streamed"
    files: ClassVar[dict] = {}
    about: ClassVar[dict] = {"size": None}

    def info(self, path, **options):
        path = self._strip_protocol(path)
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", **self.about}

    def open(self, path, mode="rb", **options):
        file = io.BytesIO(self.files[self._strip_protocol(path)])
        file.seek = None
        return file


def test_files_of_unknown_size(monkeypatch):
    """As fsspec gives them where a server names no Content-Length."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "streamed", Server)
    rows = b'{"text": "Row."}\n'
    table = {"c.parquet": b"PAR1", "d.arrow": b"ARROW1"}
    files = {"a.txt": TEXT.encode(), "b.jsonl.gz": gzip.compress(rows), "empty.txt": b"", **table}
    monkeypatch.setattr(Server, "files", {f"host/{name}": files[name] for name in files})
    assert read("streamed://host/a.txt", "streamed://host/b.jsonl.gz") == [*DOCUMENTS, "Row."]
    assert "got an empty file: streamed://host/empty.txt" in failure("streamed://host/empty.txt")
    for name in table:
        message = failure(f"streamed://host/{name}")
        assert message.endswith(f"got none from the server of streamed://host/{name}; download it "
                                "and pass the file")  # fmt: skip


def test_files_on_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Server)
    monkeypatch.setattr(Server, "protocol", "hf")
    url = "hf://datasets/owner/name@main/a.txt"
    monkeypatch.setattr(Server, "files", {url.removeprefix("hf://"): TEXT.encode()})
    prints = []
    for blob in ("1f", "1f", "2e"):
        monkeypatch.setattr(Server, "about", {"size": len(TEXT.encode()), "blob_id": blob})
        assert read(url) == DOCUMENTS
        prints.append(fingerprint(resolve_sources([url])[0]))
    assert prints[0] == prints[1] != prints[2]
    assert "and no such file" in failure("hf://datasets/owner/name/b.txt")


def test_one_long_document_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("distilcache.stages.corpus.text.streams.MAX_CHARS", 100)
    monkeypatch.setattr("distilcache.stages.corpus.text.documents.MAX_CHARS", 100)
    monkeypatch.setattr("distilcache.stages.corpus.text.streams.READ_BYTES", 64)
    text = [f"line number {i} of some length" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(text))
    found = read(tmp_path / "a.txt")
    assert max(map(len, found)) <= 100
    assert "\n".join(found).split("\n") == text
    (tmp_path / "b.txt").write_text("word " * 500 + "x" * 500)  # not a single line end
    found = read(tmp_path / "b.txt")
    assert max(map(len, found)) <= 100
    assert "".join("".join(found).split()) == "word" * 500 + "x" * 500


def test_what_no_text_file_has_becomes_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    assert read(tmp_path / "a.jsonl") == ["a ? b"]
    (tmp_path / "a.jsonl").write_text('{"text": "a \\u0000[MASK]"}\n')
    assert read(tmp_path / "a.jsonl") == ["a  [MASK]"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_compression(tmp_path, suffix):
    whole = PACK[suffix](b"".join(b"document %d\n\n" % i for i in range(5000)))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    assert path.name in failure(path)
    path.write_bytes(b"no compressed file at all")
    assert path.name in failure(path)


@pytest.mark.parametrize("content", [b"", b" \n\n \n", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path, content):
    path = tmp_path / ("a.txt.gz" if content[:1] == b"\x1f" else "a.txt")
    path.write_bytes(content)
    assert "empty file" in (message := failure(path))
    assert path.name in message


def test_empty_files_among_others_are_counted(tmp_path):
    names = ("b.jsonl", "c.txt.xz", "d.txt.zst", "e.parquet", "f.txt")
    for name in names:
        (tmp_path / name).write_bytes(b"\n \n" if name == "f.txt" else b"")
    assert "empty file" in failure(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    said = []
    assert read(tmp_path, say=said.append) == DOCUMENTS
    assert said == [f"5 of 6 files are empty, such as {tmp_path / 'b.jsonl'}"]
    assert read(tmp_path / "*.txt", say=said.append) == DOCUMENTS
    assert said[1:] == [f"1 of 2 files are empty, such as {tmp_path / 'f.txt'}"]
    assert "f.txt" in failure(tmp_path / "a.txt", tmp_path / "f.txt")


@pytest.mark.parametrize("content", [b"text\0\1text", b"\x89PNG\r\n\x1a\n\xff\xfe"])
def test_binary_file_is_refused_before_reading_documents(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"binary file: .*a\.txt"):
        resolve_sources([str(path)])


@pytest.mark.parametrize("blank", ["", " \t"])
def test_a_source_without_a_name_is_not_the_working_folder(tmp_path, monkeypatch, blank):
    (tmp_path / "a.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert failure("a.txt", blank).endswith(f"got {blank!r}; leave it out")


def test_missing_sources_say_what_the_recipe_needs(tmp_path):
    for name in ("none.txt", "none/*.txt"):
        with pytest.raises(UserError, match=r"none.*put the files there") as caught:
            resolve_sources([str(tmp_path / name)], "put the files there")
        assert "\n" not in str(caught.value)


def test_what_a_folder_leaves_out_is_said(tmp_path):
    for name in (
        "a.txt",
        "b.csv",
        "c.json.gz",
        *(f"{i}.pdf" for i in range(40)),
        "x.doc",
        "y",
        ".z",
    ):
        content = b"text\n"
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    said = []
    assert len(resolve_sources([str(tmp_path)], say=said.append)) == 3
    assert said == [
        f"43 of 46 files in {tmp_path} are left out: 40 .pdf, 1 .z, 1 .doc, 1 y",
        f"{tmp_path} has files of several kinds, and all are read: 1 txt, 1 csv, 1 json",
    ]
    said.clear()
    resolve_sources([str(tmp_path / "a.txt"), str(tmp_path / "*.csv")], say=said.append)
    assert said == []


def test_hidden_folders_are_left_out_as_hidden_files_are(tmp_path):
    root = tmp_path / ".own"  # named, so it is read
    there = ("a.txt", "_year=2020/b.txt")
    for name in (*there, ".ipynb_checkpoints/a.txt", "more/_delta_log/deep/0.json"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(f"{name}\n")
    fsspec.filesystem("memory").put(str(root), "/hidden/.own", recursive=True)
    said = []
    for given in (str(root), f"{root}/", f"{tmp_path}/.o*", "memory://hidden/.own"):
        found = resolve_sources([given], say=said.append)
        assert sorted(s.path.partition(".own/")[2] for s in found) == sorted(there), given
        assert said == [f"2 of 4 files in {given.rstrip('/')} are left out: 1 .txt, 1 .json"]
        said.clear()
    for given, line in (
        (f"{root}/**/*.*", " are left out: "),
        (f"{root}/*", "1 .json"),
    ):
        for place in (given, f"memory://hidden/.own{given.removeprefix(str(root))}"):
            found = resolve_sources([place], say=said.append)
            assert sorted(s.path.partition(".own/")[2] for s in found) == sorted(there), place
            assert line in said.pop()
    assert read(root / ".ipynb*" / "*.txt") == [".ipynb_checkpoints/a.txt"]
    (root / "visible").symlink_to(root / ".ipynb_checkpoints")
    assert len(resolve_sources([str(root)])) == 3
    (tmp_path / "_all").mkdir()
    (tmp_path / "_all" / "a.txt").write_text("a\n")
    assert failure(tmp_path).endswith("; name folders that begin with . or _ themselves")
    assert read(tmp_path / "_all") == ["a"]


def test_a_glob_takes_what_is_in_the_folders_that_it_matches(tmp_path):
    for name in ("a.txt", "train/b.txt", "train/more/c.txt", "images/d.png", "meta/info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"{name}\n")
    said = []
    wanted = ["a.txt", "train/b.txt", "train/more/c.txt"]
    for place in (str(tmp_path), f"memory:/{tmp_path}"):
        if "memory" in place:
            fsspec.filesystem("memory").put(str(tmp_path), str(tmp_path), recursive=True)
        globs = {"*": wanted, "[t]*": wanted[1:], "**/*.txt": wanted, "**/train": wanted[1:]}
        for given, files in globs.items():
            found = resolve_sources([f"{place}/{given}"], say=said.append)
            assert [s.path.partition(f"{tmp_path}/")[2] for s in found] == files, (place, given)
            left = [f"2 of 5 files in {place}/* are left out: 1 .png, 1 .json"]
            assert said == (left if given == "*" else [])
            said.clear()


def test_folders_that_are_links_are_read_once(tmp_path):
    for name in ("data/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"{name}\n")
    for link in ("data/one", "data/two"):
        (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/deep/again").symlink_to(tmp_path / "data")
    (tmp_path / "data/up").symlink_to(tmp_path)  # what is around the source is none of it
    (tmp_path / "data/real").mkdir()
    (tmp_path / "data/real/d.txt").write_text("d\n")
    (tmp_path / "data/link").symlink_to(tmp_path / "data/real")
    said = []
    found = resolve_sources([str(tmp_path / "data")], say=said.append)
    names = ["a.txt", "one/b.txt", "one/deep/c.txt", "real/d.txt"]
    assert [source.path for source in found] == [str(tmp_path / "data" / name) for name in names]
    assert said == []


def test_a_file_that_is_named_twice_is_told(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text\n")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    said = []
    resolve_sources([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], say=said.append)
    assert said == []
    resolve_sources([str(tmp_path / "a.txt"), str(tmp_path / "[bl]*.txt")], say=said.append)
    assert said == [f"files that are named more than once are read as often: {tmp_path}/a.txt"]


def test_a_few_json_files_beside_others_describe_them(tmp_path):
    (tmp_path / "dataset_infos.json").write_text('{"default": {"description": ""}}')
    (tmp_path / "a.jsonl").write_text('{"text": "data"}')
    said = []
    assert [s.path for s in resolve_sources([str(tmp_path)], say=said.append)] == [
        str(tmp_path / "a.jsonl")
    ]
    assert said == [f"1 of 2 files in {tmp_path} are left out: 1 .json"]
    (tmp_path / "a.jsonl").rename(tmp_path / "b.json")
    (tmp_path / "dataset_infos.json").write_text('{"text": "data, too"}')
    assert read(tmp_path) == ["data", "data, too"]
    (tmp_path / "licence.txt").write_text("a licence")  # one file beside many
    assert read(tmp_path) == ["data", "data, too", "a licence"]


def test_links_to_nothing_and_closed_folders(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "image.png").symlink_to(tmp_path / "nowhere.png")
    said = []
    assert len(resolve_sources([f"{tmp_path}/*", str(tmp_path)], say=said.append)) == 2
    (tmp_path / "gone.txt.gz").symlink_to("objects/7f")
    for given in (tmp_path, tmp_path / "*", tmp_path / "*.gz"):
        assert f"{tmp_path}/gone.txt.gz, a link to a missing one, objects/7f" in failure(given)
    (tmp_path / "gone.txt.gz").unlink()
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):  # The superuser may open every folder.
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    said.clear()
    assert len(resolve_sources([str(tmp_path)], say=said.append)) == 1
    assert f"folder {tmp_path}/closed is left out: Permission denied" in said


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:7f\nsize 9\n", "git lfs pull"),
        ("/annex/objects/SHA256E-s9--7f.txt\n", "git annex get"),
        ("../.git/annex/objects/Xk/9Z/SHA256E-s9--7f/SHA256E-s9--7f.txt", "git annex get"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet", "a.arrow", "a.fa"])
def test_pointers_are_no_data(tmp_path, name, content, remedy):
    (tmp_path / "whole.txt").write_text("text\n" * 40)
    (tmp_path / name).write_text(content)
    for given in (tmp_path / name, tmp_path):
        message = failure(given)
        assert f"got a pointer to them: {tmp_path / name}; " in message
        assert remedy in message


def test_what_is_odd_among_files_is_told(tmp_path):
    for i in range(3):
        (tmp_path / f"c4-de.0000{i}-of-00004.jsonl").write_text('{"text": "a"}\n')
    said = []
    resolve_sources([str(tmp_path)], say=said.append)
    assert said == [f"3 of the 4 files {tmp_path}/c4-de.*-of-00004.jsonl are there"]
    (tmp_path / "c4-de.00003-of-00004.jsonl").write_text('{"text": "a"}\n')
    said.clear()
    resolve_sources([str(tmp_path)], say=said.append)
    assert said == []
    other = tmp_path / "c4-de-validation.jsonl"
    other.write_text('{"text": "a"}\n')
    resolve_sources([f"{tmp_path}/*.jsonl"], say=said.append)
    (line,) = said
    assert line.startswith("files whose names say validation or test ")
    assert line.endswith(f": {other}")
    said.clear()
    resolve_sources([f"{tmp_path}/*-validation.jsonl", str(other)], say=said.append)
    assert [line for line in said if "validation or test" in line] == []


def test_unsupported_files(tmp_path):
    for name in ("a.pdf", "a.parquet.gz", "a"):
        (tmp_path / name).write_text("text")
        assert name in failure(tmp_path / name)
    assert str(tmp_path) in failure(tmp_path)


def test_bad_jsonl_lines_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for bad in ('{"text": ', '{"txt": "x"}', '["text"]', '{"text": null}'):
        path.write_text('{"text": "fine"}\n\n' + bad + "\n")
        message = failure(path)
        assert "a.jsonl line 3" in message


def test_fingerprint_follows_the_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    seen = set()
    for full in (1 << 30, 0):
        monkeypatch.setattr(fingerprints, "FULL_HASH_BYTES", full)
        monkeypatch.setattr(fingerprints, "SAMPLE_BYTES", 4)
        for content in ("one two three", "one two threE", "One two three"):
            path.write_text(content)
            seen.add(json.dumps(fingerprint(resolve_sources([str(path)])[0])))
    assert len(seen) == 6


class FakeHub(types.ModuleType):
    def __init__(self, known):
        super().__init__("datasets")
        self.known = known

    def load_dataset(self, *name, split, streaming):
        assert streaming
        if (*name, split) not in self.known:
            raise FileNotFoundError(f"no data set {name} {split}")
        return iter([{"text": document} for document in DOCUMENTS])


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:wiki:train", ("wiki", "train")),
        ("hf:owner/wiki:train", ("owner/wiki", "train")),
        ("hf:owner/wiki/en:test", ("owner/wiki", "en", "test")),
        ("hf:wiki/en:test", ("wiki", "en", "test")),
    ],
)
def test_hub_data_set(monkeypatch, source, asked):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub({asked}))
    assert read(source) == DOCUMENTS
    assert "'body'" in failure(source, text_field="body")


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(set()))
    assert "local file" in failure("hf:owner/none:train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'datasets>=3.0'" in failure("hf:owner/none:train")
    assert "hf:NAME" in failure("hf:owner/none")


def test_a_file_and_its_packed_copy_are_told(tmp_path):
    for name, suffix in (("a.txt", ""), ("a.txt", ".gz"), ("b.txt", ".gz"), ("a.b.txt", "")):
        (tmp_path / f"{name}{suffix}").write_bytes(PACK[suffix](b"text\n"))
    said = []
    assert len(resolve_sources([str(tmp_path)], say=said.append)) == 4
    (line,) = said
    assert line.endswith(f"move one away: {tmp_path}/a.txt and {tmp_path}/a.txt.gz")
    (tmp_path / "a.txt").unlink()
    resolve_sources([str(tmp_path)], say=said.append)
    assert said == [line]


def test_a_folder_with_brackets_in_its_name_is_not_hidden_where_it_is_named(tmp_path):
    folder = tmp_path / "_clean[v2]"
    folder.mkdir()
    (folder / "a.txt").write_text("text\n")
    (found,) = resolve_sources([str(folder)])
    assert found.path == str(folder / "a.txt")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_records_of_fasta_are_documents(tmp_path, suffix, monkeypatch):
    """Of UniProt's layout: a header, and lines of 60 letters that belong together."""
    first, second = "MKVLAAGIVG" * 14 + "LLLA", "ARND" * 16
    lines = [
        ">sp|P1|A protein",
        *(first[i : i + 60] for i in range(0, len(first), 60)),
        "",
        ">sp|P2|Another",
        second,
        ">sp|P3|Nothing",
    ]
    path = tmp_path / f"proteins.fasta{suffix}"
    path.write_bytes(PACK[suffix]("\r\n".join(lines).encode()))
    for document in ("blank_line", "line"):
        assert read(path, document=document) == [first, second]
    monkeypatch.setattr(documents, "MAX_CHARS", 100)
    found = list(iter_documents(resolve_sources([str(path)]), Reading()))
    assert [segment.begins for segment in found] == [True, False, True]
    assert "".join(segment.text for segment in found) == first + second


def test_letters_that_stand_apart_do_so_across_the_lines_of_a_record(tmp_path):
    path = tmp_path / "spaced.fasta"
    path.write_text(">one\nM K T A\nA R\nN\n>two\nMKTA\nARN\n")
    assert read(path) == ["M K T A A R N", "MKTAARN"]


def test_a_fasta_file_begins_with_a_record(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text("The letters of a book, not of a genome.\n")
    assert "must begin with the > of a record, as FASTA files do, got 'The letters of a boo'" in (
        failure(path)
    )
    path.write_text("\n>one\nGATTACA\n;two\n;its source\nGATT\nACA\n")
    assert read(path) == ["GATTACA", "GATTACA"]
