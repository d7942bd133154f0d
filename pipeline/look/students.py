"""Predictions of students on the sampled sequences.

Shapes: ``L`` tokens, ``N`` positions of one sequence, ``V`` vocabulary, ``D`` the student's width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError, require
from distilcache.pipeline.look.sample import Sample
from distilcache.stages.evaluate.masked_lms import ModelEntry, load_model
from distilcache.stages.models.encoder import RowEncoder, own_logits, states_of
from distilcache.stages.models.families import family_of
from distilcache.stages.student_train.output import require_sound


@dataclass(frozen=True)
class Student:
    """A masked LM on its device."""

    name: str
    role: str
    """``student``, ``control`` or ``teacher``."""
    model: nn.Module
    vocab_size: int | None = None
    """V, the first logits that are used: an embedding may have more rows; None: all."""

    @property
    def parameters(self) -> int:
        """Weights, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @torch.no_grad()
    def answer(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Raw logits [N, V] and last hidden states [N, D] at the sample's positions."""
        device = next(self.model.parameters()).device
        ids_1L = torch.from_numpy(sample.input_ids.astype("int64"))[None].to(device)
        rows_N = torch.from_numpy(sample.positions).to(device)
        if family_of(self.model.config).mask == "permutation":
            # In a plain pass every position would see itself.
            logits_NV = own_logits(self.model, ids_1L, None, rows_N)
            hidden_ND = RowEncoder(self.model)(ids_1L, None, rows_N)
        else:
            output = self.model(input_ids=ids_1L, output_hidden_states=True)
            logits_NV, hidden_ND = output.logits[0, rows_N], states_of(output)[-1][0, rows_N]
        return logits_NV[:, : self.vocab_size].float().cpu(), hidden_ND.float().cpu()


def open_student(path: Path, name: str, role: str, cache: Cache, device: torch.device) -> Student:
    """Load a student that has the cache's vocabulary.

    Raises:
        UserError: It is damaged, is no masked LM, or has another vocabulary.
    """
    require_sound(path, "view")
    entry = ModelEntry(name=name, role=role, path=path)
    encoding = cache.encoding
    try:
        model = load_model(entry, encoding.vocab_size, encoding.max_length)
    except UserError as error:
        raise UserError(str(error).replace("evaluate: model", "view: student", 1)) from None
    return Student(name, role, model.to(device), encoding.vocab_size)


def name_students(paths: list[Path]) -> list[str]:
    """Folder names, with parents where two folders have the same name.

    Raises:
        UserError: The same folder twice.
    """
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        require(
            path not in resolved[:number],
            f"view: --student must name each folder once, got {paths[number]} twice",
        )
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in resolved]
