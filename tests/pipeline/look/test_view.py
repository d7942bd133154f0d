"""The page's data and file; see test_view_browser.py for the page itself."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.pipeline.look.page.assemble import assemble, embed
from distilcache.pipeline.look.page.command import fit, view_command
from distilcache.pipeline.look.page.project import find_models, find_students, training_curves
from distilcache.pipeline.look.sample import read_samples
from tests.command_line import refusal, run
from tests.pipeline.look.view_support import HOSTILE, data_of, make_project, make_student


def view(cache, out, **options):
    given = {"students": [], "sequences": 6, "seed": 0, "device": "cpu", **options}
    return view_command(str(cache), out=out, **given)


@pytest.fixture(scope="module")
def project(tmp_path_factory, small_cache, small_teacher):
    """A cache with students and a report beside it."""
    home = tmp_path_factory.mktemp("view") / "home"
    return make_project(home, small_cache(logits_dtype="float32"), small_teacher)


def test_the_page_holds_the_teachers_probabilities(tmp_path, small_cache, small_teacher):
    """Worked out from the page's rounded numbers as its script does, against the dense softmax."""
    cache = small_cache(hidden_dtype="float32", logits_dtype="float32")
    view(cache, tmp_path / "view.html")
    data = data_of(tmp_path / "view.html")
    model = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    samples = list(read_samples(Cache.open(cache), 6, 0))
    assert len(samples) == len(data["sequences"])
    for sample, shown in zip(samples, data["sequences"], strict=True):
        with torch.no_grad():
            ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
            logits_LV = model(input_ids=ids).logits[0].double()
        tokenizer_words = [data["words"][word] for word in shown["words"]]
        assert len(tokenizer_words) == len(sample.input_ids)
        for entry in shown["positions"]:
            for number, temperature in enumerate(data["temperatures"]):
                p_V = torch.softmax(logits_LV[entry["position"]] / temperature, -1).numpy()
                found = [
                    np.exp(z / temperature - entry["stored_norm" if i < entry["stored"] else
                                                   "rest_norm"][number])
                    for i, z in enumerate(entry["logits"])
                ]  # fmt: skip
                wanted = np.sort(p_V)[::-1][:8]
                assert np.sort(found)[::-1][:8] == pytest.approx(wanted, rel=0.01, abs=1e-5)


def test_everything_beside_the_cache_is_found(project, tmp_path):
    values, text = view(project, None)
    assert values["path"] == str(project.parent / "view.html")
    data = data_of(project.parent / "view.html")
    (project.parent / "view.html").unlink()
    assert [s["name"] for s in data["students"]] == ["1x32", "1x16-control"]
    assert [s["role"] for s in data["students"]] == ["student", "control"]
    assert [m["name"] for m in data["models"]] == ["teacher", "1x32", HOSTILE]
    assert [t["name"] for t in data["training"]] == ["1x32", "1x16-control"]
    assert "2 students" in text
    position = data["sequences"][0]["positions"][0]
    # 32 wide as the teacher is: a cosine; 16 wide: none.
    assert [told["cosine"] is None for told in position["students"]] == [False, True]
    assert {tuple(sorted(s)) for s in data["sequences"]} == {
        ("at", "glued", "masked", "positions", "seen", "special", "words")
    }


@pytest.mark.parametrize(
    "kind",
    [
        {"mask_only": True},
        {"hidden_dtype": "none", "top_k": 4},
        {"hidden_dtype": "none", "top_k": 0, "tail_samples": 4},
        {"top_k": 0, "rounds": 2},
        {"positions": "all", "hidden_dtype": "float16", "hidden_layers": (1, -1)},
        {"positions": "masked+0.2", "top_p": 0.4, "residual_samples": 4},
        {"hidden_dtype": "none", "top_k": 4, "temperatures": ()},
    ],
)
def test_every_kind_of_cache(tmp_path, small_cache, small_teacher, kind):
    student = make_student(tmp_path / "x", small_teacher, 32, 0)
    view(small_cache(**kind), tmp_path / "view.html", students=[student])
    data = data_of(tmp_path / "view.html")
    assert data["temperatures"][data["start"]] == 1
    for sequence in data["sequences"]:
        assert len(sequence["glued"]) == len(sequence["words"])
        for entry in sequence["positions"]:
            assert len(entry["tokens"]) == len(entry["logits"]) > 0
            assert len(entry["students"][0]["norm"]) == len(data["temperatures"])
    if "rounds" in kind:
        assert {s["at"][0] for s in data["sequences"]} == {0, 1}


