"""A cache with everything beside it that a page can show, and a browser."""

import json
import shutil
from pathlib import Path

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
    (folder / "training.json").write_text(json.dumps({"settings": {"role": role}}))
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
