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

import click

from benchmarks.ablation_report import FULL, LABELS, draw, summarise, tables
from benchmarks.common import (
    SHARED,
    BenchmarkCommand,
    machine_line,
    need_paths,
    write_results,
)
from data.errors import require
from data.files import read_json, write_bytes

TRAIN = {"no_ce": {"alpha_ce": 0.0}, "no_cos": {"alpha_cos": 0.0}, "no_mlm": {"alpha_mlm": 0.0}}
"""Fields of the recipe section ``[train]`` by arm."""
_PATH = click.Path(path_type=Path)


def run_parts(settings: Mapping[str, Any], arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Train and measure the parts that are not there yet; no seeds: corpus and cache alone."""
    from benchmarks.arms import Arm, Plan, prepare, run_part

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
    for arm in made.values():
        prepare(plan, arm)
    for seed, name in product(seeds, arms):
        run_part(plan, made[name], seed)


def _names(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    wrong = [name for name in names if name not in LABELS]
    if wrong:
        raise click.BadParameter(f"must be among {', '.join(LABELS)}, got {', '.join(wrong)}")
    return names


def _seeds(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"must be whole numbers with commas, got {text!r}")
    return tuple(int(part) for part in parts)


@click.command(cls=BenchmarkCommand, context_settings={"show_default": True})
@click.option("--teacher", type=_PATH, default=SHARED / "teacher", show_default="../shared/teacher")
@click.option(
    "--text",
    type=_PATH,
    default=SHARED / "corpus" / "wiki_train_10MB.txt.xz",
    show_default="../shared/corpus/wiki_train_10MB.txt.xz",
)
@click.option(
    "--heldout",
    type=_PATH,
    default=SHARED / "corpus" / "wiki_valid_2MB.txt.xz",
    show_default="../shared/corpus/wiki_valid_2MB.txt.xz",
)
@click.option("--arms", callback=_names, default=",".join(LABELS), help="Arms of this part.")
@click.option("--seeds", callback=_seeds, default="0,1,2", help="Seeds of this part.")
@click.option("--size", default="3x384", help="Student.")
@click.option("--steps", default=300, help="Optimizer steps per training.")
@click.option("--batch-size", default=16, help="Sequences per step.")
@click.option("--max-length", default=128, help="Tokens per sequence.")
@click.option("--lr", default=3e-4, help="Peak learning rate of AdamW.")
@click.option(
    "--max-bytes", default=0, show_default="no sequence comes twice", help="Training text."
)
@click.option("--heldout-sequences", default=512, help="Of held-out text.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", help="auto, bfloat16 or float32.")
@click.option("--out", type=_PATH, default=Path("runs/ablation"), help="Work folder.")
@click.option("--prepare", "only_prepare", is_flag=True, help="Make corpus and cache, then stop.")
@click.option("--json", "json_path", type=_PATH, help="Write all figures here.")
@click.option("--plot", type=_PATH, help="Write the differences by arm here (PNG).")
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
    results = [read_json(p, "benchmark: result") for p in (out / "results").glob("*.json")]
    results.sort(key=lambda r: (list(LABELS).index(r["arm"]), r["seed"]))
    require(
        any(r["arm"] == FULL for r in results) and len({r["arm"] for r in results}) > 1,
        f"benchmark: {out} must hold {FULL} and another arm to compare; run them too",
    )
    summary = summarise(results)
    machine = machine_line(results[-1]["environment"])
    click.echo(f"{tables(summary)}\n\n{machine}")
    write_bytes(out / "summary.md", f"{tables(summary, markdown=True)}\n\n{machine}\n".encode())
    if json_path is not None:
        shared = read_json(out / "plan.json", "benchmark: plan.json")
        write_results(json_path, {"plan": shared, "summary": summary, "results": results})
    if plot is not None:
        write_bytes(plot, draw(summary, results))


if __name__ == "__main__":
    main()
