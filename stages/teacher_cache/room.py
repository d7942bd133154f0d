"""Work of stage one on a device, in batches for which that has memory."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from distilcache.data.errors import UserError
from distilcache.stages.models.device import out_of_memory
from distilcache.stages.teacher_cache.batches import BlockInputs, block_inputs
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.task import Plan, PreparedBlock

T = TypeVar("T")


def in_room(
    plan: Plan,
    prepared: PreparedBlock,
    config: CacheConfig,
    run: Callable[[BlockInputs, CacheConfig], T],
) -> tuple[T, CacheConfig]:
    """What ``run`` makes of a block, and the sizes for which the device had memory.

    Args:
        plan: Of the cache.
        prepared: The block.
        config: Sizes to begin with; the plan's, or what this has returned before.
        run: Runs the teacher over a block's batches, with these sizes.

    Raises:
        UserError: There is no room for one sequence.
    """
    inputs = prepared.inputs
    assert inputs is not None
    assert plan.teacher is not None
    while True:
        if config is not plan.config:
            device = plan.teacher.device
            inputs = block_inputs(prepared.placed, plan.encoding, config.batch_tokens, device)
        try:
            return run(inputs, config), config
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        config = _smaller(plan, config)  # here no frame of the failed call keeps tensors alive


def _smaller(plan: Plan, config: CacheConfig) -> CacheConfig:
    """Sizes of half the work at a time.

    Raises:
        UserError: It is one sequence already.
    """
    least = plan.corpus.manifest.max_length
    if config.batch_tokens <= least and config.row_chunk <= least:
        raise UserError(
            f"teacher: device must have room for one sequence of {least} tokens, got out of "
            "memory; end what else runs on it, or use another device"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    smaller = replace(
        config,
        batch_tokens=max(least, config.batch_tokens // 2),
        row_chunk=max(min(least, config.row_chunk), config.row_chunk // 2),
    )
    print(
        "teacher cache: out of memory on the device: goes on with "
        f"cache.batch_tokens={smaller.batch_tokens} and cache.row_chunk={smaller.row_chunk}",
        file=sys.stderr,
        flush=True,
    )
    return smaller
