"""A student inside its losses, and the batches of a cache that these losses read."""

from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from distilcache.data.cache.cache import Cache
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.models.anatomy import find_head
from distilcache.stages.models.families import shape_of
from distilcache.stages.models.opened import run_norms_first
from distilcache.stages.models.trimmed_ids import TrimmedIds
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.model import DistillationModel
from distilcache.stages.student_train.ranks import ALONE, Ranks
from distilcache.stages.student_train.signals import Signals, relation_heads
from distilcache.stages.student_train.trimming import TrimmedBatches
from distilcache.stages.student_train.vocabulary import sampled_vocabulary
from distilcache.stages.student_train.weights import config_in


def assemble(
    cache: Cache,
    student: PreTrainedModel,
    train: TrainConfig,
    signals: Signals,
    ranks: Ranks = ALONE,
    trimmed: TrimmedIds | None = None,
) -> tuple[DistillationModel, CachedBatches]:
    """The student inside its losses, and the batches that these losses read."""
    return (
        losses_around(student, cache, train, signals, trimmed),
        batches_of(cache, train, signals, ranks, trimmed=trimmed),
    )


def losses_around(
    student: PreTrainedModel,
    cache: Cache,
    train: TrainConfig,
    signals: Signals,
    trimmed: TrimmedIds | None = None,
) -> DistillationModel:
    """The student inside its losses on a cache."""
    run_norms_first(student)
    hidden = cache.encoding.hidden_layer()
    rows = len(student.get_parameter(find_head(student).tensors["decoder.weight"]))
    heads = 0
    if signals.rel:
        teacher = shape_of(config_in(cache.teacher_dir))
        heads = relation_heads(train, teacher, shape_of(student.config))
    lm_head = cache.teacher.lm_head() if signals.replays else None
    kept_n = None if trimmed is None else trimmed.old_n
    if lm_head is not None and kept_n is not None:
        lm_head.keep(torch.from_numpy(kept_n))
    return DistillationModel(
        student,
        train=train,
        signals=signals,
        lm_head=lm_head,
        hidden_decoder=cache.teacher.hidden_decoder() if signals.hidden else None,
        teacher_width=hidden.width if hidden else None,
        relations=cache.teacher.relations() if signals.rel else None,
        relation_heads=heads,
        vocabulary=sampled_vocabulary(cache, rows, train, kept_n),
        kept_n=None if kept_n is None else torch.from_numpy(kept_n),
    )


def batches_of(
    cache: Cache,
    train: TrainConfig,
    signals: Signals,
    ranks: Ranks = ALONE,
    blocks: np.ndarray | None = None,
    trimmed: TrimmedIds | None = None,
) -> CachedBatches:
    """The batches that losses read; of some blocks alone, where these are given."""
    kind = CachedBatches if trimmed is None else partial(TrimmedBatches, trimmed=trimmed)
    return kind(
        cache,
        batch_size=train.batch_size,
        seed=train.seed,
        window_blocks=train.window_blocks,
        signal=signals.ce,
        hidden=signals.hidden,
        relation=signals.rel,
        restrict_ce_to_mask=train.restrict_ce_to_mask,
        streams=train.streams,
        blocks=blocks,
        rank=ranks.rank,
        world=ranks.world,
    )
