"""A cache with everything beside it that a page can show, a browser, and what a page says."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
HOSTILE = "</script><script>window.broken=1</script><img src=x onerror='window.broken=1'>&amp;"


def make_student(folder: Path, teacher: Path, width: int, seed: int) -> Path:
    """A random DistilBERT with the teacher's vocabulary, and a training log."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM

    config = AutoConfig.from_pretrained(teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=config.vocab_size, dim=width, hidden_dim=2 * width, n_layers=1,
                n_heads=2, max_position_embeddings=32, initializer_range=0.3,
            )
        ).save_pretrained(folder)  # fmt: skip
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    lines = [{"step": s, "loss": 9 / s, "ce": 4 / s, "mlm": 5 / s} for s in range(1, 601)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    role = "control" if "control" in folder.name else "student"
    (folder / "training.json").write_text(json.dumps({"settings": {"role": role, "train": {}}}))
    return folder


def make_project(home: Path, cache: Path, teacher: Path) -> Path:
    """A project folder; returns its cache."""
    shutil.copytree(cache, home / "cache")
    make_student(home / "students" / "1x32", teacher, 32, 0)
    make_student(home / "students" / "1x16-control", teacher, 16, 1)
    (home / "report").mkdir()
    models = [
        {"name": name, "role": role, "params": params, "latency_ms": ms, "mlm_nll": nll}
        for name, role, params, ms, nll in (
            ("teacher", "teacher", 9000, 4.0, 2.0),
            ("1x32", "student", 5000, 2.0, 2.6),
            (HOSTILE, "control", 3000, 2.5, 2.9),
        )
    ]
    (home / "report" / "report.json").write_text(json.dumps({"models": models}))
    return home / "cache"


def open_browser():
    """Chromium, driven by playwright; skips where either is missing."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="needs the extra browser-tests")
    with api.sync_playwright() as driver:
        # Without a sandbox of its own, since tests may run as root in a container.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def data_of(path) -> dict:
    """What a page carries."""
    text = path.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def shares(page):
    """Probabilities of the table, ``{word: [teacher, students ...]}``; of all others under -1."""
    rows = page.locator("#distribution tbody tr:not(.sum)")
    return {
        int(row.get_attribute("data-token") or -1): [
            float(p) if p else None
            for p in row.locator("td").evaluate_all("tds => tds.map(td => td.dataset.probability)")
        ]
        for row in rows.all()
    }


def expected(data, entry, number):
    """The same from the page's numbers, by numpy."""
    temperature = data["temperatures"][number]
    bias = data["bias"].get(str(number))
    found = {}
    for place, (word, logit) in enumerate(zip(entry["tokens"], entry["logits"], strict=True)):
        if place < entry["stored"]:
            own = [logit / temperature - entry["stored_norm"][number]]
        else:
            raised = logit + (bias[word] if bias else 0)
            own = [raised / temperature - entry["rest_norm"][number]]
        own += [
            told["logits"][place] / temperature - told["norm"][number] for told in entry["students"]
        ]
        found[word] = np.exp(own)
    return found


def current(page, data):
    """Entry of the position that the page shows."""
    number = int(page.locator("#list [aria-selected=true]").get_attribute("id").split("-")[1])
    place = int(page.locator("#text [aria-pressed=true]").get_attribute("data-place"))
    entries = data["sequences"][number]["positions"]
    return next(entry for entry in entries if entry["position"] == place)


def agrees(page, data, number):
    wanted, found = expected(data, current(page, data), number), shares(page)
    rest = found.pop(-1)
    assert len(found) >= 4
    for word, values in found.items():
        assert values == pytest.approx(list(wanted[word]), rel=1e-4)
    assert rest == pytest.approx([1 - sum(v[n] for v in found.values()) for n in range(len(rest))],
                                 abs=1e-4)  # fmt: skip
    caption = page.locator("#distribution caption").inner_text()
    assert caption == f"Probabilities at T = {data['temperatures'][number]:g}"
