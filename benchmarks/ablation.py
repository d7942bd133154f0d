"""What each part of the loss, and the start from the teacher's layers, is worth.

The ablation of DistilBERT's paper (Sanh et al. 2019, table 4) on this scale: the same student,
batches and steps from one cache, with all three losses, without each of them, and from random
weights. There, in GLUE points, random weights cost most (3.69), then no L_ce (2.96), no L_cos
(1.46) and no L_mlm (0.31).

Quality is that of held-out text. Arms are compared seed by seed: they share order, masks and
dropout, so that most of what a seed brings cancels in the difference. Finished parts are kept:
the same command goes on where it was, and parts may run side by side (--arms, --seeds; first
--prepare).

    python -m benchmarks.ablation --plot docs/ablation.png --json runs/ablation/ablation.json
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.ablation_report import FULL, LABELS, draw, summarise, tables
from benchmarks.common import benchmark, need_paths
from benchmarks.comparison import comparison_options, finished_parts, publish
from distilcache.data.errors import require
from distilcache.data.storage.files import write_bytes

TRAIN = {"no_ce": {"alpha_ce": 0.0}, "no_cos": {"alpha_cos": 0.0}, "no_mlm": {"alpha_mlm": 0.0}}
"""Fields of the recipe section ``[train]`` by arm."""


def run_parts(settings: Mapping[str, Any], arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Train and measure the parts that are not there yet; no seeds: corpus and cache alone."""
    from benchmarks.arms import ARMS, Arm, Plan, prepare, run_part

    plan = Plan(**settings)
    plan.settle()
    made = {
        name: Arm(
            name,
            LABELS[name],
            "cache",
            "default",
            TRAIN.get(name, {}),
            {"init": "random"} if name == "random" else {},
        )
        for name in arms
    }
    for arm in (ARMS["a"], *made.values()):  # with its masks, that batches are held against
        prepare(plan, arm)
    for seed, name in product(seeds, arms):
        run_part(plan, made[name], seed)


@benchmark
@comparison_options(list(LABELS), steps=300, out="runs/ablation", room="keeps finished parts")
def main(
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    only_prepare: bool,
    json_path: Path | None,
    plot: Path | None,
    **settings: Any,
) -> None:
    """Students without one loss each, and from random weights, on held-out text."""
    need_paths(**{name: settings[name] for name in ("teacher", "text", "heldout")})
    run_parts(settings, arms, () if only_prepare else seeds)
    if only_prepare:
        return
    out = settings["out"]
    results = finished_parts(out, list(LABELS))
    require(
        any(r["arm"] == FULL for r in results) and len({r["arm"] for r in results}) > 1,
        f"benchmark: {out} must hold {FULL} and another arm to compare; run them too",
    )
    summary = summarise(results)
    publish(out, results, summary, tables, json_path)
    if plot is not None:
        write_bytes(plot, draw(summary, results))


if __name__ == "__main__":
    main()
