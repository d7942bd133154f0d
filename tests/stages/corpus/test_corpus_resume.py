"""Corpora that are reused, finished after an interruption, or stopped by a fault in one line."""
# ruff: noqa: F811

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.storage.files import write_json
from distilcache.stages.corpus import pool
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.text import docstrings
from distilcache.stages.corpus.worker import part_name
from tests.command_line import ROOT, environment, gone, wait_until
from tests.stages.corpus.corpus_support import (
    config,
    contents,
    failure,
    make_documents,
    text,  # noqa: F401
    tokenizer,  # noqa: F401
)

BUILD = """
import sys, time
from pathlib import Path
from distilcache.stages.corpus import pool
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.config import CorpusConfig
add = pool.Tally.add
pool.Tally.add = lambda self, done: (time.sleep(0.02), add(self, done))  # some 3 seconds in all
source, tokenizer, out = sys.argv[1:]
config = CorpusConfig(sources=(source,), max_length=16, chunk_bytes=2048, workers=2)
build_corpus(config, Path(out), tokenizer)
"""


def test_finished_corpus_is_reused(tmp_path, text, tokenizer, monkeypatch, capsys):
    first = build_corpus(config(text), tmp_path / "out", tokenizer)
    monkeypatch.setattr("distilcache.stages.corpus.build.run_units", None)
    again = build_corpus(config(text, workers=7), tmp_path / "out", tokenizer)
    assert again.manifest == first.manifest
    assert "reused" in capsys.readouterr().err


def test_config_replaced_by_worker_count_only_is_the_same_request(tmp_path, text, tokenizer):
    base = config(text)
    build_corpus(base, tmp_path / "out", tokenizer)
    build_corpus(replace(base, workers=2), tmp_path / "out", tokenizer)


def test_other_settings_are_refused_by_name(tmp_path, text, tokenizer):
    out = tmp_path / "out"
    build_corpus(config(text), out, tokenizer)
    before = contents(out)
    message = failure(config(text, max_length=24, packing="lines"), out, tokenizer)
    assert "max_length is 16 there and 24 now" in message
    assert "packing is 'blocks' there and 'lines' now" in message
    assert message.endswith("or choose another name or root")
    assert "tokenizer" in failure(config(text), out, "train")
    text.write_text(text.read_text().replace("harbour", "Harbour"))
    assert f"new, gone or changed: {text};" in failure(config(text), out, tokenizer)
    assert contents(out) == before


def finished_and_reused(settings, out, tokenizer, monkeypatch):
    before = contents(out)
    with monkeypatch.context() as patched:
        patched.setattr("distilcache.stages.corpus.build.run_units", None)
        build_corpus(settings, out, tokenizer)
    assert contents(out) == before


def test_the_same_text_by_another_path_is_the_same(tmp_path, text, tokenizer, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(make_documents(40, seed=5)))
    out = tmp_path / "out"
    build_corpus(config(text, heldout_sources=(str(other),)), out, tokenizer)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    shutil.copytree(text.parent, tmp_path / "moved", ignore=lambda *_: {"out", "moved"})
    for named, held in (
        ("../text.txt", "../other.txt"),
        (f"file://{text}", "../oth*.txt"),
        (tmp_path / "moved" / "text.txt", tmp_path / "moved" / "other.txt"),
    ):
        settings = config(named, heldout_sources=(str(held),))
        finished_and_reused(settings, out, tokenizer, monkeypatch)
    # What is held out is part of what it holds, and so is the order.
    assert "heldout_sources is" in failure(config(text, other), out, tokenizer)
    swapped = config(other, heldout_sources=(str(text),))
    assert "text is new, gone or changed: " in failure(swapped, out, tokenizer)
    os.rename(text, text.with_suffix(".csv"))
    assert "text.csv" in failure(
        config("../text.csv", heldout_sources=("../other.txt",)), out, tokenizer
    )


@pytest.mark.parametrize("held", [(), ("../other.txt",)])
def test_a_corpus_of_before_is_recognised(tmp_path, text, tokenizer, monkeypatch, held):
    """Version 0.2.0 named no number of held-out files and no files of the tokenizer."""
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(make_documents(40, seed=5)))
    out = tmp_path / "out"
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    settings = config("../text.txt", heldout_sources=held)
    build_corpus(settings, out, tokenizer)
    request = json.loads((out / "build.json").read_text())
    del request["heldout_found"]
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["tokenizer_files"]
    write_json(out / "build.json", request)
    write_json(out / "manifest.json", manifest)
    finished_and_reused(settings, out, tokenizer, monkeypatch)
    if not held:
        finished_and_reused(config(text), out, tokenizer, monkeypatch)
    # A URL of a file was known by the time of its change.
    status = text.stat()
    request["sources"] = [f"file://{text}"]
    request["sources_found"][0] = {
        "source": f"file://{text}", "size": status.st_size, "tag": str(status.st_mtime)
    }  # fmt: skip
    write_json(out / "build.json", request)
    finished_and_reused(config(f"file://{text}", heldout_sources=held), out, tokenizer, monkeypatch)
    os.utime(text, (1, 1))
    changed = failure(config(f"file://{text}", heldout_sources=held), out, tokenizer)
    assert "new, gone or changed: " in changed


