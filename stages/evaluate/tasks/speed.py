"""Size and speed of task models."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distilcache.stages.evaluate.latency import measure_speed
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import TaskData
from distilcache.stages.evaluate.tasks.finetune import Place
from distilcache.stages.evaluate.tasks.jobs import longest
from distilcache.stages.evaluate.tasks.task_models import Candidate, load_model


def size_and_speed(
    models: Sequence[Candidate], tasks: Sequence[TaskData], config: TasksConfig, place: Place
) -> dict[str, dict[str, Any]]:
    """Of every model, by its name, with its head of the first task."""
    length = longest(tasks[0], models, config)
    loaded: list[Any] = []
    for model in models:
        made = load_model(model.entry, tasks[0].task, 0).eval()
        loaded.append(made.to(place.device, place.dtype))
    timed = measure_speed(
        loaded,
        max_length=length,
        vocab_size=min(made.config.vocab_size for made in loaded),
        batch_size=config.batch_size,
        repeats=config.latency_repeats,
        device=place.device,
    )
    sizes = [sum(p.numel() for p in made.parameters()) for made in loaded]
    return {
        model.entry.name: {
            "role": model.entry.role,
            "params": size,
            "size_mb": 4 * size / 1e6,
            **asdict(speed),
        }
        for model, size, speed in zip(models, sizes, timed, strict=True)
    }
