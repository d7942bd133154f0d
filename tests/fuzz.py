"""Commands in this process, on recipes, teachers and files that are wrong in some way.

    python -m tests.fuzz                     the cases that docs/reliability.md speaks of
    python -m tests.fuzz recipe:17 damage:3  these cases again, each with all that it prints

A case is a name: its kind and a number, which is the seed of all that it draws. It is wrong if a
command ends with a traceback, or refuses in other than one line.

    recipe   one field of the recipe or two, at and past their bounds
    config   one value or two of a teacher's config.json or tokenizer_config.json
    damage   a file of a project that is cut, flipped, emptied, swapped, removed, or other JSON
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tests.builders import random_texts
from tests.command_line import run, write_recipe
from tests.damage import flip
from tests.stages.models.families_support import save_teacher

CASES = {"recipe": 2500, "config": 1500, "damage": 1500}
SECONDS = 3.0
"""CPU time after which a case is stopped: huge sizes are no errors."""
MEMORY = 6 << 30
"""Address space beside what is there at the start; more ends in errors of the allocator."""
TYPES = ("bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert", "xlnet")
SMALL: dict[str, dict[str, Any]] = {
    "teacher": {},
    "student": {"sizes": ["1x32"]},
    "train": {"steps": 2, "batch_size": 4},
    "evaluate": {"sequences": 6, "latency_repeats": 1, "batch_size": 4},
    "tasks": {"names": ["rte"], "data": "nowhere"},
}
NUMBERS = {
    bool: ("true", "false"),
    int: (*map(str, (-1, 0, 1, 2, 3, 5, 8, 64, 300, 65535, 65536, 2**31, 2**32, 2**63, 2**80)),),
    float: (
        "-1.0",
        "0.0",
        "1e-30",
        "0.1",
        "0.5",
        "1.0",
        "2.0",
        "3.0",
        "1e9",
        "1e300",
        "inf",
        "nan",
    ),
}
TEXTS = {
    "device": ("auto", "cpu", "cuda", "cuda:0", "cuda:99999999999", "cuda:", "tpu"),
    "dtype": ("auto", "bfloat16", "float32", "float16"),
    "policy": ("uniform", "smoothed"),
    "positions": ("masked", "all", "masked+0.1", "masked+0", "masked+1", "masked+2", "masked+nan"),
    "logit_positions": ("masked", "all", "masked+0.5"),
    "signal": ("replay", "replay+topk", "replay+residual", "sparse", "replay+head"),
    "packing": ("blocks", "lines"),
    "document": ("blank_line", "line", "file"),
    "on_bad_row": ("stop", "skip"),
    "tokenizer": ("train",),
    "hidden_dtype": ("none", "coded", "float16", "float32"),
    "logits_dtype": ("float16", "uint8", "float32"),
    "family": ("usual", "teacher"),
    "init": ("teacher", "random"),
    "size": ("1x32", "2x16", "tiny", "0x32", "1x33", "99x8", "1x1"),
    "sizes": ("1x32", "5x32", "1x16", "1x64", "tiny", "0x32", "1x33", "1x1", "1x100000000"),
    "names": ("rte", "sst2", "squad", "none"),
    "name": ("p", "q", ".q", "a/b", "a" * 300),
    "text_field": ("text", "a.b"),
    "sources": (
        "docstrings:nothing",
        "hf:nothing:train",
        "memory://nothing/*.txt",
        "*.txt",
        "x://",
    ),
}
"""Values of fields that are texts; to each come ANY, and the paths of the case."""
ANY = ("", " ", "x", "\u0000", "ü" * 90, "../x", "/dev/null", "/proc/1/mem")
WRONG_TYPES = ('"x"', "1", "1.5", "true", "[]", "[1]", '["x"]', "{}", "{a=1}", "1979-05-27")
JSON_VALUES = (None, -1, 0, 1, 2, 3, 7, 1.5, 10**6, 10**30, "", "x", "gelu", True, False, [], [1],
               {}, {"a": 1}, float("nan"), float("inf"), "[MASK]", "float16")  # fmt: skip
BEFORE = {  # what must be there for the part of the recipe to matter
    "": "text", "corpus": "text", "teacher": "text", "masking": "corpus", "cache": "corpus",
    "engine": "corpus", "student": "cache", "train": "cache", "evaluate": "students",
    "tasks": "students",
}  # fmt: skip
STATES = ("text", "corpus", "cache", "students")
MAKES = {"corpus": "corpus", "cache": "teacher-cache", "students": "distill"}
NEXT = {
    "text": (("plan",), ("corpus",), ("teacher-cache",), ("distill",)),
    "corpus": (("plan",), ("teacher-cache",), ("distill",)),
    "cache": (("student-train",), ("distill",), ("plan",)),
    "students": (("evaluate",), ("evaluate", "--tasks", "recipe")),
}
LEFT_OUT = {"teacher.train", "engine.workers", "corpus.workers", "tasks.latency_repeats"}
"""Fields whose values start processes, or that are tried elsewhere."""


class Enough(BaseException):
    """A case has had its time."""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    name: str
    words: list[str]
    code: int
    text: str
    wrong: str
    """Why it is wrong; "": it is not."""


class Fuzz:
    """A tiny project in each state, and cases on copies of it.

    Args:
        home: An empty folder.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(exist_ok=True)
        self.text = home / "text.txt"
        self.text.write_text("\n\n".join(random_texts(40)))
        self.teacher = save_teacher("bert", home / "teacher")
        self._teachers = {"bert": self.teacher}

    def teacher_of(self, kind: str) -> Path:
        """A teacher of a type; made once."""
        if kind not in self._teachers:
            self._teachers[kind] = save_teacher(kind, self.home / f"teacher-{kind}")
        return self._teachers[kind]

    def state(self, name: str) -> Path:
        """The project once it is that far; made once."""
        folder = self.home / f"state-{name}"
        if not folder.is_dir():
            if name == "text":
                folder.mkdir()
            else:
                shutil.copytree(self.state(STATES[STATES.index(name) - 1]), folder)
            recipe = write_recipe(folder / "recipe.toml", self.text, self.teacher, **SMALL)
            if name != "text":
                done = run(MAKES[name], "--recipe", recipe)
                assert done.exit_code == 0, (done.output, done.exception)
        return folder

    def run_case(self, name: str) -> Outcome:
        """Run a case in a folder of its own."""
        kind, _, number = name.partition(":")
        place = self.home / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        draw = random.Random(f"{kind} {number}")
        words = getattr(self, f"_{kind}")(draw, place)
        return self._outcome(name, [str(word) for word in words], place)

    def _project(self, place: Path, state: str, teacher: Path, **sections: Any) -> Path:
        shutil.copytree(self.state(state), place, dirs_exist_ok=True)
        return write_recipe(place / "recipe.toml", self.text, teacher, **{**SMALL, **sections})

    def _recipe(self, draw: random.Random, place: Path) -> list[Any]:
        known = list(_fields())
        chosen = draw.sample(known, draw.choice((1, 2, 2)))
        states = [BEFORE[dotted.rpartition(".")[0].split(".")[0]] for dotted, _ in chosen]
        state = min(states, key=STATES.index)
        recipe = self._project(place, state, self.teacher)
        words = [*draw.choice(NEXT[state]), "--recipe", recipe]
        for dotted, kind in chosen:
            words += ["--set", f"{dotted}={self._value(draw, dotted, kind)}"]
        return words

    def _value(self, draw: random.Random, dotted: str, kind: Any) -> str:
        """A value as ``--set`` takes it."""
        if draw.random() < 0.07:
            return draw.choice(WRONG_TYPES)
        if kind in NUMBERS:
            return draw.choice(NUMBERS[kind])
        if kind is str:
            name = dotted.rpartition(".")[2]
            paths = [self.text, self.teacher, self.home / "nowhere", self.state("text")]
            usual = TEXTS.get(name, ())
            of_any = draw.choice([*ANY, *map(str, paths)])
            return json.dumps(draw.choice([*usual, of_any]))
        item = get_args(kind)[0]
        values = [self._value(draw, dotted, item) for _ in range(draw.choice((0, 1, 1, 2)))]
        return f"[{', '.join(values)}]"

    def _config(self, draw: random.Random, place: Path) -> list[Any]:
        teacher = shutil.copytree(self.teacher_of(draw.choice(TYPES)), place / "teacher")
        path = teacher / draw.choice(("config.json", "config.json", "tokenizer_config.json"))
        values = json.loads(path.read_text())
        others = ("model_type", "is_decoder", "tie_word_embeddings", "chunk_size_feed_forward",
                  "num_labels", "id2label", "attn_implementation", "quantization_config", "dtype",
                  "pad_token_id", "head_dim", "tokenizer_class", "architectures")  # fmt: skip
        for name in draw.sample([*values, *others], draw.choice((1, 2, 2))):
            if draw.random() < 0.1:
                values.pop(name, None)
            else:
                old = values.get(name)
                near = [old + 1, old - 1, 2 * old, -old] if isinstance(old, int) else []
                values[name] = draw.choice([*JSON_VALUES, *near, *near])
        path.write_text(json.dumps(values))
        recipe = self._project(place, "text", teacher)
        return [draw.choice(("plan", "teacher-cache", "distill")), "--recipe", recipe]

    def _damage(self, draw: random.Random, place: Path) -> list[Any]:
        teacher = shutil.copytree(self.teacher, place / "teacher")
        recipe = self._project(place, "students", teacher)
        for _ in range(draw.choice((1, 1, 2))):
            files = sorted(p for p in place.rglob("*") if p.is_file() and "report" not in p.parts)
            weights = [4 if p.suffix in (".json", ".toml") else 1 for p in files]
            _spoil(draw, draw.choices(files, weights)[0], files)
        cache, student = place / "p" / "cache", place / "p" / "students" / "1x32"
        own = ["--recipe", recipe]
        return draw.choice((
            ["plan", *own], ["plan", *own, "--like", cache], ["corpus", *own],
            ["teacher-cache", *own], ["student-train", *own], ["distill", *own],
            ["student-train", *own, "--set", "train.seed=1", "--set", "name=p"],
            ["evaluate", *own], ["inspect", cache], ["inspect", cache, "--block", "0"],
            ["view", cache, "--out", place / "view.html"],
            ["view", cache, "--student", student, "--out", place / "view.html"],
            ["verify", cache], ["verify", cache, "--fast"], ["verify", cache, "--repair"],
            ["verify", cache, "--rerun", "1"], ["publish", cache, f"memory://{draw.random()}/c"],
            ["convert", teacher, place / "converted"], ["convert", student, place / "converted"],
            ["export", student, "--onnx", place / "student.onnx"],
        ))  # fmt: skip

    def _outcome(self, name: str, words: list[str], place: Path) -> Outcome:
        wrong, code, text = "", 0, ""
        with _limited(), contextlib.chdir(place):
            try:
                done = run(*words)
                code, text = done.exit_code, done.stderr
                if done.exception is not None and not isinstance(done.exception, SystemExit):
                    error = done.exception
                    text += "".join(traceback.format_exception(error))
                    at = traceback.extract_tb(error.__traceback__)[-1]
                    wrong = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}"
            except Enough:
                code = -1
        refused = [line for line in text.splitlines() if line.startswith("distilcache: ")]
        if not wrong and "Traceback" in text:
            wrong = "a traceback is printed: " + text.strip().splitlines()[-1][:90]
        if not wrong and code == 2 and len(refused) != 1 and "Error: " not in text:
            wrong = f"{len(refused)} lines of refusal"
        if not wrong and code == 2 and refused and len(text.splitlines()[-1]) > 2000:
            wrong = "a line too long"
        if not wrong and code not in (-1, 0, 2):
            wrong = f"exit code {code}"
        return Outcome(name, words, code, text, wrong)


