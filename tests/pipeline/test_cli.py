"""The command line: the whole flow on a tiny recipe, and one clear line for bad input."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from distilcache.pipeline.cli import main
from tests.command_line import refusal, run
from tests.damage import flip, flip_at, sealed


@pytest.fixture
def options(project):
    return ["--recipe", project / "tiny.toml", "--set", f"root={project}/runs"]


@pytest.fixture
def cache(project, tmp_path):
    """A copy of the cache, to be damaged."""
    return Path(shutil.copytree(project / "runs/tiny/cache", tmp_path / "runs/tiny/cache"))


def test_the_whole_flow_makes_the_report(project):
    home = project / "runs/tiny"
    report = json.loads((home / "report/report.json").read_text())
    printed = json.loads((project / "distill.json").read_text())
    assert report["models"] == printed["models"]
    names = {m["name"]: m["role"] for m in report["models"]}
    assert names == {
        "teacher": "teacher",
        "1x32": "student",
        "1x32-control": "control",
        "1x16": "student",
        "1x16-control": "control",
    }
    for model in report["models"]:
        assert model["mlm_nll"] > 0 < model["latency_ms"]
        assert (model["teacher_kl"] == 0) == (model["role"] == "teacher")
    assert (home / "report/quality_latency.png").read_bytes().startswith(b"\x89PNG")
    for folder in ("corpus", "cache", "students/1x32", "students/1x16-control", "teacher/model"):
        assert (home / folder).is_dir()


def test_running_again_reuses_everything(project, options):
    home = project / "runs/tiny"
    # Models are measured anew: the report and the students' cards tell their present speed.
    kept = [p for p in home.rglob("*") if p.is_file() and "report" not in p.parts]
    kept = [p for p in kept if p.name != "README.md"]
    before = {p: p.stat().st_mtime_ns for p in kept}
    result = run("distill", *options)
    assert result.exit_code == 0, result.output
    assert "1x32-control" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_student_of_another_cache_is_not_compared_in_silence(project, cache, tmp_path):
    home = tmp_path / "runs/tiny"
    shutil.copytree(project / "runs/tiny/corpus", home / "corpus")
    for name in ("1x32", "1x16"):
        shutil.copytree(project / "runs/tiny/students" / name, home / "students" / name)
    record = home / "students/1x16/training.json"
    training = json.loads(record.read_text())
    training["settings"]["cache"] = "0" * 64
    record.write_text(json.dumps(sealed(training)))
    result = run("evaluate", "--recipe", project / "tiny.toml", "--set", f"root={tmp_path}/runs")
    assert result.exit_code == 0, result.output
    assert f"{home}/students/1x16 was trained from another cache than" in result.stderr
    assert f"{home}/students/1x32 was" not in result.stderr


def test_verify_names_the_damaged_shard(project, cache):
    assert run("verify", cache).exit_code == 0
    tar = cache / "shards/r00/shard-000001.tar"
    flip_at(tar, 1 / 3)
    result = run("verify", cache)
    assert "1 fault" in refusal(result)
    assert "shard-000001" in result.stdout


def test_a_flipped_bit_stops_training_by_name(project, cache, tmp_path):
    index = json.loads((cache / "shards/r00/shard-000000.json").read_text())["blocks"][0]
    tar = cache / "shards/r00/shard-000000.tar"
    flip(tar, 8 * (index["offset"] + index["size"] // 2))
    options = ["--recipe", project / "tiny.toml", "--set", f"root={tmp_path}/runs"]
    line = refusal(run("student-train", *options, "--size", "1x32"))
    assert "shard-000000" in line
    assert "block 0" in line


def test_an_incomplete_cache_is_refused(project, cache, tmp_path):
    options = ["--recipe", project / "tiny.toml", "--set", f"root={tmp_path}/runs"]
    (cache / "manifest.json").unlink()
    assert "teacher-cache" in refusal(run("student-train", *options))
    assert not (tmp_path / "runs/tiny/students").exists()
    shutil.rmtree(cache)
    assert "teacher-cache" in refusal(run("student-train", *options))
    assert "folder of a teacher cache" in refusal(run("verify", cache))


def test_another_provenance_lists_the_fields(options):
    line = refusal(run("teacher-cache", *options, "--set", "masking.seed=7"))
    assert "masking.seed" in line


def test_a_temperature_that_is_not_stored(options):
    more = ["--set", "train.signal=sparse", "--set", "train.temperature=3"]
    line = refusal(run("student-train", *options, *more))
    assert "temperature" in line
    assert "3" in line


def test_a_size_on_the_command_line_is_the_recipes(options):
    plan = run("plan", *options, "--size", "1x32", "--size", "2x16", "--tokens", 1e6, "--json")
    assert [s["size"] for s in json.loads(plan.stdout)["students"]] == ["1x32", "2x16"]
    assert "huge" in refusal(run("distill", *options, "--size", "huge"))


@pytest.mark.parametrize("size", ["3x100", "huge", "0x64"])
def test_a_size_that_does_not_work(options, size):
    assert size in refusal(run("student-train", *options, "--size", size))


def test_an_unknown_key_suggests_the_nearest(options):
    assert "'train'" in refusal(run("corpus", *options, "--set", "trian.lr=1"))


def test_a_text_of_digits_is_to_be_quoted_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.toml"
    for value in ("2024", "2026-12-01", "12e3"):
        recipe.write_text(f"name = {value}\n")
        line = refusal(run("corpus", "--recipe", recipe))
        assert line.endswith("; write it in double quotes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device(options):
    line = refusal(run("teacher-cache", *options, "--set", "device=cuda"))
    assert "device=cpu" in line


def test_a_hub_id_that_cannot_be_reached(project, options, tmp_path):
    more = ["--set", f"root={tmp_path}", "--set", "teacher.model=nobody/no-such-model"]
    line = refusal(run("teacher-cache", *options, *more, "--set", "corpus.tokenizer="))
    assert "nobody/no-such-model" in line
    assert "path" in line
    more += ["--set", f"corpus.tokenizer={project}/runs/tiny/corpus/tokenizer"]
    line = refusal(run("teacher-cache", *options, *more))
    assert "nobody/no-such-model" in line
    assert "teacher.model=PATH" in line


@pytest.mark.parametrize("content", [b"", b"\n\n", b"abc\0def", b"\xff\xfe\x00"])
def test_text_that_is_none(options, tmp_path, content):
    (tmp_path / "bad.txt").write_bytes(content)
    more = ["--set", f"root={tmp_path}/runs", "--set", f"corpus.sources={tmp_path}/bad.txt"]
    assert "bad.txt" in refusal(run("corpus", *options, *more))
    assert not list((tmp_path / "runs").rglob("*part*"))


def test_a_checkpoint_without_its_head(project, options, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(project / "runs/tiny/corpus/tokenizer")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    more = ["--set", f"teacher.model={tmp_path}/bare", "--set", f"root={tmp_path}/runs"]
    line = refusal(run("teacher-cache", *options, *more, "--set", "corpus.tokenizer="))
    assert "must hold a trained masked-LM head" in line
    assert not (tmp_path / "runs/tiny/cache").exists()


def test_a_recipe_says_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    recipe = Path(__file__).parents[2] / "recipes/wiki.toml"
    line = refusal(run("teacher-cache", "--recipe", recipe))
    assert "this recipe needs ../shared" in line
    assert not (tmp_path / "empty/runs").exists()


def test_every_command_explains_itself():
    listed = run("--help").stdout
    for command in ("distill", "corpus", "teacher-cache", "student-train", "evaluate", "verify"):
        assert command in listed
        assert len(run(command, "--help").stdout) > 200


def test_ctrl_c_says_how_to_go_on(options, monkeypatch):
    def interrupted(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr("distilcache.pipeline.flow.make_corpus", interrupted)
    result = run("corpus", *options)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr


def test_ctrl_c_before_a_command_has_begun(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "make_context", interrupted)
    result = run("corpus")
    assert result.exit_code == 130
    said = "distilcache: interrupted; the same command goes on from here"
    assert result.stderr.strip() == said


OF_STORAGE = "ENOSPC", "EACCES", "ENOTDIR", "ENOTCONN", "ESHUTDOWN", "EUCLEAN", "EBADMSG"
OF_SHARES = "EREMOTEIO", "ETIMEDOUT", "EHOSTDOWN", "ENODEV", "ENXIO", "EBUSY", "EXDEV"


@pytest.mark.parametrize("name", [n for n in OF_STORAGE + OF_SHARES if hasattr(errno, n)])
def test_a_fault_of_storage_is_one_line(name, options, monkeypatch):
    def fail(*_):
        raise OSError(getattr(errno, name), "it fails", "some/file")

    monkeypatch.setattr("distilcache.pipeline.flow.make_corpus", fail)
    line = refusal(run("corpus", *options))
    assert line.startswith("distilcache: storage: some/file must be usable, got: it fails; repeat")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "none", "some/file"), OSError("odd")])
def test_an_error_of_our_own_keeps_its_traceback(error, options, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("distilcache.pipeline.flow.make_corpus", fail)
    assert run("corpus", *options).exception is error
