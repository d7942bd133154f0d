"""The parts of ``gpu.py`` that are no benchmark of their own: a command each.

    python -m benchmarks.gpu_parts card --device cuda --json card.json

Figures are written after each measurement, so that a part that is cut leaves what it had.
"""

import json
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.common import PATH, Figures, checked_command, device_options, source_options
from benchmarks.stage_two import cache_and_teacher, one_turn, rate, training_options
from benchmarks.teachers import make_cache, text_corpus
from benchmarks.training_arms import Setting, ours
from benchmarks.usage import command_line
from benchmarks.utilisation import matmul_rate, top_kernels
from distilcache.data.cache.cache import Cache
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.models.anatomy import layer_lists
from distilcache.stages.models.device import resolve_device, resolve_dtype, synchronise
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student

STEPS = 20
"""Training steps compared between devices."""
TASKS = ("rte", "stsb", "sst2")
"""The largest comes last: time may run out."""


@click.group()
def main() -> None:
    """One part of ``benchmarks.gpu``."""


def part(command: Callable[..., None]) -> click.Command:
    """A command of the group with ``--device``, ``--dtype``."""
    made = checked_command(device_options(command))
    main.add_command(made)
    return made


json_option = click.option("--json", "json_path", type=PATH, required=True)


@part
@json_option
def card(device: str, dtype: str, json_path: Path) -> None:
    """The device itself: memory, rate of a large matrix product, rate of a copy."""
    figures = Figures(json_path)
    target = resolve_device(device)
    if target.type == "cuda":
        properties = torch.cuda.get_device_properties(target)
        figures.add(name=properties.name, memory_gib=properties.total_memory / 2**30)
    kind = resolve_dtype(dtype, target)
    figures.add(dtype=str(kind), matmul_flops_per_s=matmul_rate(target, kind))
    source = torch.empty(2**31 if target.type == "cuda" else 2**24, dtype=torch.uint8).to(target)
    copy, seconds = torch.empty_like(source), []
    for _ in range(6):
        synchronise(target)
        begun = time.perf_counter()
        copy.copy_(source)
        synchronise(target)
        seconds.append(time.perf_counter() - begun)
    figures.add(copy_bytes_per_s=2 * source.numel() / statistics.median(seconds[1:]))


# Right: the same results as on a CPU


@part
@json_option
@source_options
@click.option("--blocks", default=8, help="Blocks of 32 sequences of 128 tokens.")
def right(teacher: Path, text: Path, blocks: int, device: str, dtype: str, json_path: Path) -> None:
    """Signals, training and resuming on the device against the CPU in float32."""
    figures, home = Figures(json_path), json_path.parent / "right"
    corpus = text_corpus(home / "data", text, teacher, 32 * blocks, 32)

    def cache(name: str, where: str, kind: str, **settings: Any) -> Cache:
        return make_cache(home / name, corpus, teacher, device=where, dtype=kind, **settings)

    exact = {"hidden_dtype": "float32", "logits_dtype": "float32"}
    truth = cache("cpu_exact", "cpu", "float32", **exact)
    for kind in ("float32", "bfloat16"):
        figures.add(**{f"signals_{kind}": differences(truth, cache(kind, device, kind, **exact))})
    coded = [cache(name, device, "auto") for name in ("coded", "coded_again")]
    figures.add(coded=differences(truth, coded[0]))
    same = coded[0].manifest.fingerprint == coded[1].manifest.fingerprint
    figures.add(two_runs_same_bytes=same)
    losses = [training_losses(truth, home / f"train_{x}", x) for x in ("cpu", device)]
    apart = np.abs(losses[0] - losses[1]) / losses[0]
    figures.add(training_steps=STEPS, loss_largest_relative_difference=float(apart.max()))
    figures.add(resume_same_bits=resumes_to_the_bit(coded[0], home, device, dtype))


@torch.no_grad()
def differences(truth: Cache, other: Cache) -> dict[str, float]:
    """Mean KL of the replayed distribution at T = 1 and 2, relative error, equal first choices."""
    states_ND = [states_of(cache) for cache in (truth, other)]
    first, found = [], {}
    for temperature in (1.0, 2.0):
        log_p, log_q = (
            (cache.teacher.lm_head()(states).float() / temperature).log_softmax(-1)
            for cache, states in zip((truth, other), states_ND, strict=True)
        )
        found[f"kl_at_{temperature:g}"] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        first = [log_p.argmax(-1), log_q.argmax(-1)]
    found["first_choice_equal"] = float((first[0] == first[1]).float().mean())
    found["relative_error"] = float((states_ND[0] - states_ND[1]).norm() / states_ND[0].norm())
    return found


def states_of(cache: Cache) -> torch.Tensor:
    """Hidden states of the first block, float32 [N, D]."""
    stored = cache.encoding.hidden_layer()
    assert stored is not None
    flat = torch.from_numpy(cache.read_block(0)[stored.column].copy())
    planes = stored.dtype == "coded"
    shaped = flat.reshape(stored.planes, -1) if planes else flat.reshape(-1, stored.width)
    states: torch.Tensor = cache.teacher.hidden_decoder()({stored.column: shaped}).float()
    return states


