"""Tiny tasks in the layouts of the published files, and models for them."""

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM

from distilcache.stages.evaluate.masked_lms import ModelEntry
from distilcache.stages.evaluate.tasks.catalogue import OwnTask, own_task
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import TaskData, read_task
from distilcache.stages.evaluate.tasks.run import run_tasks
from tests.builders import WORDS
from tests.stages.models.families_support import save_with_tokenizer

ENTAILMENT = ["index", "sentence1", "sentence2", "label"]
GOOD, BAD, OTHER = WORDS[:4], WORDS[4:8], WORDS[8:]
FAST = {"epochs": 5.0, "batch_size": 16, "lr": 3e-3, "seeds": (0,), "latency_repeats": 2}


def write_tsv(path: Path, rows: list[list[object]], prefix: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    path.write_text(prefix + text, encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, object]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def read_own(**fields) -> TaskData:
    """A task of one's own with these fields."""
    return read_task(own_task("mine", OwnTask(**fields)), "")


def write_sst2(root: Path, examples: list[tuple[str, int]], dev: list[tuple[str, int]]) -> None:
    for name, rows in (("train", examples), ("dev", dev)):
        write_tsv(root / "SST-2" / f"{name}.tsv", [["sentence", "label"], *map(list, rows)])


def write_stsb(root: Path, examples: list[tuple[str, str, float]]) -> None:
    """Without headings; what stands before the sentences differs in number."""
    rows = [["7", "main-captions", "MSRvid", "none", a, b, f"{y:.3f}"] for a, b, y in examples]
    for name in ("train", "dev"):
        write_tsv(root / "STS-B" / f"{name}.tsv", rows)


def write_rte(root: Path, examples: list[tuple[str, str, str]]) -> None:
    rows = [[i, *example] for i, example in enumerate(examples)]
    for name in ("train", "dev"):
        write_tsv(root / "RTE" / f"{name}.tsv", [ENTAILMENT, *rows])


def write_squad(root: Path, examples: list[tuple[str, str, list[tuple[str, int]]]]) -> None:
    """One article per example: question, context, answers with their first characters."""
    articles = [
        {
            "title": f"article {i}",
            "paragraphs": [
                {
                    "context": context,
                    "qas": [
                        {
                            "id": f"q{i}",
                            "question": question,
                            "answers": [{"text": t, "answer_start": s} for t, s in answers],
                        }
                    ],
                }
            ],
        }
        for i, (question, context, answers) in enumerate(examples)
    ]
    (root / "SQuAD").mkdir(parents=True, exist_ok=True)
    for name in ("train", "dev"):
        path = root / "SQuAD" / f"{name}-v1.1.json"
        path.write_text(json.dumps({"version": "1.1", "data": articles}))


def sentence(rng, label):
    words = rng.choices((BAD, GOOD)[label][:2], k=2) + rng.choices(OTHER, k=rng.randint(1, 4))
    return " ".join(words)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Separable toy tasks: the words tell the label."""
    root, rng = tmp_path_factory.mktemp("glue"), random.Random(0)
    rows = [(sentence(rng, i % 2), i % 2) for i in range(260)]
    write_sst2(root, rows[:200], rows[200:])
    pairs = [(rng.choice(GOOD), rng.choice(OTHER), float(rng.randint(0, 5))) for _ in range(24)]
    write_stsb(root, pairs)
    names = ("not_entailment", "entailment")
    write_rte(root, [(sentence(rng, i % 2), OTHER[0], names[i % 2]) for i in range(24)])
    answers = []
    for _ in range(120):
        words = rng.choices(OTHER, k=rng.randint(8, 14))
        words.insert(rng.randrange(len(words)), "amber bridge")
        text = " ".join(words)
        answers.append(("cedar delta", text, [("amber bridge", text.index("amber bridge"))]))
    write_squad(root, answers)
    return root


@pytest.fixture(scope="module")
def entries(tmp_path_factory, small_teacher, small_tokenizer):
    """A BERT as teacher; DistilBERTs of half its depth as student and control."""
    found = [ModelEntry(name="teacher", role="teacher", path=small_teacher)]
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    for seed, name in enumerate(("1x32", "1x32-control")):
        folder = tmp_path_factory.mktemp("students") / name
        torch.manual_seed(seed)
        config = DistilBertConfig(
            vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64,
            max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.3,
        )  # fmt: skip
        save_with_tokenizer(DistilBertForMaskedLM(config), tokenizer, folder)
        role = "control" if name.endswith("control") else "student"
        found.append(ModelEntry(name=name, role=role, path=folder))
    return found


def run_on(entries, data, out, **settings):
    config = TasksConfig(**{"data": str(data), "names": ("sst2",), **FAST, **settings})
    return run_tasks(entries, config, out, device="cpu", dtype="float32")
