"""What is judged of a series: without gaps and outliers, in units of its own night-to-night noise."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_SEGMENT = 3
"""Nights that a change must have lasted; one or two odd nights are outliers."""

MIN_NIGHTS = 8
"""Shorter series are not judged: their own noise is unknown."""

OUTLIER_SIGMA = 4.0
NEIGHBOURS = 5  # nights on each side that an outlier is compared with
CLIP_SIGMA = 3.0
REACH = 3  # nights on each side of a running median
FINEST = 1e-5  # of the range: below it the prefix sums' rounding would count as noise
MAD_TO_SIGMA = 1.4826


class Points(NamedTuple):
    """What is judged of a series: ``x`` [n] nights, ``y`` [n] values in units of ``sigma`` about ``middle``."""

    x: Floats
    y: Floats
    middle: float
    sigma: float


def prepare(raw: Floats) -> Points | None:
    """Without gaps and outliers, in units of the noise; None for what can't or needn't be judged."""
    x = np.flatnonzero(np.isfinite(raw))
    if len(x) < MIN_NIGHTS:
        return None
    y = raw[x]
    kept = ~odd_nights(y, noise(y))
    x, y = x[kept], y[kept]
    spread = float(np.ptp(y))
    if len(x) < MIN_NIGHTS or spread <= 1e-12 * float(np.max(np.abs(y))):
        return None  # constant, but for the rounding of its last digit
    sigma, middle = max(noise(y), FINEST * spread), float(np.median(y))
    y = _softened(y, sigma)
    return Points(x.astype(np.float64), (y - middle) / sigma, middle, sigma)


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


def odd_nights(y: Floats, sigma: float) -> NDArray[np.bool_]:
    """[n] true for one or two nights in a row that stand alone: one way off the medians of both sides by
    ``OUTLIER_SIGMA``, and off the nights right beside by half of it.

    After the last night there is nothing to compare with, so the last night or two are odd until a third agrees.
    """
    odd = np.zeros(len(y), dtype=bool)
    limit = OUTLIER_SIGMA * sigma
    values = y.tolist()  # a few numbers at a time: numpy's medians of ten would take most of the whole search
    for start in [0, *(np.flatnonzero(np.abs(np.diff(y)) > limit / 2) + 1).tolist()]:  # where a spike can begin
        for width in range(1, MIN_SEGMENT):
            end = start + width
            if end > len(y) or width == len(y) or odd[start]:
                break
            if _stands_alone(values, start, end, limit):
                odd[start:end] = True
    return odd


def _stands_alone(values: list[float], start: int, end: int, limit: float) -> bool:
    """True when the nights ``start`` to before ``end`` lie one way off both sides."""
    low, high = min(values[start:end]), max(values[start:end])
    near = [values[i] for i in (start - 1, end) if 0 <= i < len(values)]
    if max(low - max(near), min(near) - high) <= limit / 2:
        return False
    sides = (values[max(0, start - NEIGHBOURS) : start], values[end : end + NEIGHBOURS])
    levels = [statistics.median(side) for side in sides if side]
    above = min(low - max(levels), 2 * (low - max(near)))
    below = min(min(levels) - high, 2 * (min(near) - high))
    return max(above, below) > limit


def _softened(y: Floats, sigma: float) -> Floats:
    """[n] values at most ``CLIP_SIGMA`` off the running median of 2 * ``REACH`` + 1 nights: it follows changes.

    Two odd nights among three would pass for a change otherwise. Where the window is cut by an end and even, the
    value may be near either of its two middle ones.
    """
    padded = np.concatenate([np.full(REACH, np.nan), y, np.full(REACH, np.nan)])
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(padded, 2 * REACH + 1), axis=1)  # NaN goes last
    count = (~np.isnan(windows)).sum(axis=1)
    rows = np.arange(len(y))
    low, high = windows[rows, (count - 1) // 2], windows[rows, count // 2]
    softened: Floats = np.clip(y, low - CLIP_SIGMA * sigma, high + CLIP_SIGMA * sigma)
    return softened
