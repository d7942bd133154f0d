"""Several students from one cache: skipped where finished, and failures that stay alone."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distilcache.data.errors import InUse, UserError
from distilcache.data.storage.locks import locked
from distilcache.pipeline.flow import student_name, train_one
from distilcache.pipeline.recipe import load_recipe, override_recipe
from distilcache.pipeline.sweep.run import _train_all, format_results
from distilcache.pipeline.sweep.runs import Run, runs_of
from distilcache.stages.student_train.checkpoint_folders import complete_checkpoints, step_of
from distilcache.stages.workers.pool import answer
from tests.command_line import (
    refusal,
    run,
    wait_until,
    watch_training,
    watched,
    work,
    write_student_recipe,
)
from tests.forked import fork


@pytest.fixture
def recipe(tmp_path, small_cache) -> Path:
    student = {"sizes": ["1x32", "1x16"], "control": True}
    train = {"batch_size": 8, "steps": 3, "logging_steps": 1}
    return write_student_recipe(tmp_path, small_cache(), student=student, train=train)


def sweep(recipe, *options):
    return run("student-sweep", "--recipe", recipe, *options)


def test_sizes_and_seeds_from_one_cache(recipe, tmp_path):
    students = tmp_path / "runs/tiny/students"
    (students / "1x16-seed3").mkdir(parents=True)
    (students / "1x16-seed3" / "thesis.txt").write_text("x")
    options = ["--seed", "0", "--seed", "3"]
    done = sweep(recipe, *options, "--workers", "2", "--json")
    assert done.exit_code == 2, done.output
    results = json.loads(done.stdout)
    names = ["1x32", "1x32-control", "1x32-seed3", "1x32-seed3-control"]
    names += [name.replace("32", "16") for name in names]
    assert [r["name"] for r in results] == names
    failed = [r for r in results if "error" in r]
    assert [r["name"] for r in failed] == ["1x16-seed3"]
    assert "output must be a new folder" in failed[0]["error"]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("distilcache: student-sweep: all 8 students must be trained, got 1 that")
    assert last.endswith("put that right and run the same command, which trains the rest")
    assert all((students / name / "model.safetensors").is_file() for name in names if name not in
               [r["name"] for r in failed])  # fmt: skip
    weights = [load_file(students / name / "model.safetensors") for name in names[:4:2]]
    assert any(not (weights[0][n] == weights[1][n]).all() for n in weights[0])

    # The student of the recipe's seed is the one of student-train; the same command does the rest.
    loaded = load_recipe(recipe)
    figures = train_one(loaded, "1x32")
    assert figures == {k: v for k, v in results[0].items() if k not in ("size", "seed")}
    times = {p: p.stat().st_mtime_ns for p in students.glob("*/model.safetensors")}
    (students / "1x16-seed3" / "thesis.txt").unlink()
    again = sweep(recipe, *options)
    assert again.exit_code == 0, again.output
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    table = again.stdout.splitlines()
    assert table[0].split()[:4] == ["student", "seed", "params", "steps"]
    assert [line.split()[0] for line in table[2:]] == names


def test_the_table_has_the_losses_that_there_are():
    common = {"seed": 0, "parameters": 9000, "steps": 3, "tokens_per_s": 10, "seconds": 2}
    results = [
        {"name": "1x32", "loss": 3.5, "mse": 0.5, "rel": 3.25, **common},
        {"name": "1x32-control", "loss": 4.0, "mlm": 4.0, **common},
    ]
    lines = [line.split() for line in format_results(results).splitlines()]
    assert lines[0][4:-2] == ["loss", "L_mlm", "L_mse", "L_rel"]
    assert [line[4:8] for line in lines[2:]] == [
        ["3.5000", "-", "0.5000", "3.2500"], ["4.0000", "4.0000", "-", "-"],
    ]  # fmt: skip


def test_settings_are_varied_and_compared(recipe, tmp_path, small_corpus):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/corpus").symlink_to(small_corpus())
    options = [
        "--size",
        "1x16",
        "--seed",
        "0",
        "--seed",
        "3",
        "--set",
        "evaluate.latency_repeats=2",
    ]
    options += ["--vary", "train.alpha_cos=0,1", "--vary", "train.signal=replay+topk,sparse"]
    done = sweep(recipe, *options, "--evaluate", "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    # The recipe's own alpha_cos = 1 and signal = replay+topk go without saying.
    settings = ["-alpha_cos=0", "-alpha_cos=0-signal=sparse", "", "-signal=sparse"]
    assert sorted(r["name"] for r in results) == sorted(
        [f"1x16{s}{seed}" for s in settings for seed in ("", "-seed3")]
        + ["1x16-control", "1x16-seed3-control"]
    )
    trained = json.loads((tmp_path / "runs/tiny/students/1x16-signal=sparse/training.json")
                         .read_text())["settings"]["train"]  # fmt: skip
    assert (trained["signal"], trained["alpha_cos"]) == ("sparse", 1.0)
    assert [r.get("settings") for r in results if r["name"] == "1x16-alpha_cos=0"] == [
        ["train.alpha_cos=0"]
    ]
    values = json.loads((tmp_path / "runs/tiny/report/sweep.json").read_text())
    rows = {row["name"]: row for row in values["rows"]}
    assert set(rows) == {"teacher", "1x16-control", *(f"1x16{s}" for s in settings)}
    assert all(row["seeds"] == 2 for name, row in rows.items() if name != "teacher")
    pair = [r for r in json.loads((tmp_path / "runs/tiny/report/report.json").read_text())["models"]
            if r["name"] in ("1x16", "1x16-seed3")]  # fmt: skip
    mean = sum(r["mlm_nll"] for r in pair) / 2
    assert rows["1x16"]["mlm_nll"]["mean"] == pytest.approx(mean)
    assert (tmp_path / "runs/tiny/report/pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (
        "| 1x16-signal=sparse | student | 2 |"
        in (tmp_path / "runs/tiny/report/sweep.md").read_text()
    )
    for student in (tmp_path / "runs/tiny/students").iterdir():
        if student.name != "1x16":
            shutil.rmtree(student)
    done = sweep(recipe, "--size", "1x16", "--set", "student.control=false", "--evaluate")
    report = Path(done.stdout.rpartition("report: ")[2].strip())
    assert "| 1x16 | student |" in report.read_text()
    assert not list(report.parent.glob("sweep.*")), "of students that are gone"


def test_every_student_has_its_control(recipe):
    """One of the same steps and rate, whatever of the teacher's losses is varied besides."""
    vary = ["train.lr=1e-3,2e-3", "train.alpha_cos=0,1", "train.signal=replay,replay+topk"]
    runs = list(runs_of(load_recipe(recipe), ["1x16"], [0], vary))
    assert len([run for run in runs if not run.control]) == 8
    assert [run.settings for run in runs if run.control] == [
        ("train.lr=1e-3",),
        ("train.lr=2e-3",),
    ]


