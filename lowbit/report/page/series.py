"""A history small enough to travel inside a page: per case and metric its smallest value, its unit and one text.

A night takes two characters, digits to the base 89 of (value - smallest) / unit, so that 500 cases × 4 metrics ×
200 nights are 0.8 MB. A value is off by at most a 15,838th of its own series' range, a tenth of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

ALPHABET = "".join(chr(code) for code in range(33, 127) if chr(code) not in '"\\<>&')
"""Printable characters that mean nothing to JSON, HTML or JavaScript."""

LEVELS = len(ALPHABET) ** 2 - 2
"""Steps between the smallest and the largest value; the last code of all is a night without one."""

DIGITS = 5
"""Significant ones of a figure that the page shows: one more than it prints."""

GAP = ALPHABET[-1] * 2


def encode(values: Sequence[float]) -> tuple[float, float, str] | None:
    """(smallest, unit, text of two characters per night); None for a series without a finite value."""
    there = [value for value in values if math.isfinite(value)]
    if not there:
        return None
    low = min(there)
    unit = (max(there) - low) / LEVELS
    return low, unit, "".join(_code(value, low, unit) for value in values)


def _code(value: float, low: float, unit: float) -> str:
    if not math.isfinite(value):
        return GAP
    high, digit = divmod(round((value - low) / unit) if unit else 0, len(ALPHABET))
    return ALPHABET[high] + ALPHABET[digit]


def decode(low: float, unit: float, text: str) -> list[float]:
    """The inverse of ``encode`` up to half a unit; NaN for a gap. The page's JavaScript does the same."""
    pairs: Iterable[str] = (text[i : i + 2] for i in range(0, len(text), 2))
    base = len(ALPHABET)
    return [
        math.nan if pair == GAP else low + unit * (ALPHABET.index(pair[0]) * base + ALPHABET.index(pair[1]))
        for pair in pairs
    ]


def rounded(value: float | None) -> float | None:
    """To what can be read off a plot; None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def fine(value: float) -> float:
    """A series' smallest value and unit, of which every night is made."""
    return float(f"{value:.9g}")
