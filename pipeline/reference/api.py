"""``docs/api.md``: signatures and docstrings of the public names."""

import ast
import re
from collections.abc import Iterator
from typing import Any

from distilcache.pipeline.reference.source import MADE_BY, cell, definition, markdown, notes_of

API = {
    "distilcache": ("open_cache", "build_student", "CachedDistillationTrainer"),
    "distilcache.data.reading": ("OpenCache", "Block"),
    "distilcache.data.cache.cache": ("Cache open encoding teacher_dir num_blocks round_range "
                   "entry read_block lm_head hidden_decoder check_teacher",),
    "distilcache.data.cache.manifest": ("CacheManifest clipped_share",),
    "distilcache.data.cache.schema": ("Encoding hidden_layer sample_temperature token_dtype",
                    "HiddenEncoding column"),
    "distilcache.data.loader.dataset": ("CachedBatches",),
    "distilcache.data.codecs.hidden": ("HiddenDecoder",),
    "distilcache.data.codecs.lm_head": ("LMHead",),
    "distilcache.data.codecs.logits": ("topk_log_probs",),
    "distilcache.data.codecs.joined": ("corrected_log_probs", "substituted_logits"),
}  # fmt: skip
"""Public names by the module that they are imported from; a class with some of its members, or all
that are public."""
DEFINED = {
    "build_student": "distilcache.stages.student_train.notebook",
    "CachedDistillationTrainer": "distilcache.stages.student_train.notebook",
}
"""Where a name is written down, if that is another module."""

PYTHON = """# Python API

For notebooks and scripts. Making caches is left to the command line; reading them and training
from them needs no more than this:

```python
from distilcache import CachedDistillationTrainer, build_student, open_cache

cache = open_cache("runs/demo/cache")
print(cache, cache.totals)
block = cache.block(0)
print(block.text(0), block.top_tokens(k=3, temperature=2.0, rows=slice(5)))

student = build_student(cache, "2x128")
trainer = CachedDistillationTrainer(student, cache, "runs/notebook/2x128", epochs=1, lr=1e-3)
trainer.train()
trainer.save_model()
```

The last folder opens with `AutoModelForMaskedLM.from_pretrained` or `pipeline("fill-mask", ...)`.

Trainer's own settings instead of the recipe's:

```python
from transformers import TrainingArguments

args = TrainingArguments("runs/notebook/cosine", lr_scheduler_type="cosine", max_steps=20)
trainer = CachedDistillationTrainer(build_student(cache, "1x128"), cache, args=args, alpha_mse=0.1)
trainer.train()
```

The teacher's softened distribution as arrays, block by block:

```python
for block in cache.blocks(round=0, as_="numpy"):
    log_probs = block.teacher_log_probs(temperature=2.0, rows=slice(100))  # float32 [100, V]
    sequence, position = block.positions[0]
    print(block.input_ids[sequence, position], log_probs[0].argmax())
    break
```
"""


def api_page() -> str:
    """Signatures and docstrings of the public names."""
    parts = [PYTHON + "\n" + MADE_BY]
    for module, names in API.items():
        parts.append(f"## `{module}`\n")
        for name, *members in map(str.split, names):
            parts += _entry(definition(DEFINED.get(name, module), name), members)
    return "\n".join(parts)


def _entry(node: Any, members: list[str]) -> Iterator[str]:
    """One function, or one class with some of its members, or all that are public."""
    if isinstance(node, ast.FunctionDef):
        yield f"### `{node.name}`\n\n{_described(node, node.name)}"
        return
    own = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    made = (
        f"```text\n{node.name}{_signature(own['__init__'])}\n```\n\n" if "__init__" in own else ""
    )
    yield f"### `{node.name}`\n\n{made}{_documented(node)}"
    listed = [f"- `{name}`: {cell(note)}" for name, note in _fields(node).items()]
    methods = []
    for name, member in own.items():
        if name not in (members or own) or name.startswith("_"):
            continue
        if any(ast.unparse(d) in ("property", "cached_property") for d in member.decorator_list):
            listed.append(f"- `{name}`: {cell(ast.get_docstring(member) or '')}")
        else:
            methods.append(f"#### `{node.name}.{name}`\n\n{_described(member, name)}")
    if listed:
        yield "Attributes:\n\n" + "\n".join(listed) + "\n"
    yield from methods


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """Fields of a dataclass with type and docstring."""
    notes = notes_of(node)
    return (
        {
            field.target.id: f"{ast.unparse(field.annotation)}. {notes.get(field.target.id, '')}"
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        if _is_dataclass(node)
        else {}
    )


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _described(node: ast.FunctionDef, name: str) -> str:
    return f"```text\n{name}{_signature(node)}\n```\n\n{_documented(node)}"


def _signature(node: ast.FunctionDef) -> str:
    """Arguments and result."""
    for part in ast.walk(node.args):
        quoted = getattr(part, "annotation", None)
        if isinstance(quoted, ast.Constant) and isinstance(quoted.value, str):
            part.annotation = ast.Name(quoted.value)  # type: ignore[attr-defined]
    arguments = re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))
    arguments = re.sub(r", _\w+: [^,]*", "", arguments)
    if node.returns is None or node.name == "__init__":
        return f"({arguments})"
    return f"({arguments}) -> {ast.unparse(node.returns).strip(chr(39))}"


def _documented(node: Any) -> str:
    """A docstring in Google style as Markdown."""
    text = ast.get_docstring(node) or ""
    blocks = re.split(r"^(Args|Returns|Raises|Yields):\n", text, flags=re.MULTILINE)
    parts = [markdown(blocks[0].strip())]
    for title, body in zip(blocks[1::2], blocks[2::2], strict=True):
        parts.append(f"{title}:\n\n{_items(body) if title != 'Returns' else _prose(body)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _items(body: str) -> str:
    """``name: text`` entries as a list; other text as it is."""
    entries = re.split(r"\n(?= {4}\S)", body.rstrip())
    lines = []
    for entry in entries:
        words = " ".join(entry.split())
        name, colon, rest = words.partition(": ")
        named = bool(colon) and re.fullmatch(r"\*{0,2}\w+", name)
        lines.append(f"- `{name}`: {markdown(rest)}" if named else f"- {markdown(words)}")
    return "\n".join(lines)


def _prose(body: str) -> str:
    return markdown(" ".join(body.split()))
