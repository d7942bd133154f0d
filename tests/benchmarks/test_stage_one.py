"""A run of seconds with a tiny teacher: all arms, all figures."""

import pytest
import torch

from benchmarks import stage_one
from benchmarks.stage_one import ARMS, bare, main, make_work, measure
from benchmarks.teachers import random_teacher
from distilcache.data.errors import UserError
from distilcache.stages.models.wordpiece import train_wordpiece
from distilcache.stages.teacher_cache.teacher import Teacher


def test_a_small_run(run_bench, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_one, "text_corpus", lambda *_: small_corpus())
    figures, printed = run_bench(main, repetitions=2, device="cpu")
    assert "ours / bare" in printed
    assert set(figures["tokens_per_s"]) == set(figures["utilisation"]) == set(ARMS)
    assert all(len(rates) == 2 for rates in figures["tokens_per_s"].values())
    assert figures["device_idle_share"] is None
    assert not (tmp_path / "work" / "cache").exists()


@pytest.fixture
def work(tmp_path, small_corpus, small_teacher):
    return make_work(tmp_path / "cache", small_corpus(), small_teacher, "cpu", "float32")


def test_every_arm_warms_up(work, monkeypatch):
    runs = []
    arms = {name: lambda _, name=name: runs.append(name) for name in ARMS}
    monkeypatch.setattr(stage_one, "ARMS", arms)
    seconds = measure(work, repetitions=2)
    assert runs == 3 * list(ARMS)
    assert all(len(values) == 2 for values in seconds.values())


def test_the_limit_is_the_bare_model(work, monkeypatch):
    """It gives the head the same rows as the trimmed one, by none of the stage's own encoder."""
    decoded = []
    decode = Teacher.decode

    def keep(teacher, rows_ND):
        decoded.append(rows_ND)
        return decode(teacher, rows_ND)

    monkeypatch.setattr(Teacher, "decode", keep)
    bare(work, trim=True)
    expected = torch.cat(decoded)
    decoded.clear()
    monkeypatch.setattr(Teacher, "encode", None)
    bare(work)
    torch.testing.assert_close(torch.cat(decoded), expected)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path, small_corpus):
    train_wordpiece(["quite other words than those"] * 9, 60).save_pretrained(tmp_path / "words")
    other = random_teacher(tmp_path, "1x32", tmp_path / "words")
    with pytest.raises(UserError, match="teacher: tokenizer must be"):
        make_work(tmp_path / "cache", small_corpus(), other, "cpu", "float32")
