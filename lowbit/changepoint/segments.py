"""Segments: constants and straight lines, what each costs, and the cheapest way to cut a series into them."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lowbit.changepoint.points import MIN_SEGMENT, Floats, Points

MIN_DRIFT = 6
"""Nights that a straight line must have lasted to be one."""

LENIENT = 12.0
"""Price of a cut or a slope in units of the noise variance; what passes it is only a candidate."""


class Segment(NamedTuple):
    """Points ``start`` to before ``end`` of ``Points``, with a slope or without."""

    start: int
    end: int
    line: bool


class Costs:
    """Squared residuals of every segment [end, start] of the points, as a constant and as a line, in noise variances.

    Too short a segment costs infinity. [n + 1, n + 1] each: 200 nights take 2 ms.
    """

    def __init__(self, points: Points) -> None:
        self.points, self.n = points, len(points.x)
        x, y = points.x, points.y
        shape = _shape(tuple(x.tolist()))
        sum_y, sum_yy, sum_xy = _prefix(y), _prefix(y * y), _prefix((x - x[0]) * y)
        total = sum_y[:, None] - sum_y
        with np.errstate(invalid="ignore", divide="ignore"):
            self.constant = sum_yy[:, None] - sum_yy - total * total * shape.per_point + shape.too_short
            slope_part = sum_xy[:, None] - sum_xy - shape.mean_x * total
            self.line = self.constant - slope_part * slope_part * shape.per_xx + shape.too_short_line

    def of(self, segment: Segment) -> float:
        return float((self.line if segment.line else self.constant)[segment.end, segment.start])

    def best(self, start: int, end: int, line_price: float) -> Segment:
        """The cheaper of constant and line."""
        line = self.line[end, start] + line_price < self.constant[end, start]
        return Segment(start, end, bool(line))


class _Shape(NamedTuple):
    """What of ``Costs`` depends on the nights alone. Each [n + 1, n + 1], by (end, start)."""

    per_point: Floats
    mean_x: Floats
    per_xx: Floats
    too_short: Floats
    too_short_line: Floats


@lru_cache(maxsize=8)
def _shape(nights: tuple[float, ...]) -> _Shape:
    x = np.array(nights) - nights[0]
    count = np.subtract.outer(np.arange(len(x) + 1.0), np.arange(len(x) + 1.0))
    sum_x, sum_xx = _prefix(x), _prefix(x * x)
    with np.errstate(divide="ignore", invalid="ignore"):
        per_point = np.where(count > 0, 1 / count, 0.0)
        mean_x = (sum_x[:, None] - sum_x) * per_point
        xx = sum_xx[:, None] - sum_xx - mean_x * mean_x * count
        per_xx = np.where(count > 1, 1 / xx, 0.0)
    return _Shape(
        per_point,
        mean_x,
        per_xx,
        np.where(count >= MIN_SEGMENT, 0.0, np.inf),
        np.where(count >= MIN_DRIFT, 0.0, np.inf),
    )


def _prefix(values: Floats) -> Floats:
    """[n] → [n + 1] sums of what stands before."""
    return np.concatenate([[0.0], np.cumsum(values)])


def cut(costs: Costs) -> list[Segment]:
    """The cheapest partition, a cut and a slope costing ``LENIENT`` each."""
    cost = np.minimum(costs.constant, costs.line + LENIENT) + LENIENT
    total, previous = np.full(costs.n + 1, np.inf), np.zeros(costs.n + 1, dtype=int)
    total[0] = 0.0
    for end in range(MIN_SEGMENT, costs.n + 1):
        candidates = total[:end] + cost[end, :end]
        previous[end] = start = int(candidates.argmin())
        total[end] = candidates[start]
    cuts = [costs.n]
    while cuts[-1]:
        cuts.append(int(previous[cuts[-1]]))
    cuts.reverse()
    return [costs.best(start, end, LENIENT) for start, end in itertools.pairwise(cuts)]


def sum_by_cut(costs: Costs, left: Segment, right: Segment) -> Floats:
    """[right.end - left.start] cost of both segments together with the cut at left.start, left.start + 1, …"""
    lefts = (costs.line if left.line else costs.constant)[left.start : right.end, left.start]
    rights = (costs.line if right.line else costs.constant)[right.end, left.start : right.end]
    return lefts + rights


def fitted(points: Points, segment: Segment) -> tuple[float, float]:
    """The segment's model on its first and its last night, in sigmas."""
    x, y = points.x[segment.start : segment.end], points.y[segment.start : segment.end]
    mean = float(y.mean())
    if not segment.line:
        return mean, mean
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    return mean + slope * float(away[0]), mean + slope * float(away[-1])


def residuals(points: Points, segment: Segment) -> Floats:
    """[end - start] the points less the segment's model."""
    first, last = fitted(points, segment)
    x, y = points.x[segment.start : segment.end], points.y[segment.start : segment.end]
    left: Floats = y - first - (last - first) * (x - x[0]) / (x[-1] - x[0])
    return left
