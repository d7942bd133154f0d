"""One way from a row to its text, whatever the file: the same rows, the same faults."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilcache.stages.corpus.text import rows, streams
from tests.data.reading import failure, read

TEXTS = ['He said "yes", twice.', "Two\nlines", "Zürich – 日本", "plain"]


def table(values, name="text"):
    return pa.table({"id": range(len(values)), name: values})


def arrow(values, opened, name="text"):
    sink = io.BytesIO()
    made = table(values, name)
    with opened(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=2)
    return sink.getvalue()


def parquet(values, name="text"):
    sink = io.BytesIO()
    pq.write_table(table(values, name), sink)
    return sink.getvalue()


def objects(values, name="text"):
    return [{"id": i, name: value} for i, value in enumerate(values)]


def json_lines(values, name="text"):
    return "\n".join(map(json.dumps, objects(values, name))).encode()


def comma(values, name="text"):
    sink = io.StringIO()
    csv.writer(sink).writerows([["id", name], *enumerate(values)])
    return sink.getvalue().encode()


def parted(values, name="text", by=";"):
    sink = io.StringIO()
    csv.writer(sink, delimiter=by).writerows(
        [["a, b;;;\t\t\t", "i", name], *((1, i, v) for i, v in enumerate(values))]
    )
    return b"\n" + sink.getvalue().encode()


def tabs(values, name="text"):
    return "".join(f"{i}\t{v}\n" for i, v in [("id", name), *enumerate(values)]).encode()


FILES = {
    "a.json": json_lines,
    "a.jsonl": json_lines,
    "a.ndjson": json_lines,
    "a.json.gz": lambda *a: gzip.compress(json_lines(*a)),
    "array.json": lambda *a: json.dumps(objects(*a)).encode(),
    "pretty.json": lambda *a: json.dumps(objects(*a), indent=2).encode(),
    "array.json.gz": lambda *a: gzip.compress(json.dumps(objects(*a)).encode()),
    "a.csv": comma,
    "semicolon.csv": parted,
    "tab.csv": lambda *a: parted(*a, by="\t"),
    "a.csv.gz": lambda *a: gzip.compress(comma(*a)),
    "a.parquet": parquet,
    "stream.arrow": lambda *a: arrow(a[0], pa.ipc.new_stream, *a[1:]),
    "file.arrow": lambda *a: arrow(a[0], pa.ipc.new_file, *a[1:]),
}


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_texts(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(streams, "READ_BYTES", size)
    monkeypatch.setattr(rows, "BATCH_ROWS", 3)
    path = tmp_path / name
    path.write_bytes(FILES[name](TEXTS))
    assert read(path) == TEXTS
    path.write_bytes(FILES[name](TEXTS, "body"))
    assert read(path, text_field="body") == TEXTS
    message = failure(path)
    assert "'text'" in message
    assert "body" in message
    assert "set corpus.text_field" in message
    path.write_bytes(FILES[name](["Old\r\nline\rends,\r\n\r\nmixed", "plain"]))
    assert read(path) == ["Old\nline\nends,\n\nmixed", "plain"]


def test_tabs_have_no_quotes(tmp_path):
    path = tmp_path / "a.tsv"
    texts = ['"Yes" he said', 'an inch: 1"', '"open', "plain"]
    path.write_bytes(tabs(texts))
    assert read(path) == texts


@pytest.mark.parametrize(
    ("name", "place"),
    [("a.jsonl", "line 3"), ("array.json", "item 3"), ("a.parquet", "row 3"),
     ("stream.arrow", "row 3"), ("file.arrow", "row 3")],
)  # fmt: skip
@pytest.mark.parametrize("bad", [None, 7, 2.5, True, ["a", "list"], {"x": "y"}])
def test_a_row_without_text_is_named_or_skipped(tmp_path, name, place, bad):
    kinds = {"NoneType": "null", "int": "a number", "float": "a number", "bool": "a truth value",
             "list": "a list", "dict": "fields of its own ('x')"}  # fmt: skip
    path = tmp_path / name
    values = ["one", "two", bad, "four", bad]
    if bad is not None and not name.endswith(("json", "jsonl")):  # a column has one type
        values, place = [bad] * 5, "row 1"
    path.write_bytes(FILES[name](values))
    kind = kinds[type(bad).__name__]
    message = failure(path)
    assert f"got {kind}: {path} {place}; set corpus.text_field" in message
    assert "corpus.on_bad_row" in message
    said = []
    if "one" in values:
        found = read(path, skip_bad_rows=True, say=said.append)
        assert found == ["one", "two", "four"]
    else:
        message = failure(path, skip_bad_rows=True, say=said.append)
        assert f"of some row, got {kind}: {path} row 1; set corpus.text_field" in message
        assert "on_bad_row" not in message
    count = values.count(bad)
    assert said == [f"{count} of 5 rows are left out, the first with {kind}: {path} {place}"]


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_column_that_is_not_utf8(tmp_path, name):
    """The formats say that texts are UTF-8; not every writer looks."""
    path = tmp_path / name
    values = [b"one", b"Stra\xdfe", b"three", b"\xff\xfe"]
    path.write_bytes(FILES[name](pa.array(values).view(pa.string())))
    message = failure(path)
    assert f"got bytes that are not UTF-8: {path} row 2; write the column again" in message
    said = []
    assert read(path, skip_bad_rows=True, say=said.append) == ["one", "three"]
    assert "2 of 4 rows are left out" in said[0]


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_a_value_that_python_cannot_hold(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name](pa.array([0, 1 << 60], pa.timestamp("us"))))
    assert "got no text" in failure(path)


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet", "stream.arrow"])
def test_a_field_within_a_field(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name]([{"text": text, "n": 1} for text in TEXTS], "doc"))
    assert read(path, text_field="doc.text") == TEXTS
    assert "no 'body' among " in failure(path, text_field="doc.body")
    assert "got fields of its own (" in failure(path, text_field="doc")
    path.write_bytes(FILES[name](TEXTS, "doc.text"))  # a name that has a dot
    assert read(path, text_field="doc.text") == TEXTS


def test_lines_that_are_no_json(tmp_path):
    path = tmp_path / "a.jsonl"
    for bad in ('{"text": "a}', "text", "[" * 100_000):
        path.write_text('{"text": "one"}\n\n' + bad + '\n{"text": "two"}\n')
        assert f"got no JSON in it: {path} line 3; write one object a line" in failure(path)
        assert read(path, skip_bad_rows=True) == ["one", "two"]
    path.write_text('{"text": "one"}\n["text"]\n')
    assert f"got a list in place of fields: {path} line 2" in failure(path)
    path.write_text(json.dumps({"text": "one"}, indent=1))
    assert "line 1; write one object a line: jq -c . FILE" in failure(path)


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_broken_arrays(tmp_path, monkeypatch, size):
    monkeypatch.setattr(streams, "READ_BYTES", size)
    path = tmp_path / "a.json"
    for bad in ('[{"text": "one"}, {"text": "tw', '[{"text": "one"}] x', '[{"text": "one"}'):
        path.write_text(bad)
        message = failure(path)
        assert f"intact JSON array, got none after item 1 of {path}" in message
    path.write_text("[]")
    assert "empty file" in failure(path)
    path.write_text('["one", {"text": "two"}]')
    assert f"got a text in place of fields: {path} item 1" in failure(path)
    path.write_text('[{"text": "one"}, {"text": "%s"}]' % ("long " * 100))
    monkeypatch.setattr(rows, "MAX_ITEM", 300)
    if size == 1:
        assert "after item 1" in failure(path)  # no more of it is held


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz", "a.tsv"])
def test_a_line_without_end_is_not_held(tmp_path, monkeypatch, name):
    """A field has its own limit; here many short ones, or blanks, make one long line."""
    monkeypatch.setattr(streams, "READ_BYTES", 64)
    monkeypatch.setattr(streams, "MAX_ITEM", 200)
    made = {"a.jsonl": json_lines, "a.csv.gz": comma, "a.tsv": tabs}[name]
    fill = {"a.jsonl": b" ", "a.csv.gz": b"7,", "a.tsv": b"7\t"}[name]
    ended = made(["one", "two"]).strip() + b"\n"
    pack = gzip.compress if name.endswith(".gz") else bytes
    path = tmp_path / name
    path.write_bytes(pack(ended + 10_000 * fill))
    at = ended.count(b"\n") + 1
    assert f"200 characters, got a longer one: {path} line {at}; write one row" in failure(path)
    path.write_bytes(pack(ended))
    assert read(path) == ["one", "two"]


def test_two_text_columns_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,text\none,two\n")
    assert "must have one column 'text', got 2" in failure(path)
    path.write_text("id,text,id\n1,two,3\n")
    assert read(path) == ["two"]


def test_bad_quotes_and_fields_in_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"one\nmore"\n2,"tw"o\n')
    assert f"in the row that begins in line 4 of {path}; double the quotes" in failure(path)
    path.write_text('id,text\n1,one\n2,"two\n3,three\n')
    message = failure(path)
    assert f"got unexpected end of data in the row that begins in line 3 of {path}" in message
    path.write_text("id,text\n\n1,one\n2,two, three\n3\n4,four\n")
    assert f"got 3 fields in place of 2: {path} line 4; correct it" in failure(path)
    assert read(path, skip_bad_rows=True) == ["one", "four"]
    path.write_text("id text\n1 one\n")
    assert "must have the column 'text', got 'id text': " in (message := failure(path))
    assert "which end at commas, semicolons or tabs" in message
    path.write_text("A whole text " * 100 + "\n")  # no header
    assert "got 'A whole text A whole text A whole tex...': " in failure(path)
    long = "word " * 100_000  # beyond the library's own limit of a field
    path.write_text(f"text\n{long}\n")
    assert read(path) == [long.strip()]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_damaged_tables(tmp_path, name):
    path = tmp_path / name
    whole = FILES[name](TEXTS)
    for content in (whole[: len(whole) // 2], b"no such file at all", b"x"):
        path.write_bytes(content)
        kind = name.rpartition(".")[2]
        assert f"must be an intact {kind} file, got {path}: " in failure(path)


def test_an_arrow_file_that_is_cut_anywhere(tmp_path):
    """Read as a stream it would be whole after every batch."""
    path = tmp_path / "file.arrow"
    whole = FILES["file.arrow"](TEXTS)
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        assert f"must be an intact arrow file, got {path}: " in failure(path)
