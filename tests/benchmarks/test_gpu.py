"""The GPU kit: parts end, fail and run out of time; what they found is kept."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import gpu
from benchmarks.gpu import Part, parts, run_all
from benchmarks.gpu_report import BEGIN, END, PAGE, lines_of, section, update_page
from distilcache.data.errors import UserError
from tests.command_line import ROOT, environment

SCRIPT = """
import json, sys, time
json.dump({{"found": 1.5}}, open({path!r}, "w"))
{then}
"""


def a_part(tmp_path, monkeypatch, name, then, fraction=1.0):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = SCRIPT.format(path=str(tmp_path / "out" / f"{name}.json"), then=then)
    (tmp_path / f"module_{name}.py").write_text(script)
    return Part(name, fraction, (f"module_{name}",))


def test_what_a_part_found_is_kept_however_it_ends(tmp_path, monkeypatch, capsys):
    chosen = [
        a_part(tmp_path, monkeypatch, "good", "print('== 3 passed ==')"),
        a_part(tmp_path, monkeypatch, "bad", "sys.exit(1)"),
        a_part(tmp_path, monkeypatch, "late", "time.sleep(60)", fraction=0.05),
    ]
    results = run_all(chosen, tmp_path / "out", minutes=1, device="cpu")
    states = {name: found["state"] for name, found in results["parts"].items()}
    assert states == {"good": "done", "bad": "failed", "late": "out of time"}
    assert all(found["figures"] == {"found": 1.5} for found in results["parts"].values())
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == results
    assert "late: out of time" in capsys.readouterr().out


def test_no_part_begins_after_the_time(tmp_path, monkeypatch, capsys):
    chosen = [a_part(tmp_path, monkeypatch, "good", "")]
    assert run_all(chosen, tmp_path / "out", minutes=0, device="cpu")["parts"] == {}
    assert "good: no time left" in capsys.readouterr().out


def test_the_last_part_has_time_where_all_others_take_what_they_may(tmp_path, monkeypatch):
    now, taken = [1000.0], {}

    def run_part(part, out, seconds):
        taken[part.name] = seconds
        now[0] += seconds
        return {"seconds": seconds, "state": "out of time", "figures": {}}

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu, "run_part", run_part)
    chosen = list(parts(tmp_path, tmp_path, "cuda", tiny=False))
    run_all(chosen, tmp_path / "out", minutes=8, device="cpu")
    assert taken["real"] == pytest.approx(96)
    assert sum(taken.values()) == pytest.approx(480)
    assert all(taken[p.name] <= 480 * p.fraction for p in chosen if p.name in taken)


def test_the_closing_line_stands_for_a_part_without_figures(tmp_path, monkeypatch):
    part = a_part(
        tmp_path, monkeypatch, "tests", "import os; os.remove(%r); print('== 3 passed ==')"
    )
    path = tmp_path / "module_tests.py"
    path.write_text(path.read_text().replace("%r", repr(str(tmp_path / "out" / "tests.json"))))
    found = run_all([part], tmp_path / "out", minutes=1, device="cpu")["parts"]["tests"]
    assert lines_of("tests", found)[1] == "  ends in: 3 passed"


def test_each_size_and_length_is_a_part(tmp_path):
    names = [part.name for part in parts(tmp_path, tmp_path, "cuda", tiny=False)]
    assert names[:3] == ["card", "tests", "right"]
    assert {"stage_one_128", "stage_one_512", "stage_two_6x768", "stage_two_2x128"} <= set(names)
    assert names[-1] == "real"


def test_the_section_of_the_page(tmp_path):
    machine = {"cpu": "c", "cores": 2, "threads": 1, "device": "GPU X", "torch": "2", "python": "3",
               "date": "2026-11-28"}  # fmt: skip
    found = {"seconds": 3.0, "state": "done", "figures": {"matmul_flops_per_s": 7.9e14}}
    results = {"environment": machine, "parts": {"card": found}}
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    for _ in range(2):  # Written again it is the same.
        update_page(results, page)
        inside = page.read_text().partition(BEGIN)[2].partition(END)[0]
        assert inside.strip() == section(results).strip()
        assert "GPU X" in inside
        assert "| card | done, 3 s | matmul_flops_per_s: 7.9e+14 |" in inside
    page.write_text("no marks")
    with pytest.raises(UserError, match="must have <!-- On a GPU: begin -->"):
        update_page(results, page)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_rehearsal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    right = results["right"]["figures"]
    assert right["two_runs_same_bytes"]
    assert right["resume_same_bits"]
    assert right["loss_largest_relative_difference"] == 0
    assert right["signals_float32"]["kl_at_2"] == 0
    assert results["real"]["figures"]["tasks"]["models"][1]["role"] == "student"