def test_each_student_is_trained_once(recipe):
    """However its values are written; settings are checked together."""
    loaded = load_recipe(recipe)
    vary = ["train.lr=1e-3,0.001", "student.dropout=0.1,0.10"]
    runs = [run for run in runs_of(loaded, ["tiny", "Tiny"], [0, 0], vary) if not run.control]
    assert [run.settings for run in runs] == [("train.lr=1e-3", "student.dropout=0.1")]
    base = override_recipe(loaded, ["train.signal=replay", "train.alpha_mse=1"])
    (run, _) = runs_of(base, ["1x16"], [0], ["train.signal=sparse", "train.alpha_mse=0"])
    assert run.settings == ("train.signal=sparse", "train.alpha_mse=0")
    with pytest.raises(UserError, match="a name of its own, got 'init=a_b' twice"):
        list(runs_of(loaded, ["1x16"], [0], ["student.init=a/b,a_b"]))


def test_fields_of_fields_and_lists_are_varied(recipe):
    loaded = override_recipe(load_recipe(recipe), ["train.lr_schedule=cosine_with_min_lr"])
    for vary in (["train.lr_schedule_kwargs.min_lr_rate=0.1,0.2"],
                 ["student.init_layers=[0],[1]"]):  # fmt: skip
        runs = [run for run in runs_of(loaded, ["1x16"], [0], vary) if not run.control]
        assert [run.settings for run in runs] == [(f"{vary[0].split('=')[0]}={value}",)
                for value in vary[0].split("=")[1].split(",")]  # fmt: skip
    vary = ["student.init_layers=[0, 1],[1, 2]"]
    runs = [run for run in runs_of(loaded, ["2x16"], [0], vary) if not run.control]
    assert len(runs) == 2


def test_the_number_of_ids_is_part_of_a_name(recipe):
    """The sweep and the worker that trains call a student the same."""
    loaded = load_recipe(recipe)
    of_recipe = override_recipe(loaded, ["student.vocabulary=0.9"])
    names = []
    for base in (loaded, of_recipe):
        for one in runs_of(base, ["1x16"], [0], ["student.vocabulary=40,0.9", "train.lr=1e-3"]):
            varied = override_recipe(base, one.settings)
            name, same = (
                student_name(r, one.size, 3, control=one.control, label=one.label)
                for r in (base, varied)
            )
            assert name == same
            names += [] if one.control else [name]
    found = [f"1x16-vocabulary={n}-lr=1e-3-seed3" for n in ("40", "0.9")]
    assert names == [*found, *found]


