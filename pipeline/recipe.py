"""One TOML recipe describes a whole project; flags override single fields.

A recipe is a tree of frozen dataclasses. TOML tables and ``--set section.field=value`` fill them;
each section checks its own values in ``__post_init__``.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from distilcache.data.errors import UserError, nearest_name, require, require_least
from distilcache.data.masks.masking import MaskingConfig
from distilcache.data.storage.remote import located
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.evaluate.config import EvaluateConfig
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.models.device_names import check_device_name, check_dtype_name
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.teacher_cache.config import CacheConfig, EngineConfig, check_ensemble

T = TypeVar("T")
LARGEST = (1 << 63) - 1
"""As in TOML; infinity and nan are values of no field."""
WORDS = ("student.sizes", "tasks.names", "train.report_to")
"""Fields that may be a text: their values with spaces or commas between."""
RECIPES = Path(__file__).parent / "recipes"
"""Recipes that come with the package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The teacher: an existing checkpoint, or one that the project makes itself."""

    model: str = ""
    """Path or hub id of a masked-LM checkpoint. Empty: a teacher of ``size`` is pre-trained."""
    revision: str = ""
    """Branch, tag or commit of ``model`` on the hub, also for its tokenizer. Empty: the newest. Not
    for a model in a folder."""
    ensemble: tuple[str, ...] = ()
    """Further checkpoints with the tokenizer of ``model``. The cache then holds the mean of all
    their probabilities. Needs ``cache.hidden_dtype="none"``; students need
    ``train.signal="sparse"`` and ``train.alpha_cos=0``."""
    size: str = ""
    """Size (see ``student.sizes``) of the teacher that is trained where ``model`` is empty."""
    rounds: int = 1
    """Maskings of the corpus on which that teacher is pre-trained."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Pre-training of the made teacher: L_mlm alone, without dropout, through stage two on a
    mask-only cache."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.size:
            StudentConfig(sizes=(self.size,))
        require_least("teacher", self, 1, "rounds")
        require(
            bool(self.model) or not self.revision,
            f"teacher: model must be the hub id that revision {self.revision!r} is of, got none; "
            "pass --set teacher.model=ID",
        )
        require(
            bool(self.model) or not self.ensemble,
            "teacher: model must name the first checkpoint of the ensemble, got none with "
            f"{list(self.ensemble)}; pass --set teacher.model=PATH",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole project: corpus, masking, teacher, cache, students, training, evaluation."""

    name: str = "demo"
    """Folder of the project below ``root``. A recipe file without a name is named after the
    file."""
    root: str = "runs"
    """Folder of all projects."""
    needs: str = ""
    """What this recipe needs on the machine; shown where one of its paths is missing."""
    cache_from: str = ""
    """Folder or URL of a finished cache that students read; without a section ``[corpus]`` models
    are measured on held-out text of the corpus beside it. Empty: ``<root>/<name>/cache``."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: str = "auto"
    """Type of matrix products (autocast): ``bfloat16``, ``float32``; ``auto``: bfloat16 where the
    hardware has it and the code of the models runs in it."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)

    def __post_init__(self) -> None:
        """Check what one section alone cannot."""
        require(
            bool(self.name) and "/" not in self.name and not self.name.startswith("."),
            f"recipe: name must be a plain folder name, got {self.name!r}",
        )
        check_device_name(self.device)
        check_dtype_name(self.dtype)
        if self.teacher.ensemble and not self.cache.mask_only:
            check_ensemble(self.cache)

    @property
    def home(self) -> Path:
        """Folder of this project: ``<root>/<name>``."""
        return Path(self.root) / self.name

    @property
    def corpus_dir(self) -> Path:
        """Folder of its corpus."""
        return self.home / "corpus"

    @property
    def has_corpus(self) -> bool:
        """Whether the corpus is made."""
        return (self.corpus_dir / "manifest.json").exists()

    @property
    def finished_cache(self) -> Path | str:
        """The cache that students read: ``cache_from``, or the project's own."""
        return located(self.cache_from or self.home / "cache")

    @property
    def tokenizer(self) -> str:
        """Where the corpus has its tokenizer from: folder, hub id, or ``train``."""
        return self.corpus.tokenizer or self.teacher.model or "train"

    @property
    def tokenizer_revision(self) -> str:
        """The tokenizer's revision on the hub; the teacher's, if it is the teacher's tokenizer."""
        return self.teacher.revision if self.tokenizer == self.teacher.model else ""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for manifests and model cards.

        Engine and tasks are left out: they do not change what is made.
        """
        left_out = ("engine", "tasks")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply ``section.field=value`` overrides.

    Args:
        path: TOML file, or the name of one that comes with the package, such as ``demo``; None:
            all defaults.
        overrides: Texts ``section.field=value``; values read as TOML, else as plain text, lists
            with commas.

    Raises:
        UserError: The file is missing or no TOML, or a key or value does not fit.
    """
    values: dict[str, Any] = {}
    if path is not None:
        path = _recipe_file(Path(path))
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"recipe: {path} must be a readable TOML file, got: {error}") from None
        values.setdefault("name", path.stem)
    return _overridden(values, overrides)


