"""A model as a function of tensors to tensors, which export writes and compares."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilcache.data.errors import require

TIMED = (64, 21)
"""Tokens of the sequence that is timed, and passes; the first does not count."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """A model as a function of some tensors to some."""

    model: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    classes: int | None
    """Axis of the outputs along which the largest is chosen; None: nothing is chosen."""
    by_token: bool
    """Whether outputs have a position axis, where padding does not count."""

    @property
    def timed_tokens(self) -> int:
        """Tokens of the sequence that is timed."""
        return min(TIMED[0], self.positions)

    @property
    def positions(self) -> int:
        """Tokens that the model reads at most."""
        from distilcache.stages.models.families import max_length

        return max_length(self.model.config) or 2**31

    def batch(self, size: int, length: int) -> tuple[Any, ...]:
        """Random tokens, mask and types; the last sequence ends early."""
        import torch

        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        length = min(length, self.positions)
        ids = torch.randint(vocabulary, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        if size > 1:
            mask[-1, length // 2 :] = 0
        types = (torch.arange(length) >= length // 2).long().expand(size, -1).contiguous()
        return (ids, mask, types)[: len(self.inputs)]

    def own(self, tensors: Sequence[Any]) -> list[Any]:
        """The model's own outputs."""
        import torch

        with torch.no_grad():
            out = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return [out[name] for name in self.outputs]

    def ask(self, session: Any, tensors: Sequence[Any]) -> list[Any]:
        """The outputs of ONNX Runtime."""
        import torch

        given = {n: t.numpy() for n, t in zip(self.inputs, tensors, strict=True)}
        return [torch.from_numpy(found) for found in session.run(list(self.outputs), given)]

    def latency(self, run: Any) -> float:
        """Median time of one sequence, in milliseconds."""
        inputs, seconds = self.batch(1, self.timed_tokens), []
        for _ in range(TIMED[1]):
            begun = time.perf_counter()
            run(inputs)
            seconds.append(time.perf_counter() - begun)
        return 1e3 * sorted(seconds[1:])[len(seconds) // 2]


def open_graph(folder: Path, features: bool = False) -> Graph:
    """The model of a masked LM or task model in float32; with ``features`` without its head.

    Raises:
        UserError: It is damaged, cannot be read, or takes other inputs.
    """
    from distilcache.stages.evaluate.tasks.catalogue import SPAN, TAGS
    from distilcache.stages.evaluate.tasks.task_models import read_model, takes_types
    from distilcache.stages.student_train.output import require_sound

    require_sound(folder, "export")
    model, kind = read_model(folder, "export: student")
    require(
        kind is not None or model.config.model_type != "xlnet",
        f"export: student must take token ids and their mask alone, got an XLNet from {folder}, "
        "which needs permutation masks; run it with transformers",
    )
    typed = takes_types(model) and _gives_types(folder, otherwise=kind is not None)
    inputs = INPUTS[:3] if typed else INPUTS[:2]
    classes: int | None = -1
    outputs: tuple[str, ...] = ("logits",)
    by_token = features or kind in (None, TAGS)
    if features:
        model, outputs, classes = model.base_model, ("last_hidden_state",), None
    elif kind == SPAN:
        outputs = ("start_logits", "end_logits")
    elif kind is not None and model.config.num_labels == 1:
        classes = None
    return Graph(model=model, inputs=inputs, outputs=outputs, classes=classes, by_token=by_token)


def _gives_types(folder: Path, *, otherwise: bool) -> bool:
    """Whether the model's tokenizer tells the texts of a pair apart; RoBERTa's never does.

    ``otherwise`` is the answer where there is none.
    """
    from transformers import AutoTokenizer

    from distilcache.stages.models.hub import quiet

    try:
        with quiet():
            names = AutoTokenizer.from_pretrained(folder, local_files_only=True).model_input_names
    except Exception:  # there is none, or one that only its library opens
        return otherwise
    return "token_type_ids" in names
