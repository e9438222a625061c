"""Change points of one nightly series, pure statistics: values in, changes out. numpy alone; no I/O, no metric names.

A series is cut into segments, each a constant or a straight line (a drift), by exact dynamic programming with a lenient
price per cut (optimal partitioning: Jackson et al., IEEE Signal Processing Letters 12, 2005). Cuts that don't survive a
strict test on the residual noise are then taken back, the weakest first. Isolated outliers are set aside before: what
is to be named must have lasted ``MIN_SEGMENT`` nights. docs/trend.md has the figures of how often it is right, and
``python -m lowbit.changepoint_simulation`` prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lowbit.changepoint.onset import Onset, find_onset, peters_out
from lowbit.changepoint.points import MIN_NIGHTS, MIN_SEGMENT, Floats, Points, noise, odd_nights, prepare
from lowbit.changepoint.segments import Costs, Segment, cut
from lowbit.changepoint.trial import residual_of, take_back

__all__ = ["ALPHA", "MIN_NIGHTS", "MIN_SEGMENT", "Change", "find_changes", "noise", "outliers"]

ALPHA = 1e-3
"""A change is named when an unchanged series would show one as clear less often than this."""


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


def find_changes(values: Sequence[float] | Floats, floor: float = 0.0, alpha: float = ALPHA) -> list[Change]:
    """The changes of ``values`` [nights], oldest first. NaN and infinities are missing nights.

    ``floor`` (in the series' unit) is the smallest size worth naming. Fewer than ``MIN_NIGHTS`` finite values, or
    nothing that happened: []. A change in the last two nights can't be told from an outlier yet: [] too.
    """
    raw = np.asarray(values, dtype=np.float64)
    points = prepare(raw)
    if points is None:
        return []
    costs = Costs(points)
    floor /= points.sigma
    found = take_back(costs, cut(costs), floor, alpha)
    variance = residual_of(costs, found.segments).variance
    return [
        _describe(points, find_onset(costs, before, this, variance), this, p, len(raw))
        for before, this, p in found.changes
        if before is None or not peters_out(costs, before, this, floor, variance)
    ]


def outliers(values: Sequence[float] | Floats) -> list[int]:
    """Indices of the isolated nights that ``find_changes`` sets aside; the last nights may be a change's first."""
    raw = np.asarray(values, dtype=np.float64)
    there = np.flatnonzero(np.isfinite(raw))
    return [int(there[i]) for i in np.flatnonzero(odd_nights(raw[there], noise(raw[there])))]


def _describe(points: Points, onset: Onset, this: Segment, p: float, nights: int) -> Change:
    """In the caller's units and indices."""
    return Change(
        index=int(points.x[onset.start]),
        end=int(points.x[this.end]) if this.end < len(points.x) else nights,
        earliest=int(points.x[onset.earliest]),
        latest=int(points.x[onset.latest]),
        kind="drift" if onset.slope else "step",
        before=points.middle + points.sigma * onset.before,
        after=points.middle + points.sigma * onset.after,
        slope=points.sigma * onset.slope,
        p=p,
    )
