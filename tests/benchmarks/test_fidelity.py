"""The fidelity benchmark from the command line, and the text that its codecs are fitted to."""

import json
import random

from click.testing import CliRunner

from benchmarks import fidelity
from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from tests.builders import WORDS, save_random_bert


def codec_of(cache):
    return Cache.open(cache).encoding.hidden[0].codec_sha256


def test_codecs_are_fitted_elsewhere(tmp_path, small_corpus, small_teacher, build_cache_in):
    here, there = small_corpus(), small_corpus(seed=1)
    own, known = (
        codec_of(build_cache_in(tmp_path / corpus.parent.name, corpus, small_teacher))
        for corpus in (here, there)
    )
    with fidelity.calibrating_on(Corpus.open(there)):
        made = codec_of(build_cache_in(tmp_path / "made", here, small_teacher))
    assert made == known != own


def test_a_small_run(tmp_path, small_tokenizer, monkeypatch):
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=60)) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    monkeypatch.setattr(fidelity, "CALIBRATION", 16)
    teacher = save_random_bert(
        tmp_path / "teacher", small_tokenizer, layers=2, ffn=64, positions=128, bias=1.0
    )
    command = ["--teacher", teacher]
    command += ["--text", tmp_path / "text.txt", "--out", tmp_path / "work", "--size", "1x32"]
    command += ["--sequences", 32, "--steps", 1, "--only", "coded 5e-4"]
    command += ["--json", tmp_path / "figures.json", "--plot", tmp_path / "plot.png"]
    done = CliRunner().invoke(fidelity.main, [str(w) for w in command], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {(a["student"], a["signal"]) for a in found["angles"]} == {
        (student, signal)
        for student in ("fresh", "1 steps")
        for signal in ("replay", "replay+topk")
    }
    assert all(0 < a["degrees"] < 90 for a in found["angles"])
    assert all(p["bytes_per_position"] > 0 for p in found["prices"])
    assert found["environment"]["device"] == "cpu"
    assert "Machine: " in done.output
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "work" / "caches").exists()