def _fields(cls: Any = None, where: str = "") -> Iterator[tuple[str, Any]]:
    """All fields of a recipe by dotted names, with their types."""
    from distilcache.pipeline.recipe import Recipe

    cls = cls or Recipe
    hints = get_type_hints(cls)
    for field in fields(cls):
        dotted, kind = f"{where}{field.name}", hints[field.name]
        if dotted in LEFT_OUT or dotted in ("root", "cache_from"):
            continue
        if is_dataclass(kind):
            yield from _fields(kind, f"{dotted}.")
        else:
            yield dotted, kind


def _spoil(draw: random.Random, path: Path, files: list[Path]) -> None:
    """Damage one file."""
    size = path.stat().st_size
    way = draw.choice(("cut", "flip", "empty", "gone", "noise", "folder", "swap", "json", "json"))
    if way == "json" and path.suffix == ".json":
        _spoil_json(draw, path)
    elif way == "cut" or way == "json":
        os.truncate(path, draw.randrange(size) if size else 0)
    elif way == "flip" and size:
        flip(path, draw.randrange(8 * size))
    elif way == "gone":
        path.unlink()
    elif way == "noise":
        path.write_bytes(draw.randbytes(draw.choice((1, 8, 100, 5000))))
    elif way == "folder":
        path.unlink()
        path.mkdir()
    elif way == "swap":
        other = draw.choice([p for p in files if p.suffix == path.suffix and p.is_file()] or [path])
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(b"")