def training_losses(cache: Cache, out: Path, device: str) -> np.ndarray:
    """Loss of each of the first steps of a student without dropout, in float32."""
    shape = cache.encoding.hidden_layer()
    assert shape is not None
    train_student(
        cache_dir=cache.path,
        out=out,
        size=f"1x{shape.width}",
        student=StudentConfig(sizes=(f"1x{shape.width}",)),
        train=TrainConfig(steps=STEPS, batch_size=16, logging_steps=1, save_steps=10**6),
        device=device,
        dtype="float32",
    )
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def resumes_to_the_bit(cache: Cache, home: Path, device: str, dtype: str) -> bool:
    """Whether a student that was killed and started again has the weights of one that was not."""
    shape = cache.encoding.hidden_layer()
    assert shape is not None
    size = f"1x{shape.width}"
    settings = {
        "root": home,
        "cache_from": cache.path,
        "device": device,
        "dtype": dtype,
        "train.steps": 60,
        "train.save_steps": 10,
        "train.batch_size": 16,
        "student.control": "false",
    }

    def command(name: str) -> list[str]:
        return command_line("student-train", "--size", size, name=name, **settings)

    whole, killed = (home / name / "students" / size for name in ("whole", "killed"))
    subprocess.run(command("whole"), check=True)
    process = subprocess.Popen(command("killed"))
    while process.poll() is None and not list(killed.glob("checkpoints/checkpoint-*/trainer.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command("killed"), check=True)
    weights = [(path / "model.safetensors").read_bytes() for path in (whole, killed)]
    return weights[0] == weights[1]


# Training: what a step is made of


@part
@json_option
@training_options(teacher="12x768", sizes="6x768", steps=12)
@source_options
@click.option("--out", required=True, type=PATH, help="Work folder.")
def training(
    teacher_size: str,
    sizes: str,
    teacher: Path,
    text: Path,
    batch_size: int,
    steps: int,
    out: Path,
    device: str,
    dtype: str,
    json_path: Path,
) -> None:
    """Kernels of a step, ``torch.compile``, and how many loader threads keep the device busy."""
    figures, target = Figures(json_path), resolve_device(device)
    home = out / f"{teacher_size}_{batch_size}x{steps}"
    train = one_turn(steps, batch_size)
    cache, loaded = cache_and_teacher(home, teacher_size, teacher, text, train, device, dtype)
    setting = Setting(cache, loaded, sizes, train)
    arm = ours(setting)
    tokens = arm[1][0]["input_ids"].numel()
    figures.add(tokens_per_s=rate(arm, setting, tokens, home / "run"))
    figures.add(kernels=top_kernels(lambda: rate(arm, setting, tokens, home / "run"), target))
    figures.add(loader_tokens_per_s={n: loader_rate(cache, batch_size, n) for n in (1, 2)})
    compiled = ours(setting)
    student = compiled[0].get_submodule("student")
    backend = "inductor" if target.type == "cuda" else "eager"  # a rehearsal has no time for code
    for name in layer_lists(student):
        for layer in student.get_submodule(name).children():
            layer.compile(backend=backend)
    rate(compiled, setting, tokens, home / "run")  # compiles
    figures.add(compiled_tokens_per_s=rate(compiled, setting, tokens, home / "run"))


def loader_rate(cache: Cache, batch_size: int, threads: int) -> float:
    """Tokens per second by the clock that so many threads of the loader bring."""
    batches = CachedBatches(cache, batch_size=batch_size, seed=0, signal="replay+topk")
    batches._pool._max_workers = threads
    begun, tokens = time.perf_counter(), 0
    for k in range(2 * batches.steps_per_epoch):
        tokens += batches[k]["input_ids"].numel()
    return tokens / (time.perf_counter() - begun)


# Real: a student of a real teacher


@part
@json_option
@click.option("--data", required=True, type=PATH, help="See gpu.py.")
@click.option("--out", required=True, type=PATH, help="Work folder.")
@click.option("--size", default="3x384", help="Student.")
@click.option("--seconds", default=120.0, help="For everything.")
@click.option("--limit", default=9600, help="Examples of each task; 0: all.")
def real(
    data: Path,
    out: Path,
    size: str,
    seconds: float,
    limit: int,
    device: str,
    dtype: str,
    json_path: Path,
) -> None:
    """A student trained for as long as the time allows, held-out quality, then tasks."""
    figures, end = Figures(json_path), time.monotonic() + seconds
    settings = {
        "root": out,
        "name": "real",
        "device": device,
        "dtype": dtype,
        "corpus.sources": data / "corpus" / "wiki_train_10MB.txt.xz",
        "corpus.heldout_sources": data / "corpus" / "wiki_valid_2MB.txt.xz",
        "corpus.workers": 0,
        "teacher.model": data / "teacher",
        "cache.rounds": 4,
        "student.family": "teacher",
        "train.batch_size": 64,
        "tasks.data": data / "glue",
        "tasks.limit": limit,
        "tasks.seeds": [0],
    }

    def run(*command: str, **more: Any) -> float:
        begun = time.monotonic()
        subprocess.run(command_line(*command, **{**settings, **more}), check=True)
        return time.monotonic() - begun

    figures.add(
        cache_seconds=run("teacher-cache"), cache=Cache.open(out / "real/cache").manifest.totals
    )
    trial = run("student-train", "--size", size, **{"name": "trial", "train.steps": 30,
                "cache_from": out / "real/cache"})  # fmt: skip
    result = json.loads((out / f"trial/students/{size}/training.json").read_text())["result"]
    step = result["seconds"] / 30
    # Half of the time for training, the other half for tasks; starting takes what the trial took.
    left = end - time.monotonic() - (trial - result["seconds"])
    settings["train.steps"] = max(30, int(left / 2 / step))
    run("student-train", "--size", size)
    training = json.loads((out / f"real/students/{size}/training.json").read_text())["result"]
    figures.add(training=training)
    run("evaluate")
    figures.add(heldout=json.loads((out / "real/report/report.json").read_text()))
    for last in range(len(TASKS)):  # those before are done
        run("evaluate", "--tasks", ",".join(TASKS[: last + 1]))
        figures.add(tasks=json.loads((out / "real/report/tasks.json").read_text()))


if __name__ == "__main__":
    main()
