"""Several teachers of one vocabulary, averaged into one.

Shapes: ``B`` sequences, ``L`` positions, ``N`` chosen positions, ``V`` vocabulary, ``D`` hidden
widths of all members together.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distilcache.data.codecs.lm_head_spec import LMHeadSpec
from distilcache.stages.models.families import SILENT_FIELDS
from distilcache.stages.teacher_cache.fit import check_one_vocabulary
from distilcache.stages.teacher_cache.teacher import Teacher, load_teacher, saved_lm_head_spec


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Teachers whose distributions are averaged.

    With the logits z_m of M members, a position's target is the mean of their probabilities at
    T = 1. Its log is stored as a single teacher's logits would be::

        logits = log p,   p = 1/M sum_m softmax(z_m)

    So the logsumexp of these logits at T = 1 is 0. The softened target at T is
    ``softmax(logits / T)``, as with one teacher. That is p^(1/T), normalised; it is not the mean of
    the members' softened distributions. No hidden state gives an average of distributions, so the
    cache holds logits and draws, and nothing is replayed.
    """

    members: tuple[Teacher, ...]
    """Two or more; the first is the one whose checkpoint the cache keeps."""

    @property
    def relation(self) -> None:
        """Several teachers have no relations in common."""

    @property
    def device(self) -> torch.device:
        """The device that all of them run on."""
        return self.members[0].device

    @property
    def num_layers(self) -> int:
        """Number of the first member's layers, which stands for every member's last layer."""
        return self.members[0].num_layers

    @property
    def width(self) -> int:
        """Hidden widths of all members together, D."""
        return sum(member.width for member in self.members)

    @property
    def vocab_size(self) -> int:
        """Number of logits V."""
        return self.members[0].vocab_size

    def encode(
        self,
        ids_BL: torch.Tensor,
        attention_BL: torch.Tensor | None,
        layers: tuple[int, ...],
        rows_N: torch.Tensor | None = None,
        most: int = 0,
    ) -> list[torch.Tensor]:
        """Last hidden states of all members side by side, float32 [N, D] or [B, L, D].

        Arguments are those of :meth:`Teacher.encode`; ``layers`` is the last one alone.
        """
        assert layers == (self.num_layers,), "an ensemble has no inner layers"
        states = [
            member.encode(ids_BL, attention_BL, (member.num_layers,), rows_N, most)[0].float()
            for member in self.members
        ]
        return [torch.cat(states, -1)]

    @torch.no_grad()
    def transform(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The states as they are: :meth:`decode` runs each member's whole LM head."""
        return hidden_ND

    @torch.no_grad()
    def decode(self, hidden_ND: torch.Tensor, precise: bool = False) -> torch.Tensor:
        """Log of the mean probabilities, float32 [N, V].

        LM heads run in float32 whether ``precise`` or not: a log probability that was rounded to a
        shorter type could not be corrected later without the sums of all members.
        """
        total_NV: torch.Tensor | None = None
        parts = torch.split(hidden_ND, [member.width for member in self.members], -1)
        for member, own_ND in zip(self.members, parts, strict=True):
            logits_NV = member.decode(member.transform(own_ND), precise=True)
            log_p_NV = logits_NV.log_softmax(-1)
            total_NV = log_p_NV if total_NV is None else torch.logaddexp(total_NV, log_p_NV)
        assert total_NV is not None
        return total_NV.sub_(math.log(len(self.members)))

    def decode_at(self, hidden_ND: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        """Log of the mean probabilities [N, K] of some tokens per row, float32."""
        return self.decode(hidden_ND).gather(-1, ids_NK)


AnyTeacher = Teacher | Ensemble


def load_teachers(
    named: Sequence[tuple[str, str]], device: torch.device, dtype: torch.dtype, needs: str
) -> AnyTeacher:
    """Load one teacher, or several that are averaged, by names and revisions on the hub.

    See :func:`load_teacher`.

    Raises:
        UserError: One cannot be loaded, or their vocabularies are of different sizes.
    """
    members = tuple(load_teacher(name, device, dtype, needs, own) for name, own in named)
    check_one_vocabulary({n: m.vocab_size for (n, _), m in zip(named, members, strict=True)})
    return members[0] if len(members) == 1 else Ensemble(members)


def others_sha256(teacher: AnyTeacher | None) -> list[str]:
    """Hashes of the models whose checkpoints are not in the cache: weights and configuration."""
    return [_model_sha256(member.model) for member in (teacher.members if teacher else ())[1:]]


def lm_head_to_keep(teacher: AnyTeacher | None, checkpoint: Path) -> LMHeadSpec | None:
    """The LM head that replays logits from the cache; None for several averaged teachers."""
    if teacher is None or len(teacher.members) > 1:
        return None
    return saved_lm_head_spec(teacher.members[0], checkpoint)


def _model_sha256(model: Any) -> str:
    """Hash of all tensors by name, and of the configuration where it is not the default.

    It does not depend on the files of a checkpoint, or on fields that a new library version adds.
    """
    changed = model.config.to_diff_dict().items()
    config = {name: value for name, value in changed if name not in SILENT_FIELDS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
