"""Tiny tasks in the layouts of the published files, and models for them."""

import json
from pathlib import Path

ENTAILMENT = ["index", "sentence1", "sentence2", "label"]


def write_tsv(path: Path, rows: list[list[object]], prefix: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    path.write_text(prefix + text, encoding="utf-8")


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