def _spoil_json(draw: random.Random, path: Path) -> None:
    """Put another value in a place of a JSON file, or take one away."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        return
    at = values
    while isinstance(at, dict | list) and at:
        key = draw.choice(sorted(at)) if isinstance(at, dict) else draw.randrange(len(at))
        inner = at[key]  # type: ignore[index]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.2:
            if draw.random() < 0.25:
                del at[key]  # type: ignore[arg-type]
            else:
                at[key] = draw.choice(JSON_VALUES)  # type: ignore[index]
            break
        at = inner
    else:
        values = draw.choice(JSON_VALUES)
    path.write_text(json.dumps(values))


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Stop what takes too long."""

    def stop(*_: Any) -> None:
        raise Enough

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run_all(names: list[str], say: Callable[[Outcome], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder) / "fuzz")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for name in names:
            outcome = fuzz.run_case(name)
            if outcome.wrong:  # Threads of a case that was stopped may print into the next one.
                outcome = fuzz.run_case(name)
            say(outcome)


def main() -> None:
    """Run cases; print those that are wrong, and counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--part", default="0/1", help="which of how many parts of all cases")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    part, parts = map(int, args.part.split("/"))
    every = [f"{kind}:{n}" for n in range(max(CASES.values())) for kind in CASES if n < CASES[kind]]

    counts: Counter[str] = Counter()

    def say(outcome: Outcome) -> None:
        counts[
            f"{outcome.name.partition(':')[0]} {outcome.code}{' !' if outcome.wrong else ''}"
        ] += 1
        if not counts.total() % 100:
            print(counts.total(), dict(counts), flush=True)
        if outcome.wrong or args.names:
            print(f"{outcome.name}: {outcome.wrong or outcome.code}: {outcome.words}", flush=True)
        if args.names:
            print(outcome.text, flush=True)

    run_all(args.names or every[part::parts], say)
    print("all", counts.total(), dict(counts), flush=True)


if __name__ == "__main__":
    main()
