"""A job: one task, model and seed; what it leaves, and whether it is done.

::

    <home>/tasks/rte/teacher-seed0.json           figures of one finished run
    <home>/tasks/rte/teacher-seed0.safetensors    its logits for the training examples
    <home>/tasks/rte/teacher-seed0.states.safetensors   its [CLS] states, if distil_cos > 0
    <home>/tasks/rte/copies.safetensors           altered copies of these, if distil_copies > 0
    <home>/tasks/rte/3x384+distil-seed0.json      a student that learned from these files
    <home>/tasks/rte/3x384+distil-seed0/          its model, if keep names the seed
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distilcache.data.storage.files import files_fault
from distilcache.stages.evaluate.tasks.altered import Copies
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import TaskData
from distilcache.stages.evaluate.tasks.finetune import steps_of
from distilcache.stages.evaluate.tasks.task_models import Candidate
from distilcache.stages.evaluate.tasks.tensors import has_tensor, read_tensor
from distilcache.stages.models.trimmed_ids import TrimmedIds

DISTIL = "+distil"
KEPT = "kept"
"""Of a run's figures: the hashes of its model's files."""
LOGITS = "logits"
"""Name of the tensor with a teacher's logits."""
STATES = "states"
"""Name of the tensor with a teacher's final hidden states of [CLS]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One fine-tuning."""

    data: TaskData
    model: Candidate
    seed: int
    max_length: int
    longer: str
    """What lets longer texts in."""
    key: str
    """Hash of everything that its figures depend on."""
    path: Path
    """File of its figures."""
    soft_from: "Job | None" = None
    """The teacher's job whose logits it learns from."""
    gives_soft: bool = False
    """Whether others learn from its logits."""
    has_states: bool = False
    """Whether hidden states are learned from as well as logits."""
    copies: Copies | None = None
    """Altered copies of the examples, which are learned from as well."""
    trimmed: TrimmedIds | None = None
    """The model's ids, if they are a part of the teacher's, which the copies are in."""
    keeps: bool = False
    """Whether its model is kept."""

    @property
    def name(self) -> str:
        """Name of its row in the table."""
        return self.model.entry.name + (DISTIL if self.soft_from else "")

    @property
    def label(self) -> str:
        """Name of the run for people."""
        return f"{self.data.task.name}: {self.name} seed {self.seed}"

    def steps(self, examples: int, config: TasksConfig) -> int:
        """Optimizer steps with that many training examples."""
        return steps_of(examples, config, distilled=self.soft_from is not None)

    @property
    def soft_path(self) -> Path:
        """File of its logits."""
        return self.path.with_suffix(".safetensors")

    @property
    def states_path(self) -> Path:
        """File of its hidden states."""
        return self.path.with_suffix(".states.safetensors")

    @property
    def soft_key(self) -> str:
        """Hash of everything that its logits and states depend on."""
        return f"{self.key}:{self.copies.key}" if self.copies else self.key

    @property
    def kept_path(self) -> Path:
        """Folder of its model."""
        return self.path.with_suffix("")

    def soft(self) -> Tensor | None:
        """Its logits of the examples and their copies; None: not yet made."""
        return read_tensor(self.soft_path, LOGITS, self.soft_key)

    def states(self) -> Tensor | None:
        """Its states of the examples and their copies; None: not yet made."""
        return read_tensor(self.states_path, STATES, self.soft_key)

    def result(self) -> dict[str, Any] | None:
        """Its figures; None: not yet run, or files that it leaves are missing or damaged."""
        try:
            found: dict[str, Any] = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("key") != self.key:
            return None
        if self.keeps and files_fault(self.kept_path, found.get(KEPT)):
            return None
        wanted = [self.soft_path] if self.gives_soft else []
        wanted += [self.states_path] if self.gives_soft and self.has_states else []
        return found if all(has_tensor(path, self.soft_key) for path in wanted) else None
