"""The onset of a change that is certain: since which night, and whether it was a step or the beginning of a drift.

A drift of few nights is cut as a step in its middle: two levels explain it as well as a level and a line that need not
meet. A *hinge*, which leaves the level before without a jump, has no more parameters than a step. The cheaper of the
two says what it was, and the nights that either still allows are the range.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lowbit.changepoint.points import MIN_SEGMENT, Floats
from lowbit.changepoint.segments import LENIENT, Costs, Segment, fitted, sum_by_cut

CHI_SQUARE_95 = 3.84
"""Of one degree of freedom: how much more a night may cost and still be in the 95 % range."""


class Onset(NamedTuple):
    """``start``, ``earliest`` and ``latest`` number points; levels in sigmas; ``slope`` in sigmas per night, 0 for a
    step."""

    start: int
    earliest: int
    latest: int
    before: float
    after: float
    slope: float


def find_onset(costs: Costs, before: Segment | None, this: Segment, variance: float) -> Onset:
    """Where ``this`` began; nothing before it: a drift from night 0 on. ``variance``: of the residual noise."""
    first, last = fitted(costs.points, this)
    x = costs.points.x
    slope = (last - first) / float(x[this.end - 1] - x[this.start]) if this.line else 0.0
    if before is None:
        return Onset(this.start, this.start, this.start, first, last, slope)
    totals = [sum_by_cut(costs, before, this) + (LENIENT if this.line else 0.0)]
    if not before.line:
        totals.append(_hinges(costs.points.x[before.start : this.end], costs.points.y[before.start : this.end]))
    cheapest = min(float(total.min()) for total in totals)
    likely = np.flatnonzero(np.min(totals, axis=0) <= cheapest + CHI_SQUARE_95 * variance)
    earliest, latest = before.start + int(likely[0]), before.start + int(likely[-1])
    if before.line or totals[-1].min() > cheapest:
        return Onset(this.start, earliest, latest, fitted(costs.points, before)[1], last, slope)
    start = before.start + int(totals[-1].argmin())
    return Onset(start, earliest, latest, *_fit_hinge(costs, before.start, start, this.end))


def peters_out(costs: Costs, before: Segment, this: Segment, floor: float, variance: float) -> bool:
    """True for the level after a drift that the line may as well have met: the drift's end, not a change."""
    if not before.line or this.line:
        return False
    if abs(fitted(costs.points, this)[1] - fitted(costs.points, before)[1]) < floor:
        return True
    x, y = costs.points.x[before.start : this.end], costs.points.y[before.start : this.end]
    meeting = float(_hinges(-x[::-1], y[::-1]).min())  # from its end, a level that becomes a line
    return meeting <= costs.of(before) + costs.of(this) + LENIENT * variance


def _hinges(x: Floats, y: Floats) -> Floats:
    """[n] squared residuals of a level that from each point on is a line, as ``sum_by_cut`` has them."""
    last_level = np.concatenate([[x[0]], x[:-1]])  # the night before each
    ramp = np.maximum(x - last_level[:, None], 0.0)
    ramp -= ramp.mean(axis=1, keepdims=True)
    y = y - y.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        total: Floats = float(y @ y) - (ramp @ y) ** 2 / (ramp * ramp).sum(axis=1)
    total[:MIN_SEGMENT] = np.inf
    total[len(x) - MIN_SEGMENT + 1 :] = np.inf
    return total


def _fit_hinge(costs: Costs, start: int, onset: int, end: int) -> tuple[float, float, float]:
    """(level before, level on the last night, slope per night)."""
    x, y = costs.points.x[start:end], costs.points.y[start:end]
    ramp = np.maximum(x - costs.points.x[onset - 1], 0.0)
    away = ramp - ramp.mean()
    slope = float(away @ y / (away @ away))
    level = float(y.mean()) - slope * float(ramp.mean())
    return level, level + slope * float(ramp[-1]), slope
