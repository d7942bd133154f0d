"""Table, plot and report files."""

import json
import struct

import pytest

from distilcache.data.errors import UserError
from distilcache.pipeline.report.plot import as_png, quality_latency
from distilcache.pipeline.report.table import against_teacher, format_table
from distilcache.pipeline.report.text import short_count
from distilcache.pipeline.report.write import write_report


def model(name, role, params, nll, latency, kl):
    return {
        "name": name,
        "role": role,
        "params": params,
        "size_mb": params * 4 / 1e6,
        "mlm_nll": nll,
        "mlm_nll_stderr": 0.01,
        "mlm_top1": 0.421,
        "teacher_kl": kl,
        "teacher_top1_agreement": None if kl is None else 0.712,
        "ece": 0.0371,
        "latency_ms": latency,
        "latency_ms_q1": latency * 0.95,
        "latency_ms_q3": latency * 1.04,
        "tokens_per_s": 1e5 / latency,
        "tokens_per_s_q1": 0.9e5 / latency,
        "tokens_per_s_q3": 1.1e5 / latency,
    }


def result(models):
    return {
        "heldout": {
            "sequences": 512,
            "tokens": 65536,
            "masked_positions": 9728,
            "masking": {"policy": "uniform", "seed": 1234},
            "corpus_fingerprint": "ab",
        },
        "machine": {
            "device": "cpu",
            "dtype": "float32",
            "quality_in": "float32",
            "speed_in": "float32 weights, whole masked LM",
            "max_length": 128,
            "throughput_batch": 32,
            "threads": 2,
            "torch": "2",
        },
        "models": models,
    }


@pytest.fixture
def comparison():
    return result(
        [
            model("teacher", "teacher", 10_000_000, 3.1, 19.0, 0.0),
            model("3x384", "student", 6_200_000, 3.4567, 10.0, 0.31),
            model("3x384-control", "control", 6_200_000, 3.9, 10.0, 0.92),
        ]
    )


def png_size(content):
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_table_is_aligned_and_relative_to_the_teacher(comparison):
    lines = format_table(comparison).splitlines()
    head, rule, teacher, student, control = lines[:5]
    assert head.split()[:4] == ["model", "role", "params", "MB"]
    assert set(rule) == {"-", " "}
    ends = [i for i, c in enumerate(rule + " ") if c == " " and (rule + " ")[i - 1] == "-"]
    for line in (teacher, student, control):
        for end in ends[:-1]:
            assert line[end : end + 2].strip() == "", "columns must not run into each other"
    assert "0.62x params, 1.9x faster" in student
    assert "3.457" in student
    assert "0.037" in student
    assert teacher.endswith("-")
    assert "512 sequences" in lines[-1]


def test_relations_read_well():
    teacher = model("t", "teacher", 100, 1, 10.0, 0.0)
    assert against_teacher(model("s", "student", 50, 1, 20.0, 0.1), teacher) == (
        "0.50x params, 2.0x slower"
    )
    assert against_teacher(model("s", "student", 50, 1, 10.1, 0.1), teacher).endswith("as fast")
    assert against_teacher(teacher, None) == "-"
    assert [short_count(n) for n in (950, 12_340, 66_400_000, 1_500_000_000)] == [
        "950",
        "12.3k",
        "66.4M",
        "1.5B",
    ]


def test_table_without_teacher_shows_no_agreement():
    row = format_table(result([model("s", "student", 10, 1.5, 2.0, None)])).splitlines()[2]
    assert row.split()[6:8] == ["-", "-"]


def test_report_holds_all_figures_and_the_recipe(comparison, tmp_path):
    out = tmp_path / "new" / "report"
    write_report(comparison, out, {"name": "demo", "sources": ("a", "b")})
    assert sorted(p.name for p in out.iterdir()) == [
        "quality_latency.png",
        "report.json",
        "report.md",
    ]
    values = json.loads((out / "report.json").read_text())
    assert values["models"] == comparison["models"]
    assert values["heldout"] == comparison["heldout"]
    assert values["recipe"] == {"name": "demo", "sources": ["a", "b"]}
    page = (out / "report.md").read_text()
    assert "| 3x384 | student | 6.2M |" in page
    assert "(quality_latency.png)" in page
    assert min(png_size((out / "quality_latency.png").read_bytes())) > 500


def test_a_second_report_replaces_the_first(comparison, tmp_path):
    write_report(comparison, tmp_path, {"name": "demo"})
    first = (tmp_path / "quality_latency.png").read_bytes()
    write_report(comparison, tmp_path, {"name": "demo"})
    assert (tmp_path / "quality_latency.png").read_bytes() == first
    write_report(result(comparison["models"][:1]), tmp_path, {"name": "demo"})
    assert len(json.loads((tmp_path / "report.json").read_text())["models"]) == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_report_that_cannot_be_written_is_one_clear_error(comparison, tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(UserError, match="report.json must be writable") as caught:
        write_report(comparison, tmp_path, {})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_plot_draws_any_number_of_models(count):
    rows = [
        model(f"m{i}", ("teacher", "student", "control")[i % 3], 10**6, 3.0, 5.0, 0.1)
        for i in range(count)
    ]
    assert png_size(as_png(quality_latency(rows))) == (1350, 780)


def drawn(figure):
    """Boxes of panels and legend in the picture, and the legend's (name, colours, marker)."""
    as_png(figure)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    marks = [
        (*handle.get_facecolor().ravel(), *handle.get_edgecolor().ravel(),
         handle.get_paths()[0].vertices.tobytes())
        for handle in legend.legend_handles
    ]  # fmt: skip
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    return boxes, legend.get_window_extent(), dict(zip(names, marks, strict=True))


def test_no_name_hides_another_and_each_model_has_a_marker_of_its_own():
    """At one and the same place: names at the dots would cover each other."""
    rows = [
        model(f"m{i}", ("student", "control")[i % 2], 10**6 + i, 3.0, 5.0, 0.1) for i in range(30)
    ]
    figure = quality_latency(rows)
    boxes, legend, marks = drawn(figure)
    assert list(marks) == [f"m{i} (1.0M)" for i in range(30)]
    assert len(set(marks.values())) == 30
    assert not any(box.overlaps(legend) for box in boxes)
    assert legend.x1 <= figure.bbox.x1
    assert not figure.axes[0].texts


def test_a_control_with_the_lower_loss_is_explained(comparison, tmp_path):
    note = "Lower MLM loss than its student: 3x384-control."
    assert note not in format_table(comparison)
    comparison["models"][2]["mlm_nll"] = 3.2
    assert note in format_table(comparison)
    write_report(comparison, tmp_path, {})
    page = (tmp_path / "report.md").read_text()
    assert note in page
    assert "agreement" in page[page.index(note) :].splitlines()[0]


def test_figures_against_the_first_of_several_teachers_say_so(comparison, tmp_path):
    note = "The students learnt from the mean of 3 teachers. KL and agreement are with the first"
    assert note not in format_table(comparison)
    comparison["models"][0]["name"] = "teacher-1-of-3"
    assert note in format_table(comparison)
    write_report(comparison, tmp_path, {})
    assert note in (tmp_path / "report.md").read_text()
