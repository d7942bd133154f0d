"""Is a student trained from the cache the student that a live teacher would have made?

The same student, seeds, batches and steps with the teacher beside it and from caches:

    a        teacher live, full distribution, masked positions (weights 5/2/1, T = 2)
    a_all    the same at all positions: the published recipe
    b        the default cache: coded hidden states and 8 exact logits
    b_extra  the same at the masked and a tenth of the other positions, weighted
    c8, c64  the 8 or 64 largest logits alone, the rest as one bucket; no L_cos
    c50      50 draws from the softened distribution alone; no L_cos
    d        no teacher: L_mlm alone

    python -m benchmarks.offline_equals_online --out runs/offline_equals_online

Every (arm, seed) leaves a file and is skipped when it is there; an interrupted training goes on.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks.common import SHARED, BenchmarkCommand, machine_line, need_paths, write_results

NAMES = ("a", "a_all", "b", "b_extra", "c8", "c64", "c50", "d")
_PATH = click.Path(path_type=Path)


def _names(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    wrong = [name for name in names if name not in NAMES]
    if wrong:
        raise click.BadParameter(f"must be among {', '.join(NAMES)}, got {', '.join(wrong)}")
    return names


def _seeds(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"must be whole numbers with commas, got {text!r}")
    return tuple(int(part) for part in parts)


@click.command(
    cls=BenchmarkCommand, context_settings={"show_default": True, "max_content_width": 100}
)
@click.option(
    "--teacher",
    type=_PATH,
    default=SHARED / "teacher",
    show_default="../shared/teacher",
    metavar="FOLDER",
    help="Masked-LM checkpoint in Hugging Face layout.",
)
@click.option(
    "--text",
    type=_PATH,
    default=SHARED / "corpus" / "wiki_train_10MB.txt.xz",
    show_default="../shared/corpus/wiki_train_10MB.txt.xz",
    metavar="FILE",
    help="Training text.",
)
@click.option(
    "--heldout",
    type=_PATH,
    default=SHARED / "corpus" / "wiki_valid_2MB.txt.xz",
    show_default="../shared/corpus/wiki_valid_2MB.txt.xz",
    metavar="FILE",
    help="Text that quality is measured on.",
)
@click.option(
    "--arms",
    callback=_names,
    default=",".join(NAMES),
    metavar="ARM,ARM",
    help="Arms of this part.",
)
@click.option(
    "--seeds", callback=_seeds, default="0,1,2", metavar="N,N", help="Seeds of this part."
)
@click.option("--size", default="3x384", metavar="LAYERSxWIDTH", help="Student.")
@click.option("--steps", default=250, metavar="STEPS", help="Optimizer steps per training.")
@click.option("--batch-size", default=16, metavar="SEQUENCES", help="Sequences per step.")
@click.option("--max-length", default=128, metavar="TOKENS", help="Length of a sequence.")
@click.option("--lr", default=3e-4, metavar="RATE", help="Peak learning rate of AdamW.")
@click.option(
    "--max-bytes",
    default=0,
    show_default="enough that no sequence comes twice",
    metavar="BYTES",
    help="Training text that is read.",
)
@click.option("--heldout-sequences", default=512, metavar="SEQUENCES", help="Of held-out text.")
@click.option("--save-steps", default=125, metavar="STEPS", help="Steps between checkpoints.")
@click.option("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", metavar="TYPE", help="auto, bfloat16 or float32.")
@click.option(
    "--out",
    type=_PATH,
    default=Path("runs/offline_equals_online"),
    metavar="FOLDER",
    help="Work folder; by default about 0.2 GB, and 0.6 GB per training under way.",
)
@click.option("--keep", is_flag=True, help="Keep the trained models.")
@click.option("--prepare", "only_prepare", is_flag=True, help="Make corpus and caches, then stop.")
@click.option("--summary", "only_sum", is_flag=True, help="Train nothing; sum up what is there.")
@click.option("--json", "json_path", type=_PATH, metavar="FILE", help="Write all figures here.")
@click.option(
    "--plot", type=_PATH, metavar="FILE", help="Write loss and agreement by arm here (PNG)."
)
def main(
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    only_prepare: bool,
    only_sum: bool,
    json_path: Path | None,
    plot: Path | None,
    **settings: Any,
) -> None:
    """Students from a live teacher against students from caches, on held-out text.

    Parts may run one after another or side by side (--arms, --seeds; first --prepare). Whichever
    ends last finds all parts done and prints the summary.
    """
    if not only_sum:
        need_paths(**{name: settings[name] for name in ("teacher", "text", "heldout")})
        from benchmarks.arms import ARMS, Plan, prepare, run_part

        plan = Plan(**settings)
        plan.settle()
        for name in dict.fromkeys(("a", *arms)):
            prepare(plan, ARMS[name])
        for seed, name in () if only_prepare else product(seeds, arms):
            run_part(plan, ARMS[name], seed)
    if not only_prepare:
        report(settings["out"], only_sum, json_path, plot)


def report(out: Path, incomplete: bool, json_path: Path | None, plot: Path | None) -> None:
    """Print and write the summary, or say which parts are still to be done."""
    from benchmarks.online_report import draw, summarise, tables
    from data.errors import require
    from data.files import read_json, write_bytes

    results, missing = found_parts(out)
    if missing and not incomplete:
        click.echo(f"still to be done: {', '.join(missing)}", err=True)
        return
    require(bool(results), f"benchmark: {out} must hold a finished part, got none")
    summary = summarise(results)
    machine = machine_line(results[-1]["environment"])
    click.echo(f"{tables(summary)}\n\n{machine}")
    page = f"{tables(summary, markdown=True)}\n\n{machine}\n"
    write_bytes(out / "summary.md", page.encode())
    if json_path is not None:
        shared = read_json(out / "plan.json", "benchmark: plan.json")
        write_results(json_path, {"plan": shared, "summary": summary, "results": results})
    if plot is not None:
        write_bytes(plot, draw(summary, results))


def found_parts(out: Path) -> tuple[list[dict[str, Any]], Sequence[str]]:
    """Results in order of arms and seeds; names of the parts that other arms have and one lacks."""
    from data.files import read_json

    results = [read_json(p, "benchmark: result") for p in (out / "results").glob("*.json")]
    results.sort(key=lambda r: (NAMES.index(r["arm"]), r["seed"]))
    there = {(r["arm"], r["seed"]) for r in results}
    seeds = sorted({seed for _, seed in there})
    missing = [f"{arm}-{seed}" for arm in NAMES for seed in seeds if (arm, seed) not in there]
    return results, missing


if __name__ == "__main__":
    main()
