"""Change points of one nightly series, pure statistics: values in, changes out. numpy alone; no I/O, no metric names.

A series is cut into segments, each a constant or a straight line (a drift), by exact dynamic programming with a lenient
price per cut (optimal partitioning: Jackson et al., IEEE Signal Processing Letters 12, 2005). Cuts that don't survive a
strict test on the residual noise are then taken back, the weakest first. Isolated outliers are set aside before: what
is to be named must have lasted ``MIN_SEGMENT`` nights. docs/trend.md has the figures of how often it is right, and
``python -m lowbit.changepoint_simulation`` prints them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ALPHA = 1e-3
"""A change is named when an unchanged series would show one as clear less often than this."""

MIN_SEGMENT = 3
"""Nights that a change must have lasted; one or two odd nights are outliers."""

MIN_DRIFT = 6
"""Nights that a straight line must have lasted to be one."""

MIN_NIGHTS = 8
"""Shorter series are not judged: their own noise is unknown."""

OUTLIER_SIGMA = 4.0
NEIGHBOURS = 5  # nights on each side that an outlier is compared with
LENIENT = 12.0  # price of a cut in units of the noise variance; what passes it is only a candidate
FINEST = 1e-5  # of the range: below it the prefix sums' rounding would count as noise
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Change:
    """One change of a series. Indices are those of the values given, gaps and outliers counted.

    ``index`` is the first night of the new behaviour, which lasts to before ``end``; the change lies in
    ``earliest``..``latest`` with 95 %. A *step* goes from the level ``before`` to the level ``after``; a *drift* is
    still moving, by ``slope`` per night, and ``after`` is where it stood on its last night. ``p``: how often an
    unchanged series of this length would show one as clear. A drift from the very first night on has ``index`` 0.
    """

    index: int
    end: int
    earliest: int
    latest: int
    kind: Literal["step", "drift"]
    before: float
    after: float
    slope: float
    p: float

    @property
    def size(self) -> float:
        """after - before, in the series' unit."""
        return self.after - self.before

    @property
    def size_relative(self) -> float | None:
        """(after - before) / |before|; None where the level before is 0, but for rounding."""
        return self.size / abs(self.before) if abs(self.before) > 1e-9 * abs(self.size) else None

    @property
    def confidence(self) -> float:
        """1 - p."""
        return 1 - self.p


class _Points(NamedTuple):
    """What is judged of a series: ``x`` [n] nights, ``y`` [n] values in units of ``sigma`` about ``middle``."""

    x: Floats
    y: Floats
    middle: float
    sigma: float


class _Segment(NamedTuple):
    """Points ``start`` to before ``end`` of ``_Points``, with a slope or without."""

    start: int
    end: int
    line: bool


def find_changes(values: Sequence[float] | Floats, floor: float = 0.0, alpha: float = ALPHA) -> list[Change]:
    """The changes of ``values`` [nights], oldest first. NaN and infinities are missing nights.

    ``floor`` (in the series' unit) is the smallest size worth naming. Fewer than ``MIN_NIGHTS`` finite values, or
    nothing that happened: []. A change in the last two nights can't be told from an outlier yet: [] too.
    """
    raw = np.asarray(values, dtype=np.float64)
    points = _prepare(raw)
    if points is None:
        return []
    costs = _Costs(points)
    segments = _cut(costs)
    scaled_floor = floor / points.sigma
    found = _take_back(costs, segments, scaled_floor, alpha)
    return [_describe(points, costs, *pair, len(raw)) for pair in found]


def outliers(values: Sequence[float] | Floats) -> list[int]:
    """Indices of the isolated nights that ``find_changes`` sets aside; the last nights may be a change's first."""
    raw = np.asarray(values, dtype=np.float64)
    there = np.flatnonzero(np.isfinite(raw))
    return [int(there[i]) for i in np.flatnonzero(_odd(raw[there], noise(raw[there])))]


def noise(values: Floats) -> float:
    """σ of the night-to-night noise, from the median of absolute differences: neither steps nor drifts enter it.

    Where most nights equal the night before (a metric in whole MiB), the median is 0 and the mean stands in.
    """
    if len(values) < 2:
        return 0.0
    steps = np.diff(values)
    steps = np.abs(steps - np.median(steps))
    typical = float(np.median(steps)) * MAD_TO_SIGMA
    return (typical or float(np.mean(steps)) * math.sqrt(math.pi / 2)) / math.sqrt(2)


