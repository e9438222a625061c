"""The trial of each candidate change: those that chance could have made are taken back, the weakest first."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from lowbit.changepoint.points import Points
from lowbit.changepoint.segments import LENIENT, Costs, Segment, fitted, residuals, sum_by_cut


class Verdict(NamedTuple):
    """What is left: all segments, and of each change the segment before (none before a drift from night 0 on), its own
    segment and its p."""

    segments: list[Segment]
    changes: list[tuple[Segment | None, Segment, float]]


def take_back(costs: Costs, segments: list[Segment], floor: float, alpha: float) -> Verdict:
    """Undo the weakest change until each that is left has p <= alpha and a size of at least ``floor`` (in sigmas)."""
    while True:
        changed = [i for i in range(len(segments)) if i or segments[0].line]
        if not changed:
            return Verdict(segments, [])
        residual = residual_of(costs, segments)
        tested = [_test(costs, segments, i, floor, residual) for i in changed]
        p, without = max(tested, key=lambda test: test[0])
        if p <= alpha:
            found = zip(changed, tested, strict=True)
            return Verdict(segments, [(segments[i - 1] if i else None, segments[i], p) for i, (p, _) in found])
        segments = _settle(costs, without)


def _test(
    costs: Costs, segments: list[Segment], i: int, floor: float, residual: Residual
) -> tuple[float, list[Segment]]:
    """(p of the change at segment ``i``, the segments without it). A line must be worth its slope as well."""
    this, before = segments[i], segments[i - 1] if i else None
    level = this._replace(line=False)
    p_slope = _p(costs, costs.of(level) - costs.of(this), 1, residual) if this.line else 0.0
    merged = level if before is None else costs.best(before.start, this.end, LENIENT)
    p_cut = _p_cut(costs, before, this, merged, residual) if before else 0.0
    ends_a_drift = before is not None and before.line and not this.line
    if not ends_a_drift and abs(size_of(costs.points, before, this)) < floor:
        p_cut = 1.0
    if p_slope > p_cut:
        return p_slope, [*segments[:i], level, *segments[i + 1 :]]
    return max(p_cut, p_slope), [*segments[: max(i - 1, 0)], merged, *segments[i + 1 :]]


def _p_cut(costs: Costs, before: Segment, this: Segment, merged: Segment, residual: Residual) -> float:
    """p of the cut between two segments, held against the best that does without it.

    A step that a drift can't stand for (by ``LENIENT``) is held against no change at all: chance is what is left.
    """
    apart = costs.of(before) + costs.of(this)
    is_step = not before.line and not this.line
    if is_step and costs.of(merged) - apart > LENIENT * residual.variance:
        merged = merged._replace(line=False)
    return _p(costs, costs.of(merged) - apart, max(1 + before.line + this.line - merged.line, 1), residual)


class Residual(NamedTuple):
    """What a partition leaves over: degrees of freedom, and the variance per night that a mean of many nights has."""

    freedom: int
    variance: float


def residual_of(costs: Costs, segments: list[Segment]) -> Residual:
    """A level, a place and a slope are paid for each. Nights that take after the night before (a warm room) carry less
    than one night of news: the variance is stretched by (1 + r) / (1 - r), r being the lag-1 autocorrelation."""
    freedom = costs.n - sum(2 + segment.line for segment in segments) + 1
    if freedom < 3:
        return Residual(0, math.inf)
    left = np.concatenate([residuals(costs.points, segment) for segment in segments])
    total = float(left @ left)
    r = max(0.0, float(left[1:] @ left[:-1]) / total) if total else 0.0
    return Residual(freedom, max(total / freedom, 1e-12) * (1 + r) / (1 - r))


def _p(costs: Costs, gain: float, parameters: int, residual: Residual) -> float:
    """How often chance alone makes a change gain so much anywhere in the series (Bonferroni over nights and kinds).

    The gain over the residual variance is an F ratio. With two parameters its tail is closed: (1 + gain / ν)^(-ν / 2);
    with one, Student's t goes to the normal by Wallace (1959), who is good to 1 % of z here.
    """
    if residual.freedom < 1:
        return 1.0
    shrunk = residual.freedom * math.log1p(max(gain, 0.0) / residual.variance / residual.freedom)
    if parameters > 1:
        p = math.exp(-shrunk / 2)
    else:
        p = math.erfc(math.sqrt(shrunk / 2) * (8 * residual.freedom + 1) / (8 * residual.freedom + 3))
    return min(1.0, 2 * costs.n * p)


def _settle(costs: Costs, segments: list[Segment]) -> list[Segment]:
    """Move each cut to its best place between its neighbours: it was chosen beside a cut that is gone."""
    segments = list(segments)
    for i in range(1, len(segments)):
        left, right = segments[i - 1], segments[i]
        total = sum_by_cut(costs, left, right)
        cut = left.start + int(total.argmin())
        segments[i - 1], segments[i] = left._replace(end=cut), right._replace(start=cut)
    return segments


def size_of(points: Points, before: Segment | None, this: Segment) -> float:
    """From the level before to the segment's last night, in sigmas."""
    first, last = fitted(points, this)
    return last - (first if before is None else fitted(points, before)[1])
