"""Encodings, line ends and compressions of text files, as people have them."""

import gzip
import json
import re
import shutil
import subprocess

import pytest
import zstandard

from distilcache.stages.corpus.text import streams
from tests.data.reading import failure, read

LINES = ["Zürich café", "naïve über", "plain"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_line_ends(tmp_path, monkeypatch, end, size):
    monkeypatch.setattr(streams, "READ_BYTES", size)
    path = tmp_path / "a.txt"
    path.write_bytes((end.join(LINES) + end + end + "Last.").encode("utf-8-sig"))
    assert read(path) == ["\n".join(LINES), "Last."]
    assert read(path, document="line") == [*LINES, "Last."]
    assert read(path, document="file") == ["\n".join([*LINES, "", "Last."])]


@pytest.mark.parametrize(
    ("encoding", "named", "byte", "offset"),
    [
        ("latin-1", "Windows-1252 or Latin-1", "0xfc", 1),
        ("cp1252", "Windows-1252 or Latin-1", "0xfc", 1),
        ("utf-16", "UTF-16", "0xff", 0),
        ("utf-16-le", "UTF-16", "0xfc", 2),
        ("utf-16-be", "UTF-16", "0xfc", 3),
        ("utf-32", "UTF-32", "0xff", 0),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_other_encodings_are_named_with_their_place(
    tmp_path, encoding, named, byte, offset, packed
):
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    content = "\n".join(LINES).encode(encoding)
    path.write_bytes(gzip.compress(content) if packed else content)
    message = failure(path)
    assert f"looks like {named}: {path} (byte {byte} at offset {offset}" in message
    assert ("of the unpacked text" in message) == packed
    assert "iconv -f" in message


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Один из самых больших городов страны.", "koi8-r"),
        ("Один из самых больших городов страны.", "cp1251"),
        ("Η πόλη είναι μεγάλη και παλιά.", "iso8859-7"),
        ("这座城市又大又老。", "gb18030"),
        ("この町は大きくて古い。", "shift_jis"),
    ],
)
def test_the_encoding_of_another_script_is_not_guessed(tmp_path, text, encoding):
    """Windows-1252 takes all their bytes, and iconv would write other letters."""
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding) * 100)
    message = failure(path)
    assert "got another encoding: " in message
    assert "1252" not in message


def test_plain_utf_16_without_a_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("plain text".encode("utf-16-le"))
    assert f"looks like UTF-16: {path} (byte 0x00 at offset 1)" in failure(path)


def test_the_offset_counts_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "READ_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_bytes(b"plain text " * 100 + b"\xfc more")
    assert "Latin-1: " in (message := failure(path))
    assert "(byte 0xfc at offset 1,100)" in message
    path.write_bytes("Zürich ".encode() * 100 + b"\xc3 more")
    assert "damaged text: " in (message := failure(path))
    assert "(byte 0xc3 at offset 800)" in message
    path.write_bytes(b"plain text " * 1000 + "Zürich ".encode() + b"\xfc more")
    assert "damaged text: " in (message := failure(path))
    assert "(byte 0xfc at offset 11,008)" in message
    path.write_bytes(b"plain text " * 1000 + b"\0 more")
    assert "text with NUL bytes: " in (message := failure(path))
    assert "(byte 0x00 at offset 11,000)" in message
    for binary in (b"name" + b"\0" * 96 + b"plain text", b"\x02plain text\0 more"):
        path.write_bytes(binary)
        assert "a binary file: " in failure(path)


def test_a_long_window_is_named(tmp_path):
    """Intact, but a reader must be told to take so much memory."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(long_window("some text\n" * 1000))
    message = failure(path)
    assert "window of at most 128 MiB" in message
    assert f"{path}; pack it again: zstd -d --long=31" in message


def long_window(text: str) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(text.encode()) + packer.flush()


REMEDIES = {
    "Latin-1": ("a.txt", lambda text: text.encode("latin-1"), "iconv"),
    "UTF-16": ("a.txt", lambda text: text.encode("utf-16"), "iconv"),
    "damaged": ("a.txt", lambda text: text.encode() * 10 + b"\xc3\n\n", "iconv"),
    "NUL bytes": ("a.txt", lambda text: b"\0\n\n" + text.encode(), "tr"),
    "a long window": ("a.txt.zst", long_window, "zstd"),
    "JSON over many lines": ("a.jsonl", lambda text: json.dumps({"text": text}, indent=1).encode(),
                             "jq"),
}  # fmt: skip


@pytest.mark.parametrize("name", REMEDIES)
def test_the_command_that_a_message_names_mends_the_file(tmp_path, name):
    file, write, tool = REMEDIES[name]
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    text = "\n".join(LINES)
    path, new = tmp_path / file, tmp_path / f"new-{file}"
    path.write_bytes(write(text + "\n\n"))
    command = re.search(rf": ({tool} [^,]*NEW[.zst]*)", failure(path))
    assert command is not None
    line = command[1].replace("FILE", str(path)).replace(f"NEW{path.suffix}", "NEW")
    subprocess.run(line.replace("NEW", str(new)), shell=True, check=name != "damaged")
    assert set(read(new)) == {text}