def _recipe_file(path: Path) -> Path:
    named = RECIPES / f"{path}.toml"
    if path.exists() and not path.is_dir():
        return path
    names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
    require(
        named.is_file(),
        f"recipe: file must exist, got {str(path)!r}; pass --recipe FILE, or the name of one that "
        f"comes with the package: {names}",
    )
    return named


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with some fields replaced; texts as in ``load_recipe``."""
    return _overridden(asdict(recipe), overrides)


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    for text in overrides:
        key, separator, raw = text.partition("=")
        *sections, name = key.strip().split(".")
        require(
            bool(separator and name), f"recipe: --set must read section.field=value, got {text!r}"
        )
        value = _read_value(raw)
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            require(isinstance(table, dict), f"recipe: {section} in --set {text!r} is no section")
        table[name] = value if isinstance(value, str | list | dict) else _Typed(raw.strip())
    return _build(Recipe, values, "")


class _Typed(str):
    """A number, truth value or date as it was typed: of a field of text, ``12e3`` is a text."""


def _read_value(raw: str) -> Any:
    """TOML where it is, else plain text."""
    try:
        return tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        return raw.strip()


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Fill dataclass ``cls`` from a TOML table; ``where`` is its dotted name."""
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    filled = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else key
        if key not in hints:
            raise UserError(f"recipe: unknown key {dotted!r}; {nearest_name(key, names)}")
        filled[key] = _convert(hints[key], value, dotted)
    return cls(**filled)


def _convert(kind: Any, value: Any, dotted: str) -> Any:
    """Check one value against its field's type; whole numbers pass as floats, one as a list."""
    if isinstance(value, _Typed):
        texts = kind is str or (get_origin(kind) is tuple and get_args(kind)[0] is str)
        value = str(value) if texts else _read_value(value)
    if is_dataclass(kind):
        require(isinstance(value, Mapping), f"recipe: {dotted} must be a section, got {value!r}")
        return _build(kind, value, dotted)  # type: ignore[arg-type]
    if get_origin(kind) is dict:
        require(isinstance(value, Mapping), f"recipe: {dotted} must be a section, got {value!r}")
        item = get_args(kind)[1]
        if item is Any:
            return {k: _read_value(v) if isinstance(v, _Typed) else v for k, v in value.items()}
        return {name: _convert(item, v, f"{dotted}.{name}") for name, v in value.items()}
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(value, str):
            value = _listed(value, item, dotted)
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, v, dotted) for v in items)
    require(
        not isinstance(value, int | float) or -LARGEST <= value <= LARGEST,
        f"recipe: {dotted} must be a number of at most 64 bits, got {value!r}",
    )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        hint = "; write it in double quotes" if kind is str else ""
        raise UserError(f"recipe: {dotted} must be {names[kind]}, got {value!r}{hint}")
    return value


def _listed(text: str, item: type, dotted: str) -> Any:
    """What a field with a list of items makes of a text."""
    if dotted.removeprefix("teacher.") in WORDS:
        return text.replace(",", " ").split()
    if item is str:
        return [text] if text.strip() else []
    try:
        return tomllib.loads(f"v = [{text}]")["v"]
    except tomllib.TOMLDecodeError:
        raise UserError(
            f"recipe: {dotted} must be numbers with commas between, such as 1,2, got {text!r}"
        ) from None
