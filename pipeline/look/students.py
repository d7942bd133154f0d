"""Predictions of students on the sampled sequences.

Shapes: ``L`` tokens, ``N`` positions of one sequence, ``V`` vocabulary, ``D`` the student's width.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.joined import NEG
from distilcache.data.errors import UserError, require
from distilcache.pipeline.look.sample import Sample
from distilcache.stages.evaluate.masked_lms import ModelEntry, load_model
from distilcache.stages.models.encoder import RowEncoder, own_logits, states_of
from distilcache.stages.models.families import family_of, max_length
from distilcache.stages.models.trimmed_ids import TrimmedIds
from distilcache.stages.student_train.output import require_sound


@dataclass(frozen=True)
class Student:
    """A masked LM on its device."""

    name: str
    role: str
    """``student``, ``control`` or ``teacher``."""
    model: PreTrainedModel
    vocab_size: int | None = None
    """V, the first logits that are used: an embedding may have more rows; None: all."""
    trimmed: TrimmedIds | None = None
    """Its ids, where it has not all of the cache's."""

    @torch.no_grad()
    def answer(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Raw logits [N, V] and last hidden states [N, D] at the sample's positions.

        Ids that it has not get ``NEG``.
        """
        device = next(self.model.parameters()).device
        ids, positions = sample.input_ids.astype("int64"), sample.positions
        if self.trimmed is not None:
            whole = self.trimmed.recut(ids, np.array([len(ids)]), len(ids) ** 2)
            if len(whole.ids) <= (max_length(self.model.config) or len(whole.ids)):
                ids, positions = whole.ids, whole.places_T[positions]
            else:
                ids = self.trimmed.first_pieces(ids)
        ids_1L = torch.from_numpy(ids)[None].to(device)
        rows_N = torch.from_numpy(positions).to(device)
        if family_of(self.model.config).mask == "permutation":
            # In a plain pass every position would see itself.
            logits_NV = own_logits(self.model, ids_1L, None, rows_N)
            hidden_ND = RowEncoder(self.model)(ids_1L, None, rows_N)
        else:
            output = self.model(input_ids=ids_1L, output_hidden_states=True)
            logits_NV, hidden_ND = output.logits[0, rows_N], states_of(output)[-1][0, rows_N]
        logits_NV = logits_NV.float().cpu()
        if self.trimmed is not None:
            wide_NV = torch.full((len(logits_NV), len(self.trimmed.new_V)), NEG)
            wide_NV[:, self.trimmed.old_n] = logits_NV
            logits_NV = wide_NV
        return logits_NV[:, : self.vocab_size], hidden_ND.float().cpu()


def open_student(path: Path, name: str, role: str, cache: Cache, device: torch.device) -> Student:
    """Load a student that has the cache's vocabulary, or a part of it.

    Raises:
        UserError: It is damaged, is no masked LM, or has another vocabulary.
    """
    require_sound(path, "view")
    entry = ModelEntry(name=name, role=role, path=path)
    encoding = cache.encoding
    try:
        model, trimmed = load_model(
            entry, encoding.vocab_size, encoding.max_length, cache.tokenizer_dir
        )
    except UserError as error:
        raise UserError(str(error).replace("evaluate: model", "view: student", 1)) from None
    return Student(name, role, model.to(device), encoding.vocab_size, trimmed)


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