def _prepare(raw: Floats) -> _Points | None:
    """Without gaps and outliers, in units of the noise; None for what can't or needn't be judged."""
    x = np.flatnonzero(np.isfinite(raw))
    if len(x) < MIN_NIGHTS:
        return None
    y = raw[x]
    kept = ~_odd(y, noise(y))
    x, y = x[kept], y[kept]
    spread = float(np.ptp(y))
    if len(x) < MIN_NIGHTS or spread <= 1e-12 * float(np.max(np.abs(y))):
        return None  # constant, but for the rounding of its last digit
    sigma, middle = max(noise(y), FINEST * spread), float(np.median(y))
    return _Points(x.astype(np.float64), (y - middle) / sigma, middle, sigma)


def _odd(y: Floats, sigma: float) -> NDArray[np.bool_]:
    """[n] true for one or two nights in a row that stand alone: one way off the medians of both sides by
    ``OUTLIER_SIGMA``, and off the nights right beside by half of it.

    After the last night there is nothing to compare with, so the last night or two are odd until a third agrees.
    """
    odd = np.zeros(len(y), dtype=bool)
    limit = OUTLIER_SIGMA * sigma
    candidates = np.flatnonzero(np.abs(np.diff(y)) > limit / 2) + 1  # where a spike can begin
    for start in [0, *candidates.tolist()]:
        for width in range(1, MIN_SEGMENT):
            end = start + width
            if end > len(y) or width == len(y) or odd[start]:
                break
            sides = [side for side in (y[max(0, start - NEIGHBOURS) : start], y[end : end + NEIGHBOURS]) if len(side)]
            levels = np.array([np.median(side) for side in sides])
            near = y[[i for i in (start - 1, end) if 0 <= i < len(y)]]
            low, high = y[start:end].min(), y[start:end].max()
            above = min(low - levels.max(), 2 * (low - near.max()))
            below = min(levels.min() - high, 2 * (near.min() - high))
            if max(above, below) > limit:
                odd[start:end] = True
    return odd


class _Costs:
    """Squared residuals of every segment [end, start] of the points, as a constant and as a line, in noise variances.

    Too short a segment costs infinity. [n + 1, n + 1] each: 200 nights take 2 ms.
    """

    def __init__(self, points: _Points) -> None:
        self.points, self.n = points, len(points.x)
        x, y = points.x, points.y
        shape = _shape(tuple(x.tolist()))
        sum_y, sum_yy, sum_xy = _prefix(y), _prefix(y * y), _prefix((x - x[0]) * y)
        total = sum_y[:, None] - sum_y
        with np.errstate(invalid="ignore", divide="ignore"):
            self.constant = sum_yy[:, None] - sum_yy - total * total * shape.per_point + shape.too_short
            slope_part = sum_xy[:, None] - sum_xy - shape.mean_x * total
            self.line = self.constant - slope_part * slope_part * shape.per_xx + shape.too_short_line

    def of(self, segment: _Segment) -> float:
        return float((self.line if segment.line else self.constant)[segment.end, segment.start])

    def best(self, start: int, end: int, line_price: float) -> _Segment:
        """The cheaper of constant and line."""
        line = self.line[end, start] + line_price < self.constant[end, start]
        return _Segment(start, end, bool(line))


class _Shape(NamedTuple):
    """What of ``_Costs`` depends on the nights alone. Each [n + 1, n + 1], by (end, start)."""

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


def _cut(costs: _Costs) -> list[_Segment]:
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


def _take_back(
    costs: _Costs, segments: list[_Segment], floor: float, alpha: float
) -> list[tuple[_Segment | None, _Segment, float]]:
    """Undo the weakest change until each that is left has p <= alpha and a size of at least ``floor`` (in sigmas).

    Returns (segment before, segment of the change, p); the first segment, if a drift, has none before it.
    """
    while True:
        changed = [i for i in range(len(segments)) if i or segments[0].line]
        if not changed:
            return []
        residual = _residual(costs, segments)
        tested = [_test(costs, segments, i, floor, residual) for i in changed]
        p, without = max(tested, key=lambda test: test[0])
        if p <= alpha:
            return [(segments[i - 1] if i else None, segments[i], p) for i, (p, _) in zip(changed, tested, strict=True)]
        segments = _settle(costs, without)


