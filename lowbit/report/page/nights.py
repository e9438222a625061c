"""The nights of the page: every series, what was upgraded when, which changes were found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowbit import metrics
from lowbit.report.content import Content
from lowbit.report.page import series
from lowbit.trend import environment_change

METRICS = ("decode_tok_s", "ttft_ms", "speed_ratio", "vram_peak_mib", "energy_j_per_tok", "compile_s", "ppl", "kld")
"""Whose nights are in the page, if a case has them."""

CHARACTERS = 1_500_000
"""Of all series together; with more cases than fit, the oldest nights are left out, and the page says so."""


def of(content: Content, place: Mapping[str, int]) -> dict[str, Any]:
    """Nights, their environment changes, every series, the changes found. Empty with fewer than two nights."""
    history = content.history
    if history is None or len(history.nights) < 2:
        return {"nights": []}
    wanted = [
        (case, name)
        for case, names in history.cases().items()
        if case in place
        for name in names
        if (metric := metrics.find(name)) and metric.name in METRICS
    ]
    kept = max(2, min(len(history.nights), CHARACTERS // (2 * max(len(wanted), 1))))
    dropped = len(history.nights) - kept
    nights = history.nights[dropped:]
    told: dict[str, dict[str, Any]] = {}
    for case, name in wanted:
        coded = series.encode([night.metrics.get(case, {}).get(name, math.nan) for night in nights])
        if coded is not None:
            low, unit, text = coded
            told.setdefault(name, {})[str(place[case])] = [series.fine(low), series.fine(unit), text]
    steps = [(i, environment_change(nights[i - 1], nights[i])) for i in range(1, len(nights))]
    return {
        "nights": [night.started[:16] for night in nights],
        "dropped": dropped,
        "alphabet": series.ALPHABET,
        "upgrades": [[i, lines] for i, lines in steps if lines],
        "series": told,
        "changes": [_change(trend, place, dropped) for trend in content.trends if trend.case in place],
    }


def _change(trend: Any, place: Mapping[str, int], dropped: int) -> list[Any]:
    """Case number, metric, kind, first night, end, before, after, worse, p, upgrades of that night, its date."""
    change = trend.change
    return [
        place[trend.case],
        trend.metric,
        change.kind,
        change.index - dropped,
        change.end - dropped,
        series.rounded(change.before),
        series.rounded(change.after),
        trend.worse,
        series.rounded(change.p),
        list(trend.environment),
        trend.first.date,
    ]