def test_texts_cannot_leave_their_places(tmp_path, project):
    for data in ({"title": HOSTILE}, {"title": "x", "words": [HOSTILE, "@script@", "@data@"]}):
        page = assemble(data)
        assert page.count("<script") == 2
        assert page.count("</script>") == 2
        assert "<img" not in page
    assert json.loads(embed({"x": HOSTILE})) == {"x": HOSTILE}
    view(project, tmp_path / "view.html")
    assert "<img" not in (tmp_path / "view.html").read_text()
    assert HOSTILE in [m["name"] for m in data_of(tmp_path / "view.html")["models"]]


def test_the_page_asks_for_nothing(tmp_path, project):
    view(project, tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text()
    assert "default-src 'none'" in page
    code = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.S)
    addresses = set(re.findall(r"https?://[^\s\"')]+", code))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\s*\(", code)
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write)\b", code)


def test_a_page_stays_within_its_bound(tmp_path, project):
    values, _ = view(project, tmp_path / "view.html", sequences=30)
    data = data_of(tmp_path / "view.html")
    assert values["sequences"] == len(data["sequences"]) == 30
    page = fit(data, 120_000)
    assert len(page) < 120_000
    assert 1 <= len(data["sequences"]) < 30


def test_equal_caches_give_equal_pages(tmp_path, project):
    for name in ("a", "b"):
        view(project, tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_training_logs(tmp_path):
    assert training_curves(tmp_path) == {}
    lines = [json.dumps({"step": s, "loss": float(s)}) for s in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curves = training_curves(tmp_path)
    assert list(curves) == ["loss"]
    assert len(curves["loss"]) <= 240
    assert curves["loss"][-1][0] == 1000
    assert np.mean([v for _, v in curves["loss"]]) == pytest.approx(500.5, rel=1e-3)
    (tmp_path / "metrics.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="view: .*metrics.jsonl must hold one JSON object per line"):
        training_curves(tmp_path)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere")  # as it says
    assert training_curves(tmp_path) == {}


def test_reports(tmp_path):
    cache = tmp_path / "cache"
    assert find_models(tmp_path) == []
    assert find_students(cache) == []
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("no JSON")
    assert find_models(tmp_path) == []
    good = {"name": "a", "role": "student", "latency_ms": 2.0, "mlm_nll": 3.0}
    models = [good, {**good, "latency_ms": None}, "x", {"name": "b"}]
    (tmp_path / "report" / "report.json").write_text(json.dumps({"models": models}))
    assert [m["name"] for m in find_models(tmp_path)] == ["a"]
    row = {**good, "latency_ms": {"mean": 4.5, "sd": None}}
    (tmp_path / "report" / "sweep.json").write_text(json.dumps({"rows": [row, good]}))
    assert [m["latency_ms"] for m in find_models(tmp_path)] == [4.5, 2.0]


def test_students_of_another_project_bring_their_report(tmp_path, project):
    """A project with ``cache_from`` has students and report of its own, and another's cache."""
    other = tmp_path / "other"
    shutil.copytree(project.parent / "students", other / "students")
    model = {"name": "of the other", "role": "student", "latency_ms": 2.0, "mlm_nll": 3.0}
    (other / "report").mkdir()
    (other / "report" / "report.json").write_text(json.dumps({"models": [model]}))
    student = next(iter(sorted((other / "students").iterdir())))
    out = tmp_path / "view.html"
    done = run("view", project, "--student", student, "--out", out, "--sequences", 1)
    assert done.exit_code == 0, done.output
    assert [model["name"] for model in data_of(out)["models"]] == ["of the other"]


def test_bad_input_is_named(tmp_path, project, small_teacher):
    def fails(*arguments):
        done = run("view", *arguments)
        assert len(done.stderr.splitlines()) == 1
        return refusal(done)

    assert "must hold a teacher cache" in fails(tmp_path)
    assert "--sequences must be 1 or more, got 0" in fails(project, "--sequences", 0)
    assert "--out must be a file" in fails(project, "--out", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "view: student 'empty' must be" in fails(project, "--student", tmp_path / "empty")
    student = make_student(tmp_path / "x", small_teacher, 16, 0)
    twice = ["--student", student, "--student", student]
    assert "must name each folder once" in fails(project, *twice)
    values = json.loads((student / "config.json").read_text())
    shutil.copytree(student, tmp_path / "y")
    (tmp_path / "y" / "config.json").write_text(json.dumps({**values, "vocab_size": 7}))
    assert "student 'y'" in fails(project, "--student", tmp_path / "y")
    assert not list(tmp_path.glob("*.html"))


def test_through_the_command_line(tmp_path, project):
    out = tmp_path / "new" / "page.html"
    done = run("view", project, "--out", out, "--sequences", 4, "--json")
    assert done.exit_code == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["sequences"] == 4
    assert values["bytes"] == out.stat().st_size