def test_bad_input_trains_nothing(recipe, tmp_path):
    for options, word in (
        (["--size", "12"], "LAYERSxWIDTH"),
        (["--seed", "-1"], "seed"),
        (["--ray-address", "auto"], "--ray-address must come with --engine ray"),
        (["--set", "train.temperature=7.0"], "temperature"),
        (["--set", f"cache_from={tmp_path}/none"], "teacher-cache"),
        (["--vary", "train.alpha_cos"], "--vary must read"),
        (["--vary", "train.seed=1,2"], "--vary must read"),
        (["--vary", "cache.top_k=1,2"], "--vary must read"),
        (["--vary", "student.control=true,false"], "--vary must read"),
        (["--vary", "train.alpha_cos=,1"], "--vary must name values"),
        (
            ["--vary", "train.lr=1e-3", "--vary", " train.lr=2e-3"],
            "name each field once, got train.lr",
        ),
        (["--vary", "train.alpha_sin=1"], "did you mean 'alpha_"),
        (["--vary", "train.signal=replay,loud"], "signal must be one of"),
        (["--vary", "train.temperature=2,7"], "temperature"),
    ):
        assert word in refusal(sweep(recipe, *options))
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def observed(tmp_path, small_cache):
    """A recipe of two students, and a log of every step that is begun."""
    watch_training(tmp_path)
    train = {"batch_size": 8, "steps": 12, "save_steps": 5, "logging_steps": 4}
    return write_student_recipe(
        tmp_path, small_cache(), student={"sizes": ["1x32", "1x16"]}, train=train
    )


def sweep_apart(recipe, seconds):
    """A sweep in a process of its own, each of whose steps takes so long."""
    return fork(recipe, "student-sweep", "--json", env=watched(recipe, seconds))


def test_two_sweeps_of_the_same_students_share_them(observed):
    students = observed.parent / "runs/tiny/students"
    (students / "1x32").mkdir(parents=True)
    with locked(students / "1x32", "train"):
        sweeps = [sweep_apart(observed, 0.02) for _ in range(2)]
        wait_until((students / "1x16/model.safetensors").exists, sweeps[0])
        assert [step for *_, step in work(observed)] == list(range(12))
    said = [process.communicate(timeout=100) for process in sweeps]
    assert [process.returncode for process in sweeps] == [0, 0], said
    assert [[r["name"] for r in json.loads(out)] for out, _ in said] == [["1x32", "1x16"]] * 2
    # Each student was trained once.
    assert sorted(step for *_, step in work(observed)) == sorted([*range(12), *range(12)])
    line = "student-sweep: 1x32: another process trains it; waits for it"
    waits = [err.splitlines().count(line) for _, err in said]
    assert max(waits) == 1  # The other one may have come late.
    assert not list(observed.parent.rglob(".lock"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_goes_on_from_the_step_it_was_at(observed, number):
    process = sweep_apart(observed, 0.3)
    wait_until(lambda: len(work(observed)) > 5, process)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    (folder,) = (observed.parent / "runs/tiny/students").iterdir()
    step = step_of(complete_checkpoints(folder / "checkpoints")[-1])
    assert step == len(work(observed)) > 5
    told = "stopped by SIGTERM at step {} of 12, checkpoint saved; the same command goes on from"
    assert f"student-sweep: {folder.name}: train: {told.format(step)} there" in err
    assert err.splitlines()[-1] == ("distilcache: interrupted; the same command goes on from here")
    assert "Traceback" not in err
    again = sweep_apart(observed, 0.0)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert f"goes on from step {step} of 12" in err
    assert [step for *_, step in work(observed)] == [*range(12), *range(12)]


class InTurn:
    """A pool of one worker that answers at once."""

    def __init__(self):
        self.replies = []

    def room(self):
        return 1

    def start(self, function, *args):
        self.replies.append((object(), answer(function, *args)))
        return self.replies[-1][0]

    def wait(self, seconds):
        given, self.replies = self.replies, []
        return given

    def close(self, kill):
        assert not kill


def test_a_student_that_another_sweep_began_a_moment_before_is_tried_again(recipe, monkeypatch):
    trained = []

    def train(_, size, **__):
        trained.append(size)
        if trained == ["1x32"]:
            raise InUse("train: output must not be in use")
        return {"loss": len(trained)}

    monkeypatch.setattr("distilcache.pipeline.flow.train_one", train)
    runs = [Run("1x32", 0), Run("1x16", 0)]
    results = _train_all(load_recipe(recipe), runs, InTurn())
    assert trained == ["1x32", "1x16", "1x32"]
    assert [(r["size"], r["loss"]) for r in results] == [("1x32", 3), ("1x16", 2)]
