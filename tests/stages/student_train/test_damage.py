"""Damaged checkpoints and finished students: seen before use, and made good."""
# ruff: noqa: F811

import json
import random
import shutil

import pytest
import torch

from distilcache.stages.student_train.checkpoint_folders import (
    complete_checkpoints,
    fault_of,
    newest_sound,
    step_of,
)
from distilcache.stages.student_train.generators import rng_state
from distilcache.stages.student_train.training_state import write_checkpoint
from tests.damage import flip, flip_at
from tests.refusals import refused
from tests.stages.student_train.trainer_support import (
    cache,  # noqa: F401
    run,
    same,
    uninterrupted,  # noqa: F401
)


def checkpoint(folder, step):
    """A small checkpoint with every kind of file."""
    path = folder / f"checkpoint-{step}"
    moments = {"exp_avg": torch.ones(4, 4), "step": torch.tensor(3.0)}
    write_checkpoint(
        path,
        model={"a": torch.ones(4, 4)},
        config=b'{"model_type": "bert"}',
        projection={"weight": torch.ones(4, 2)},
        optimizer={"state": {0: moments}, "param_groups": [{"params": [0], "lr": 1e-3}]},
        scheduler={"last_epoch": step},
        state={"global_step": step, "log_history": [{"loss": 1.5, "step": step}]},
        totals={"tokens": 5, "seconds": 1.0},
        since_log={},
        rng=[rng_state()],
    )
    return path


def of_before(path):
    """The checkpoint as earlier versions wrote it."""
    marker = path / "complete.json"
    marker.write_text(json.dumps({"step": json.loads(marker.read_text())["step"]}))


def test_every_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    path = checkpoint(tmp_path, 5)
    files = sorted(path.iterdir())
    assert len(files) == 8
    assert fault_of(path) is None
    draw = random.Random(0)
    for index in range(1000):
        file = files[index % len(files)]
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        assert fault_of(path) is not None, (file.name, bit)
        flip(file, bit)
    assert fault_of(path) is None


def test_every_missing_file_of_a_checkpoint_is_seen(tmp_path):
    path = checkpoint(tmp_path, 5)
    for file in path.iterdir():
        if file.name != "complete.json":
            content = file.read_bytes()
            file.unlink()
            assert file.name in fault_of(path)
            file.write_bytes(content)
    assert fault_of(path) is None


@pytest.mark.parametrize("name", ["trainer.json", "trainer_state.json", "rng-0.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"best_metric": nul'])
def test_foreign_files_in_a_checkpoint_without_hashes_are_seen(tmp_path, name, content):
    path = checkpoint(tmp_path, 5)
    of_before(path)
    assert fault_of(path) is None
    (path / name).write_bytes(content)
    assert name in fault_of(path)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, capsys):
    first, second = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    flip_at(second / "optimizer.safetensors")
    assert newest_sound(tmp_path) == first
    assert complete_checkpoints(tmp_path) == [first]
    line = capsys.readouterr().err
    assert "optimizer.safetensors must have the content" in line
    assert line.count("\n") == 1
    assert (tmp_path / "_damaged-checkpoint-10" / "optimizer.safetensors").is_file()


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "checkpoint"])
def test_a_damaged_student_is_exported_again(cache, uninterrupted, tmp_path, capsys, damage):
    expected, figures = uninterrupted
    out = tmp_path / "2x32"
    shutil.copytree(expected, out)
    if damage == "checkpoint":  # As well: the last steps are trained again.
        last = complete_checkpoints(out / "checkpoints")[-1]
        assert step_of(last) == 30
        (last / "rng-0.safetensors").unlink()
        (out / "model.safetensors").unlink()
    elif damage == "config.json":
        (out / damage).unlink()
    else:
        flip_at(out / damage)
    again = run(cache, out)
    assert same(out, expected)
    assert again["tokens"] == figures["tokens"]
    assert again["loss"] == figures["loss"]
    assert (out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    said = capsys.readouterr().err
    assert "exported again from its checkpoint" in said
    assert "reused" not in said
    run(cache, out)
    assert "reused" in capsys.readouterr().err


def test_a_damaged_student_without_checkpoints_is_refused(cache, uninterrupted, tmp_path):
    out = tmp_path / "2x32"
    shutil.copytree(uninterrupted[0], out)
    shutil.rmtree(out / "checkpoints")
    (out / "model.safetensors").unlink()
    line = refused(lambda: run(cache, out))
    assert "move the folder away to train anew" in line
