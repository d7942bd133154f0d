"""The arms of ``stage_two.py``: six ways to train the same student on the same batches.

Shapes: ``B`` sequences, ``L`` positions, ``N`` positions of both models' logits, ``V`` vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.live import assemble_live, masked_batches
from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.models.device import autocast
from distilcache.stages.student_train.assembly import assemble
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.model import TERMS, DistillationModel
from distilcache.stages.student_train.signals import Signals, required_signals
from distilcache.stages.student_train.student import build_student
from distilcache.stages.student_train.targets import FullTarget
from distilcache.stages.student_train.trainer import Batches
from distilcache.stages.student_train.vocabulary import sample_size
from distilcache.stages.teacher_cache.teacher import Teacher

Arm = tuple[nn.Module, Batches]
IN_MEMORY = 4
"""Batches with targets in memory."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms of one student share."""

    cache: Cache
    teacher: Teacher
    size: str
    train: TrainConfig

    def student(self) -> Any:
        """A fresh student."""
        return build_student(
            size=self.size,
            student=StudentConfig(sizes=(self.size,)),
            seed=0,
            encoding=self.cache.encoding,
            teacher_dir=self.cache.teacher_dir,
        )


class ReferenceStep(nn.Module):
    """The step of DistilBERT's published training code: dense losses at all positions.

    The student is transformers' own, without our attention and dropout.
    """

    accepts_loss_kwargs = True
    vocabulary = None

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.student = setting.student()
        self.train_config = setting.train
        width, theirs = self.student.config.dim, setting.teacher.width
        self.projection: nn.Module = nn.Linear(width, theirs) if width != theirs else nn.Identity()
        self._teacher = [setting.teacher]  # in a list: not a part of the trained model

    def trained_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint would hold."""
        return {n: p.detach() for n, p in self.named_parameters()}

    def forward(
        self, batch: Mapping[str, Tensor], counts: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """L_ce, L_mlm and L_cos, weighted."""
        train, teacher = self.train_config, self._teacher[0]
        ids_BL = batch["input_ids"]
        with torch.no_grad(), autocast(teacher.device, teacher.dtype):
            theirs = teacher.model(input_ids=ids_BL, output_hidden_states=True)
        mine = self.student(input_ids=ids_BL, output_hidden_states=True)
        student_NV, teacher_NV = (x.logits.flatten(0, 1) for x in (mine, theirs))
        ce = functional.kl_div(
            functional.log_softmax(student_NV / train.temperature, dim=-1),
            functional.softmax(teacher_NV / train.temperature, dim=-1),
            reduction="batchmean",
        )
        labels = torch.full_like(ids_BL.flatten(), -100)
        labels[batch["masked_index"]] = batch["labels"]
        mlm = functional.cross_entropy(student_NV, labels, ignore_index=-100)
        own = self.projection(mine.hidden_states[-1].flatten(0, 1))
        cos = functional.cosine_embedding_loss(
            own, theirs.hidden_states[-1].flatten(0, 1), own.new_ones(len(own))
        )
        found = {"ce": ce * train.temperature**2, "mlm": mlm, "cos": cos}
        terms = torch.stack([found.get(term, torch.zeros_like(cos)) for term in TERMS])
        weights = terms.new_tensor([getattr(train, f"alpha_{term}") for term in TERMS])
        return (terms * weights).sum(), terms.detach()


@dataclass(frozen=True, slots=True)
class StoredTarget(FullTarget):
    """Logits that lie in memory, [N, V], in place of replayed ones."""

    logits_NV: Tensor | None = None

    def products(self, chunk: slice, product: torch.dtype) -> Tensor:
        """Some of their rows."""
        assert self.logits_NV is not None
        return self.logits_NV[chunk].to(product, copy=True)


class StoredTargets(DistillationModel):
    """Our losses against random distributions and hidden states in memory."""

    def _target(self, batch: Mapping[str, Tensor], teacher_HD: Tensor | None) -> FullTarget:
        nothing = batch["logits"].new_zeros(0)
        bias_V = batch["logits"].new_zeros(batch["logits"].shape[1], dtype=torch.float32)
        return StoredTarget(nothing, nothing, bias_V, logits_NV=batch["logits"])


class MemoryBatches:
    """Batches that were made before the clock runs, with random targets.

    Args:
        batches: Where ids and masked positions come from.
        count: How many are made; they come round again.
        width: Of the teacher's hidden states; 0: no targets at all.
        vocabulary: Of its logits, bfloat16 as a bound on the memory.
        device: Where the targets lie: no step waits for them to come over.
    """

    def __init__(
        self,
        batches: CachedBatches,
        count: int,
        width: int = 0,
        vocabulary: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.steps_per_epoch = batches.steps_per_epoch
        self.stop: int | None = None
        generator = torch.Generator().manual_seed(0)
        self.made = []
        for k in range(count):
            batch = batches[k]
            if width:
                index = batch["ce_index"] = batch["hidden_index"] = batch["masked_index"]
                hidden_ND = torch.randn(len(index), width, generator=generator)
                logits_NV = torch.randn(len(index), vocabulary, generator=generator)
                batch["hidden_random"] = hidden_ND.to(device)
                batch["logits"] = logits_NV.bfloat16().to(device)
            self.made.append(batch)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        """One of them."""
        return dict(self.made[k % len(self.made)])


def reference(setting: Setting) -> Arm:
    """Teacher and student with full LM heads at all positions, as published."""
    return ReferenceStep(setting), masked_batches(setting.cache, setting.train)


def live(setting: Setting) -> Arm:
    """The teacher beside the student, our losses at masked positions, the whole vocabulary."""
    train = replace(setting.train, signal="replay", vocabulary_fraction=1.0)
    return assemble_live(setting.cache, setting.student(), setting.teacher, train)


def memory(setting: Setting) -> Arm:
    """The same losses against random distributions that lie in memory: no cache, no replay."""
    module = StoredTargets(
        setting.student(),
        train=replace(setting.train, signal="replay"),
        signals=Signals("replay", True),
        hidden_decoder=HiddenDecoder("hidden_random"),
        teacher_width=setting.teacher.width,
    )
    shape = (setting.teacher.width, setting.cache.encoding.vocab_size)
    batches = masked_batches(setting.cache, setting.train)
    return module, MemoryBatches(batches, IN_MEMORY, *shape, setting.teacher.device)


def mlm(setting: Setting) -> Arm:
    """Masked language modelling of the same student: no teacher in any form."""
    train = replace(setting.train, alpha_ce=0.0, alpha_cos=0.0)
    module = DistillationModel(setting.student(), train=train, signals=Signals(None, False))
    return module, MemoryBatches(masked_batches(setting.cache, train), IN_MEMORY)


def full(setting: Setting) -> Arm:
    """From shards, each step over the whole vocabulary."""
    return ours(replace(setting, train=replace(setting.train, vocabulary_fraction=1.0)))


def ours(setting: Setting) -> Arm:
    """From shards: read, decode, replay."""
    signals = required_signals(setting.cache.encoding, setting.train)
    return assemble(setting.cache, setting.student(), setting.train, signals)


ARMS: dict[str, Callable[[Setting], Arm]] = {
    "reference": reference,
    "live": live,
    "memory": memory,
    "mlm": mlm,
    "full": full,
    "ours": ours,
}


def multiply_adds(setting: Setting, tokens: int, rows: int, length: int) -> dict[str, float]:
    """Multiply-adds of one step of each arm, from the shapes alone.

    A backward pass takes two products for each one of the forward pass. A layer is
    ``4 D^2 + 2 D F + 2 L D`` a token, of which ``D^2 + 2 D F`` fall on the masked positions alone
    in the last layer (not in the published step); a head is ``D^2 + D V`` a row. Replay is the
    teacher's head at the masked positions, forward only. In ``ours`` V is the tokens of a step.

    Args:
        setting: Teacher and student.
        tokens: B L.
        rows: Masked positions N.
        length: L.
    """
    student, teacher = setting.student().config, setting.teacher.model.config
    vocabulary = setting.cache.encoding.vocab_size

    def layers(count: int, width: int, ffn: int) -> float:
        return tokens * count * width * (4 * width + 2 * ffn + 2 * length)

    def spared(width: int, ffn: int) -> float:
        return (tokens - rows) * width * (width + 2 * ffn)

    def head(width: int, tokens: int) -> float:
        return width * (width + tokens)

    my_shape = (student.dim, student.hidden_dim)
    their_shape = (teacher.hidden_size, teacher.intermediate_size)
    body = layers(student.n_layers, *my_shape)
    theirs = layers(teacher.num_hidden_layers, *their_shape)

    def from_cache(tokens: int) -> float:
        replay = head(teacher.hidden_size, tokens)
        return 3 * (body - spared(*my_shape) + rows * head(student.dim, tokens)) + rows * replay

    mine, replay = head(student.dim, vocabulary), head(teacher.hidden_size, vocabulary)
    plain = 3 * (body - spared(*my_shape) + rows * mine)
    return {
        "reference": 3 * (body + tokens * mine) + theirs + tokens * replay,
        "live": plain + theirs - spared(*their_shape) + rows * replay,
        "memory": plain,
        "mlm": plain,
        "full": from_cache(vocabulary),
        "ours": from_cache(sample_size(vocabulary, setting.train.vocabulary_fraction)),
    }
