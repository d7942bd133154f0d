"""Rows of a sweep by hand, and the front against its definition."""

import itertools
import json
import random
import struct

import pytest

from distilcache.pipeline.report.pareto import (
    COSTS,
    front,
    pareto_figure,
    sweep_rows,
    sweep_table,
    write_sweep,
)
from distilcache.pipeline.report.plot import as_png


def model(name, role="student", nll=3.0, latency=5.0, params=10**6, agreement=0.7):
    return {
        "name": name,
        "role": role,
        "params": params,
        "size_mb": params * 4e-6,
        "mlm_nll": nll,
        "mlm_top1": 0.4,
        "teacher_kl": None,
        "teacher_top1_agreement": agreement,
        "ece": 0.03,
        "latency_ms": latency,
        "tokens_per_s": 1e5 / latency,
    }


def student(folder, name, **settings):
    (folder / name).mkdir(parents=True)
    text = json.dumps({"settings": settings})
    (folder / name / "training.json").write_text(text)


@pytest.fixture
def models(tmp_path):
    for seed, suffix in ((0, ""), (3, "-seed3")):
        signal = "replay+topk" if seed else "replay+head"  # The same, by its name before 0.2.0.
        train = {"alpha_cos": 1.0, "signal": signal, "seed": seed, "logging_steps": 1 + seed}
        train |= {"vocabulary_fraction": 1.0} if seed else {}  # As above, before 0.3.0.
        student(tmp_path, f"2x32{suffix}", size="2x32", role="student", train=train)
        varied = {**train, "alpha_cos": 0.0}
        student(tmp_path, f"2x32-alpha_cos=0{suffix}", size="2x32", role="student", train=varied)
    student(tmp_path, "1x32", size="1x32", role="student", train={"alpha_cos": 1.0, "seed": 0})
    return [
        model("teacher", "teacher", nll=2.5, latency=20.0, params=5 * 10**6),
        model("2x32", nll=3.0, latency=8.0),
        model("2x32-seed3", nll=3.4, latency=10.0),
        model("2x32-alpha_cos=0", nll=3.3, latency=8.5),
        model("2x32-alpha_cos=0-seed3", nll=3.5, latency=8.5),
        model("1x32", nll=3.6, latency=4.0, params=5 * 10**5),
    ]


def test_seeds_become_one_row(models, tmp_path):
    rows = {row["name"]: row for row in sweep_rows(models, tmp_path)}
    assert list(rows) == ["teacher", "2x32", "2x32-alpha_cos=0", "1x32"]
    assert rows["2x32"]["models"] == ["2x32", "2x32-seed3"]
    assert rows["2x32"]["mlm_nll"] == pytest.approx({"mean": 3.2, "sd": 0.08**0.5})
    assert rows["1x32"]["mlm_nll"] == {"mean": 3.6, "sd": None}
    assert rows["2x32"]["teacher_kl"] is None
    assert rows["teacher"]["front"]["mlm_nll"] == []
    for name in ("2x32", "1x32"):
        assert rows[name]["front"]["mlm_nll"] == list(COSTS)
    # Four models of one architecture at 8, 10, 8.5 and 8.5 ms.
    assert rows["2x32"]["cost"] == rows["2x32-alpha_cos=0"]["cost"]
    assert rows["2x32"]["cost"]["latency"] == pytest.approx(8.75)
    assert rows["2x32-alpha_cos=0"]["front"]["mlm_nll"] == []
    table = sweep_table(list(rows.values()))
    assert "3.200 ± 0.283" in table
    assert table.splitlines()[5].split()[-4:] == ["latency,", "size", "latency,", "size"]


def test_students_of_other_settings_keep_names_of_their_own(models, tmp_path):
    """Of two recipes a student each, whose names differ in the seed alone."""
    train = {"alpha_cos": 1.0, "seed": 4, "steps": 90}
    student(tmp_path, "2x32-seed4", size="2x32", role="student", train=train)
    rows = sweep_rows([*models, model("2x32-seed4")], tmp_path)
    assert [row["name"] for row in rows][1:] == ["2x32", "2x32-alpha_cos=0", "1x32", "2x32-seed4"]


def test_there_is_a_front_by_agreement(tmp_path):
    """A control that has adapted to the text leads in loss alone."""
    rows = sweep_rows(
        [
            model("2x32", nll=3.2, agreement=0.8),
            model("2x32-control", "control", nll=3.0, agreement=0.6),
            model("1x32", nll=3.4, latency=3.0, params=10**5, agreement=0.5),
            model("guest", nll=2.0, latency=9.0, params=10**8, agreement=None),
        ],
        tmp_path,
    )
    fronts = {row["name"]: row["front"]["teacher_top1_agreement"] for row in rows}
    both = list(COSTS)
    assert fronts == {"2x32": both, "2x32-control": [], "1x32": both, "guest": []}
    assert [r["front"]["mlm_nll"] for r in rows] == [[], both, both, both]
    figure = pareto_figure(rows)
    assert len(figure.axes) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(fronts)
    for row in rows:
        row["teacher_top1_agreement"] = None
    assert len(pareto_figure(rows).axes) == 2


def test_as_many_parameters_are_not_as_fast(tmp_path):
    """Heads cost time and no parameters, and neither do layers that share them."""
    shapes = {"3x32": (3, 2), "6x32": (6, 2), "3x32-heads=8": (3, 8), "3x32-lr=1": (3, 2)}
    for name, (layers, heads) in shapes.items():
        student(tmp_path, name, size=name, role="student", train={"seed": 0})
        config = {"model_type": "albert", "num_hidden_layers": layers, "num_attention_heads": heads}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    models = [
        model(name, latency=ms) for name, ms in zip(shapes, (4.0, 8.0, 6.0, 5.0), strict=True)
    ]
    costs = [row["cost"]["latency"] for row in sweep_rows(models, tmp_path)]
    assert costs == [4.5, 8.0, 6.0, 4.5]


def test_the_front_is_what_nothing_dominates():
    rng = random.Random(0)
    for _ in range(200):
        points = [(rng.randint(0, 5), rng.randint(0, 5)) for _ in range(rng.randint(1, 9))]
        dominated = {
            i
            for i, j in itertools.permutations(range(len(points)), 2)
            if points[j][0] <= points[i][0]
            and points[j][1] <= points[i][1]
            and points[j] != points[i]
        }
        assert set(front(points)) == set(range(len(points))) - dominated, points


def test_the_report_of_a_sweep(models, tmp_path):
    result = {
        "models": models,
        "heldout": {"sequences": 5, "tokens": 80, "masked_positions": 20},
        "machine": {"device": "cpu", "dtype": "float32", "threads": 1},
    }
    out = tmp_path / "report"
    write_sweep({**result, "models": models[:2]}, tmp_path, out)
    assert not out.exists(), "nothing to compare"
    write_sweep(result, tmp_path, out)
    assert sorted(p.name for p in out.iterdir()) == ["pareto.png", "sweep.json", "sweep.md"]
    page = (out / "sweep.md").read_text()
    assert "| 2x32 | student | 2 | 1.0M |" in page
    assert "(pareto.png)" in page
    png = (out / "pareto.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == (1950, 1440)
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert png == as_png(pareto_figure(rows))
    write_sweep({**result, "models": models[:2]}, tmp_path, out)
    assert not list(out.iterdir()), "students that are gone"
