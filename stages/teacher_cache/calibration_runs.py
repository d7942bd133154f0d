"""Runs of the teacher over blocks of the whole corpus, whose states a codec is fitted to."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.codecs.relations import RelationMaps
from distilcache.data.progress import Bar
from distilcache.stages.models.families import shape_of
from distilcache.stages.teacher_cache.batches import SignalBlock
from distilcache.stages.teacher_cache.calibrate import calibrate
from distilcache.stages.teacher_cache.calibrate_relations import Texts, calibrate_relations
from distilcache.stages.teacher_cache.columns import block_states, check_finite
from distilcache.stages.teacher_cache.config import work_sizes
from distilcache.stages.teacher_cache.console import say
from distilcache.stages.teacher_cache.room import in_room
from distilcache.stages.teacher_cache.task import Plan, PreparedBlock, prepare_block

CALIBRATION_LOGITS = 2**27
"""Logits at a time, half a gigabyte: a GPU would take 4,096 rows of any vocabulary."""
POSITIONS_PER_UNIT = 4
"""Calibration positions per hidden unit: of fewer, a codec fits those and misses others (of 0.4 per
unit, the error at others was three times what was asked for)."""


def codec_of_layer(plan: Plan, layer: int) -> HiddenCodec:
    """Run the teacher over blocks spread over the corpus and fit the codec of one layer."""
    assert plan.teacher is not None
    (teacher,) = plan.teacher.members  # of several averaged teachers no hidden states are stored
    parts: list[torch.Tensor] = []
    sequences = dict[int, int]()
    config = plan.config
    for prepared in _calibration_blocks(plan, lambda placed: len(placed.hidden_rows)):
        states, config = in_room(
            plan, prepared, config, lambda inputs, _: block_states(teacher, inputs, (layer,))
        )
        assert prepared.inputs is not None
        wanted_rows = prepared.inputs.hidden_index
        parts.append(states.hidden[0][slice(None) if wanted_rows is None else wanted_rows])
        sequences[prepared.block] = len(prepared.placed.lengths)
    hidden_ND = torch.cat(parts)
    check_finite(bool(hidden_ND.isfinite().all()), layer)
    what = f"layer {layer}"
    with _calibrating(what, sum(sequences.values())) as progress:
        return calibrate(
            hidden_ND,
            teacher.lm_head if layer == teacher.num_layers else None,
            plan.config.temperatures or (1.0,),
            plan.config.hidden_quality,
            # Not the recipe's row_chunk: the order of a sum depends on it.
            min(work_sizes(teacher.device.type)[1], CALIBRATION_LOGITS // plan.encoding.vocab_size),
            progress=progress,
            what=what,
        )


def codec_of_relations(plan: Plan) -> HiddenCodec:
    """Run the teacher over blocks spread over the corpus and fit the codec of its relations."""
    assert plan.teacher is not None
    (teacher,) = plan.teacher.members
    assert teacher.relation is not None
    read: list[torch.Tensor] = []
    embedded: list[torch.Tensor] = []
    sequences = dict[int, int]()
    config = plan.config
    for prepared in _calibration_blocks(plan, lambda placed: int(placed.lengths.sum())):
        states, config = in_room(
            plan, prepared, config, lambda inputs, _: block_states(teacher, inputs, ())
        )
        assert states.read is not None
        assert states.embedded is not None
        lengths = prepared.placed.lengths.astype(np.int64).tolist()
        read += torch.split(states.read, lengths)
        embedded += torch.split(states.embedded, lengths)
        sequences[prepared.block] = len(lengths)
    layer = teacher.relation.layer
    check_finite(all(bool(x.isfinite().all()) for x in read), layer - 1)
    tensors = {role: teacher.model.get_parameter(n) for role, n in teacher.relation.tensors.items()}
    heads = shape_of(teacher.model.config).heads
    what = f"the relations of layer {layer}"
    with _calibrating(what, sum(sequences.values())) as progress:
        return calibrate_relations(
            Texts(read, embedded),
            RelationMaps(tensors),
            heads,
            plan.config.relation_quality,
            progress,
            what,
        )


def _calibration_blocks(
    plan: Plan, positions: Callable[[SignalBlock], int]
) -> Iterator[PreparedBlock]:
    """Masked blocks to calibrate with: some of round 0, spread over the corpus.

    Where these have few ``positions``, its other blocks follow, and then all of them in further
    rounds, even of those that the recipe has not: so the codec is the same for any number of them.
    """
    assert plan.teacher is not None
    split = plan.corpus.split("train")
    wanted = min(plan.config.calibration_sequences, int(split.block_sequences.sum()))
    # At least two blocks, evenly spaced: one source may not be like the others.
    count = min(split.num_blocks, max(2, -(-wanted // int(split.block_sequences.max()))))
    chosen = np.arange(count) * split.num_blocks // count
    others = np.setdiff1d(np.arange(split.num_blocks), chosen)
    found, enough = 0, POSITIONS_PER_UNIT * plan.teacher.width
    for round_index in itertools.count():
        before = found
        for place, block in enumerate((*chosen.tolist(), *others.tolist())):
            if found >= enough and (round_index > 0 or place >= count):
                return
            prepared = prepare_block(plan, round_index, block)
            found += positions(prepared.placed)
            yield prepared
        if found == before:
            return  # nothing to mask


@contextlib.contextmanager
def _calibrating(what: str, sequences: int) -> Iterator[Callable[[float], Any]]:
    """Say that it begins, and show how far it is."""
    say(f"calibrating the codec of {what} on {sequences} sequences")
    # No rate: the teacher's, which is shown next, is another.
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with _one_thread(), Bar(total=1.0, desc="calibrating", bar_format=form) as bar:
        yield bar.update


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Calibrate in one thread: on a CPU the order of a sum depends on the number of threads.

    The bytes of the shards do not (measured).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
