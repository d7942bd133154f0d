"""Commands that write beside a user's own files: what a kill -9 leaves goes with the next start."""

import importlib
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from distilcache.data.storage.locks import sole_writer
from distilcache.pipeline.cli import main
from tests.command_line import SRC, refusal, run
from tests.forked import Forked

CONVERT = ("convert", "pickled", "out"), "convert", "_write"
SENTENCES = ("export", "model", "--sentence-transformers", "out"), "export_sentences", "_write"
ONNX = ("export", "model", "--onnx", "out"), "export_onnx", "_compare"


@pytest.fixture
def folder(small_teacher, tmp_path):
    """A model, and the same with pickled weights."""
    shutil.copytree(small_teacher, tmp_path / "model")
    pickled = shutil.copytree(small_teacher, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    return tmp_path


def killed_at(module, name, arguments):
    """The command; it ends by SIGKILL where it calls a function."""
    end = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    setattr(importlib.import_module(f"distilcache.pipeline.{module}"), name, end)
    main([*arguments])


@pytest.mark.parametrize("case", [CONVERT, SENTENCES, ONNX], ids=lambda case: case[1])
def test_what_a_kill_leaves_goes_with_the_next_start(case, folder, monkeypatch):
    arguments, module, name = case
    if case is ONNX:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="the extra 'onnx' is not installed")
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    process = Forked(killed_at, module, name, arguments, env=env, cwd=folder)
    assert process.wait(120) == -signal.SIGKILL, process.communicate()
    assert [*folder.glob(".out.*.tmp")]
    monkeypatch.chdir(folder)
    with sole_writer(folder / "out", "test"):  # another run is alive
        (folder / ".out.1.0123abcd.tmp").write_bytes(b"its half")
        assert "another run is writing; wait for it" in refusal(run(*arguments))
        assert (folder / ".out.1.0123abcd.tmp").exists()
        assert not (folder / "out").exists()
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out", "pickled"]
