"""One run of a comparison: a student trained from one kind of signal with one seed, and measured.

Files below ``--out``::

    plan.json                    settings that all runs share
    corpus/, caches/<name>/      made once
    runs/<arm>-<seed>/           a training under way
    results/<arm>-<seed>.json    a finished run; .jsonl: its loss curve
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM

from benchmarks.common import environment, write_results
from benchmarks.inner import train_inner
from benchmarks.live import masked_batches, train_live
from benchmarks.teachers import CHARACTERS, make_cache
from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import require
from distilcache.data.masks.masking import MaskingConfig
from distilcache.data.storage.files import read_json, write_json
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.evaluate.common_ids import asked_of
from distilcache.stages.evaluate.config import EvaluateConfig
from distilcache.stages.evaluate.heldout import read_heldout
from distilcache.stages.evaluate.mlm import measure_quality, quality_batch_size
from distilcache.stages.models.device import resolve_device, resolve_dtype
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student

_RELATIONS: dict[str, Any] = {"relation_layer": -1, "hidden_dtype": "none", "top_k": 0}

CACHES: dict[str, dict[str, Any]] = {
    "masks": {"mask_only": True},
    "default": {},
    "extra": {"positions": "masked+0.1"},
    "top8": {"hidden_dtype": "none", "top_k": 8},
    "top64": {"hidden_dtype": "none", "top_k": 64},
    "draws50": {"hidden_dtype": "none", "top_k": 0, "tail_samples": 50},
    "all": {"positions": "all", "logit_positions": "masked"},
    "all_relations": {"positions": "all", "logit_positions": "masked", "relation_layer": -1},
    "relations": {"relation_layer": -1},
    "relations_5": {"relation_layer": -2},
    "only_relations": _RELATIONS,
    "coarse_relations": {**_RELATIONS, "relation_quality": 0.02},
    "coarser_relations": {**_RELATIONS, "relation_quality": 0.05},
    "words": {"masking": MaskingConfig(unit="word")},
}
"""Fields of ``CacheConfig`` by name of the cache, and ``masking`` where it is not the usual one."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the trainings that a comparison compares."""

    name: str
    label: str
    """Its name in tables and plots."""
    kind: str
    """``live``, ``live everywhere`` (all attended positions), ``cache``, ``inner`` (a cache, with
    the teacher beside it for inner layers), ``logits`` or ``mlm``."""
    cache: str
    """Key of ``CACHES``."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``TrainConfig``; weights are 5/2/1 by default."""
    student: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``StudentConfig``."""


_FREE = ("out", "keep", "logging_steps", "save_steps", "device", "dtype")
"""Fields of a plan that do not change the figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What all runs of one comparison share."""

    out: Path
    teacher: Path
    text: Path
    heldout: Path
    size: str = "3x384"
    steps: int = 250
    batch_size: int = 16
    """Sequences per step."""
    lr: float = 3e-4
    max_length: int = 128
    """Tokens per sequence."""
    max_bytes: int = 0
    """Training text; 0: enough that no sequence comes twice."""
    block_sequences: int = 512
    heldout_sequences: int = 512
    logging_steps: int = 10
    save_steps: int = 125
    device: str = "auto"
    dtype: str = "auto"
    keep: bool = False
    """Keep trained models."""

    @property
    def corpus(self) -> Path:
        """Folder of the corpus."""
        return self.out / "corpus"

    def result(self, arm: str, seed: int) -> Path:
        """File of a finished run."""
        return self.out / "results" / f"{arm}-{seed}.json"

    def train_config(self, arm: Arm, seed: int) -> TrainConfig:
        """The schedule of all arms with the losses of this one."""
        return TrainConfig(
            **{
                "vocabulary_fraction": 1.0,
                "steps": self.steps,
                "batch_size": self.batch_size,
                "lr": self.lr,
                "logging_steps": self.logging_steps,
                "save_steps": self.save_steps,
                "seed": seed,
                **arm.train,
            }
        )

    def record(self) -> None:
        """Write the plan, or compare it with the one in the work folder.

        Raises:
            UserError: The folder holds results of another plan.
        """
        values = {n: v for n, v in asdict(self).items() if n not in _FREE}
        values = {n: str(v.resolve()) if isinstance(v, Path) else v for n, v in values.items()}
        # The resolved names: `auto` is one thing here and another on the next machine.
        device = resolve_device(self.device)
        dtype = str(resolve_dtype(self.dtype, device)).removeprefix("torch.")
        values["arithmetic"] = f"{dtype} on {device.type}"
        path = self.out / "plan.json"
        if not path.exists():
            write_json(path, values)
            return
        there = read_json(path, "benchmark: plan.json")
        changed = [n for n in values if there.get(n, values[n]) != values[n]]
        shown = ", ".join(f"{n} {there.get(n)!r} -> {values[n]!r}" for n in changed)
        require(
            not changed,
            f"benchmark: settings must be those that {self.out} was begun with, got other {shown}; "
            "choose another --out",
        )


def prepare(plan: Plan, name: str) -> Cache:
    """Make the corpus and one of ``CACHES`` where they are missing."""
    path = plan.out / "caches" / name
    if (path / "manifest.json").exists():
        return Cache.open(path)
    tokens = plan.steps * plan.batch_size * plan.max_length
    config = CorpusConfig(
        sources=(str(plan.text),),
        heldout_sources=(str(plan.heldout),),
        max_length=plan.max_length,
        max_bytes=plan.max_bytes or tokens * CHARACTERS,
        block_sequences=plan.block_sequences,
        workers=1,
    )
    build_corpus(config, plan.corpus, str(plan.teacher))
    settings = {"device": plan.device, "dtype": plan.dtype, **CACHES[name]}
    return make_cache(path, plan.corpus, plan.teacher, **settings)


def run_arm(plan: Plan, arm: Arm, seed: int) -> dict[str, Any]:
    """Train and measure one student, or read the result of an earlier call."""
    path = plan.result(arm.name, seed)
    if path.is_file():
        found: dict[str, Any] = read_json(path, "benchmark: result")
        return found
    cache = prepare(plan, arm.cache)
    check_batches(plan, arm, cache, seed)
    folder = plan.out / "runs" / f"{arm.name}-{seed}"
    figures = train_arm(plan, arm, seed, cache, folder)
    totals = cache.manifest.totals
    result = {
        "arm": arm.name,
        "label": arm.label,
        "kind": arm.kind,
        "seed": seed,
        "bytes_per_token": totals["bytes"] / totals["tokens"],
        "training": figures,
        **measure(plan, folder),
        "environment": environment(plan.device),
    }
    path.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "metrics.jsonl", path.with_suffix(".jsonl"))
    write_results(path, result)
    shutil.rmtree(folder / "checkpoints" if plan.keep else folder, ignore_errors=True)
    return result


def train_arm(plan: Plan, arm: Arm, seed: int, cache: Cache, folder: Path) -> dict[str, Any]:
    """Train one student; an interrupted training goes on."""
    shared: dict[str, Any] = {
        "cache_dir": cache.path,
        "out": folder,
        "size": plan.size,
        "student": StudentConfig(**{"sizes": (plan.size,), **arm.student}),
        "train": plan.train_config(arm, seed),
        "teacher_dir": plan.teacher,
        "device": plan.device,
        "dtype": plan.dtype,
    }
    if arm.kind.startswith("live"):
        return train_live(**shared, everywhere=arm.kind == "live everywhere")
    if arm.kind == "inner":
        return train_inner(**shared)
    return train_student(**shared, role="control" if arm.kind == "mlm" else "student")


def check_batches(plan: Plan, arm: Arm, cache: Cache, seed: int) -> None:
    """Compare the first, second and last batch with those of the live teacher."""
    if "masking" in CACHES[arm.cache]:
        return
    train = plan.train_config(arm, seed)
    ours, live = (masked_batches(c, train) for c in (cache, prepare(plan, "masks")))
    for k in (0, 1, train.steps - 1):
        mine, theirs = ours[k], live[k]
        for name in ("input_ids", "masked_index", "labels"):
            assert torch.equal(mine[name], theirs[name]), (arm.name, k, name)


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Quality of student and teacher on the same held-out masks."""
    device = resolve_device(plan.device)
    corpus = Corpus.open(plan.corpus)
    config = EvaluateConfig(sequences=plan.heldout_sequences)
    heldout = read_heldout(corpus, MaskingConfig(), sequences=config.sequences, seed=config.seed)
    models = [
        AutoModelForMaskedLM.from_pretrained(path, use_safetensors=True, local_files_only=True)
        for path in (plan.teacher, folder)
    ]
    teacher, student = measure_quality(
        [model.to(device).eval() for model in models],
        0,
        asked_of(
            heldout,
            corpus.manifest.vocab_size,
            max(0, corpus.manifest.special_ids["pad"]),
            [None, None],
            [None, None],
        ),
        batch_size=quality_batch_size(heldout, corpus.manifest.vocab_size, config.batch_size),
        device=device,
        dtype=resolve_dtype(plan.dtype, device),
    )
    return {"quality": asdict(student), "teacher": asdict(teacher)}