def test_an_unfinished_corpus_of_other_text_is_left_alone(tmp_path, text, tokenizer):
    """The same name may have got another content; another name is another text."""
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text("\n\n".join(make_documents(40, seed=5)))
    build_corpus(config(text), out, tokenizer)
    (out / "manifest.json").unlink()
    before = contents(out)
    assert "other.txt" in failure(config(other), out, tokenizer)
    assert contents(out) == before


def test_the_demo_text_is_what_its_corpus_holds(tmp_path, monkeypatch):
    """Another package that is installed does not change a corpus that is finished."""
    settings = config("docstrings", max_bytes=20_000, vocab_size=300)
    monkeypatch.setattr(docstrings, "iter_docstrings", lambda *_, **__: iter(make_documents(99)))
    out = tmp_path / "out"
    build_corpus(settings, out, "train")
    request = json.loads((out / "build.json").read_text())
    for packages in ([], ["numpy 1.0", "torch 2.0"]):  # as version 0.2.0 wrote them
        request["sources_found"] = [{"source": "docstrings", "packages": packages}]
        write_json(out / "build.json", request)
        finished_and_reused(settings, out, "train", monkeypatch)
    other = config("docstrings:numpy", max_bytes=20_000, vocab_size=300)
    assert "docstrings:numpy" in failure(other, out, "train")


def test_foreign_folders_are_left_alone(tmp_path, text, tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    assert "empty folder or a corpus" in failure(config(text), out, tokenizer)
    assert contents(out) == {"notes.md": b"mine"}
    assert str(text) in failure(config(text), text, tokenizer)


def test_locked_folder(tmp_path, text, tokenizer):
    script = "import fcntl, sys; fcntl.flock(file := open(sys.argv[1] + '/.lock', 'w'), 2)\n"
    script += "print('locked', flush=True); sys.stdin.read()"
    (out := tmp_path / "out").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout.readline() == b"locked\n"
        assert "another run" in failure(config(text), out, tokenizer)
    build_corpus(config(text), out, tokenizer)


def test_full_disk(tmp_path, text, tokenizer):
    """A limit on file sizes stands for the disk: real writes really fail."""
    settings = config(text, heldout_fraction=0.2)
    build_corpus(settings, tmp_path / "whole", tokenizer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = {path: len(data) for path, data in contents(tmp_path / "whole").items()}
    part = sizes["train/part-000000.arrow"]
    out = tmp_path / "out"
    try:
        for limit in (part - 1, sizes["tokenizer/tokenizer.json"] - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            message = failure(settings, out, tokenizer)
            assert "writable" in message
            assert not (out / "manifest.json").exists()
            assert not list(tmp_path.glob("out/**/*.tmp"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    build_corpus(settings, out, tokenizer)
    assert contents(out) == contents(tmp_path / "whole")


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_run_is_finished_to_the_same_bytes(tmp_path, tokenizer, monkeypatch, capsys):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(make_documents(1200)))
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", BUILD, str(path), tokenizer, str(out)]
    running = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(out.glob("train/part-*.json"))) >= 10, running)
    workers = children(running.pid) if Path("/proc").exists() else []
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="incomplete"):
        Corpus.open(out)
    wait_until(lambda: all(gone(pid) for pid in workers))  # they do not outlive it
    finished = {p: p.stat().st_mtime_ns for p in out.glob("*/part-*.json")}
    (out / "train" / ".part-000099.arrow.1.tmp").write_bytes(b"half")  # as a kill may leave it
    made = []
    real = pool.commit_unit

    def counted(settings, unit, tokens):
        made.append(out / unit.split / Path(part_name(unit.index)).with_suffix(".json"))
        return real(settings, unit, tokens)

    monkeypatch.setattr(pool, "commit_unit", counted)
    settings = config(path, chunk_bytes=2048)
    build_corpus(settings, out, tokenizer)
    assert not finished.keys() & set(made)
    assert all(p.stat().st_mtime_ns == t for p, t in finished.items())
    assert f"{len(finished)} finished parts are kept" in capsys.readouterr().err
    build_corpus(settings, tmp_path / "whole", tokenizer)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(made) > 20


def test_parts_of_other_text_are_made_again(tmp_path, tokenizer):
    """A run stopped half-way, its source corrected, then run again."""
    path = tmp_path / "text.txt"
    documents = make_documents(60)
    settings = config(path, chunk_bytes=1024, heldout_fraction=0.0)
    path.write_text("\n\n".join(documents))
    build_corpus(settings, tmp_path / "out", tokenizer)
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "train" / "part-000001.arrow").write_bytes(b"damaged")
    path.write_text("\n\n".join([*documents[:30], "Corrected.", *documents[35:50]]))
    build_corpus(settings, tmp_path / "out", tokenizer)
    build_corpus(settings, tmp_path / "whole", tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_import_neither_torch_nor_transformers():
    rooms = "distilcache.stages.corpus.worker, distilcache.stages.corpus.text.docstrings"
    script = f"import sys, {rooms}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not {"torch", "transformers", "datasets"}.intersection(done.stdout.split())


def test_dead_worker_is_one_line(tmp_path, text, tokenizer, monkeypatch):
    monkeypatch.setattr(pool, "start_process", os._exit)  # an initializer that ends the process
    settings = config(text, chunk_bytes=1024, workers=2)
    for advice in ("must stay alive", "--set corpus.workers=1 needs the least memory"):
        assert advice in failure(settings, tmp_path / "out", tokenizer)
    build_corpus(replace(settings, workers=1), tmp_path / "out", tokenizer)
    monkeypatch.undo()
    build_corpus(settings, tmp_path / "whole", tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
