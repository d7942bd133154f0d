"""Search the step of a codec whose error is the quality that was asked for."""

import math
from collections.abc import Callable
from typing import Any

from distilcache.data.errors import tell

STEP_ITERATIONS, STEP_MOST = 5, 20
"""Corrections of the step towards the quality, and at most where the error stays too large."""
STEP_CLOSE = 1.5
"""Times the quality: an error above it is too large."""
STEP_RANGE = (1e-6, 1e2)
"""Bounds of the step in units of the mean spread. Below, float32 has no resolution; above, every
code is 0."""


def step_for(
    quality: float,
    error: Callable[[float], float],
    scale: float,
    progress: Callable[[float], Any],
    what: str,
    unit: str,
) -> float:
    """The step whose error is the quality.

    A line tells where no step comes near it, since no finer code fits.

    Args:
        quality: Error that is asked for.
        error: Error of the codec with a step.
        scale: Mean spread of a coordinate.
        progress: Called with the fraction of the work that a part of it has been.
        what: Whose codec it is, for the line.
        unit: Of the error, for the line.
    """
    step, before, found = scale, 0.0, dict[float, float]()
    for done in range(STEP_MOST):
        found[step] = max(error(step), 1e-12)
        if done >= STEP_ITERATIONS:
            if found[step] <= STEP_CLOSE * quality:
                return step
            if found[step] == before:
                break  # no finer code fits
        before = found[step]
        # The error grows as step^2 where steps are small, so each pass squares the remaining gap.
        step *= (quality / found[step]) ** 0.5
        step = min(max(step, STEP_RANGE[0] * scale), STEP_RANGE[1] * scale)
        if done < STEP_ITERATIONS:
            progress(1 / STEP_ITERATIONS)
    step = min(found, key=lambda tried: abs(math.log(found[tried] / quality)))
    if found[step] > STEP_CLOSE * quality:
        tell(
            f"teacher cache: the closest code of {what} has an error of {found[step]:.2g} {unit} "
            f"where {quality:.2g} were asked for: states of this teacher vary too much; "
            "cache.hidden_dtype=float32 stores them exactly"
        )
    return step