def _test(
    costs: _Costs, segments: list[_Segment], i: int, floor: float, residual: _Residual
) -> tuple[float, list[_Segment]]:
    """(p of the change at segment ``i``, the segments without it). A line must be worth its slope as well."""
    this, before = segments[i], segments[i - 1] if i else None
    level = this._replace(line=False)
    p_slope = _p(costs, costs.of(level) - costs.of(this), 1, residual) if this.line else 0.0
    merged = level if before is None else costs.best(before.start, this.end, LENIENT)
    p_cut = 0.0
    if before is not None:
        gain = costs.of(merged) - costs.of(before) - costs.of(this)
        p_cut = _p(costs, gain, max(1 + before.line + this.line - merged.line, 1), residual)
    if abs(_size(costs.points, before, this)) < floor:
        p_cut = 1.0
    if p_slope > p_cut:
        return p_slope, [*segments[:i], level, *segments[i + 1 :]]
    return max(p_cut, p_slope), [*segments[: max(i - 1, 0)], merged, *segments[i + 1 :]]


class _Residual(NamedTuple):
    """What a partition leaves over: degrees of freedom, and the variance per night that a mean of many nights has."""

    freedom: int
    variance: float


def _residual(costs: _Costs, segments: list[_Segment]) -> _Residual:
    """A level, a place and a slope are paid for each. Nights that take after the night before (a warm room) carry less
    than one night of news: the variance is stretched by (1 + r) / (1 - r), r being the lag-1 autocorrelation less its
    own standard error."""
    freedom = costs.n - sum(2 + segment.line for segment in segments) + 1
    if freedom < 3:
        return _Residual(0, math.inf)
    left = np.concatenate([_residuals(costs.points, segment) for segment in segments])
    total = float(left @ left)
    r = max(0.0, float(left[1:] @ left[:-1]) / total - 1 / math.sqrt(costs.n)) if total else 0.0
    return _Residual(freedom, max(total / freedom, 1e-12) * (1 + r) / (1 - r))


def _p(costs: _Costs, gain: float, parameters: int, residual: _Residual) -> float:
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


def _settle(costs: _Costs, segments: list[_Segment]) -> list[_Segment]:
    """Move each cut to its best place between its neighbours: it was chosen beside a cut that is gone."""
    segments = list(segments)
    for i in range(1, len(segments)):
        left, right = segments[i - 1], segments[i]
        total = _sum_by_cut(costs, left, right)
        cut = left.start + int(total.argmin())
        segments[i - 1], segments[i] = left._replace(end=cut), right._replace(start=cut)
    return segments


def _sum_by_cut(costs: _Costs, left: _Segment, right: _Segment) -> Floats:
    """[right.end - left.start] cost of both segments together with the cut at left.start, left.start + 1, …"""
    lefts = (costs.line if left.line else costs.constant)[left.start : right.end, left.start]
    rights = (costs.line if right.line else costs.constant)[right.end, left.start : right.end]
    return lefts + rights


def _fitted(points: _Points, segment: _Segment) -> tuple[float, float]:
    """The segment's model on its first and its last night, in sigmas."""
    x, y = points.x[segment.start : segment.end], points.y[segment.start : segment.end]
    mean = float(y.mean())
    if not segment.line:
        return mean, mean
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    return mean + slope * float(away[0]), mean + slope * float(away[-1])


def _residuals(points: _Points, segment: _Segment) -> Floats:
    """[end - start] the points less the segment's model."""
    first, last = _fitted(points, segment)
    x, y = points.x[segment.start : segment.end], points.y[segment.start : segment.end]
    left: Floats = y - first - (last - first) * (x - x[0]) / (x[-1] - x[0])
    return left


def _size(points: _Points, before: _Segment | None, this: _Segment) -> float:
    first, last = _fitted(points, this)
    return last - (first if before is None else _fitted(points, before)[1])


def _describe(points: _Points, costs: _Costs, before: _Segment | None, this: _Segment, p: float, nights: int) -> Change:
    """In the caller's units and indices."""
    first, last = _fitted(points, this)
    start, length = int(points.x[this.start]), float(points.x[this.end - 1] - points.x[this.start])
    earliest = latest = start
    if before is not None:
        total = _sum_by_cut(costs, before, this)
        likely = before.start + np.flatnonzero(total <= total.min() + 3.84)  # χ² of one degree of freedom, 95 %
        earliest, latest = int(points.x[likely[0]]), int(points.x[likely[-1]])
    return Change(
        index=start,
        end=int(points.x[this.end]) if this.end < len(points.x) else nights,
        earliest=earliest,
        latest=latest,
        kind="drift" if this.line else "step",
        before=points.middle + points.sigma * (first if before is None else _fitted(points, before)[1]),
        after=points.middle + points.sigma * last,
        slope=points.sigma * (last - first) / length if this.line else 0.0,
        p=p,
    )
