"""Trends: what changed over a device's nights, since when, by how much, how sure, and what else changed that night.

Draws its series from ``history``, its statistics from ``changepoint`` and its units and limits from ``metrics``. What
``python -m lowbit trend`` prints and the HTML report marks.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowbit import metrics
from lowbit.baselines import differing
from lowbit.changepoint import Change, find_changes
from lowbit.history import History, Night
from lowbit.metrics import Metric

WATCHED = ("decode_tok_s", "speed_ratio", "vram_peak_mib", "ppl", "kld", "compile_s")
"""The metrics with a trend, the weightier first; ``ppl`` and ``kld`` under every protocol that a history has. On a CPU,
whose clock drifts with its neighbours, ``speed_ratio`` is what says something."""

SHARE_OF_LIMIT = 0.25
"""What is worth a name, as a share of the gate's floor: a drift has to be seen before it adds up to a regression."""

NIGHTS = 200
"""Nights that are looked at by default: what lasts longer than half a year is how things are."""


@dataclass(frozen=True)
class Trend:
    """One change of one metric of one case. Indices of ``change`` are those of ``history.nights``.

    ``first`` is the first night of the new behaviour; ``environment`` what changed from the night before in which
    this case was measured (``torch 2.11.0 -> 2.13.0``); ``nearby`` the same for the other nights that the change may
    have begun in. ``worse`` is None for a metric without a better direction.
    """

    case: str
    metric: str
    unit: str
    worse: bool | None
    change: Change
    first: Night
    environment: list[str] = field(default_factory=list)
    nearby: list[tuple[Night, list[str]]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """One object of ``trend --json``: sizes in the metric's unit and in percent, confidence as a share."""
        change, relative = self.change, self.change.size_relative
        return {
            "case": self.case,
            "metric": self.metric,
            "unit": self.unit,
            "kind": change.kind,
            "worse": self.worse,
            "first_night": self.first.started,
            "run": str(self.first.path),
            "before": change.before,
            "after": change.after,
            "size_percent": None if relative is None else 100 * relative,
            "slope_per_night": change.slope,
            "nights_since": change.end - change.index,
            "p": change.p,
            "confidence": change.confidence,
            "environment": self.environment,
            "nearby": [{"night": night.started, "environment": lines} for night, lines in self.nearby],
        }


def find_trends(history: History) -> list[Trend]:
    """Every named change of the watched metrics: the newest night first, in it the worse, the weightier, the larger."""
    found = []
    for case, name, metric in watched(history):
        values = history.series(case, name)
        for change in find_changes(values, smallest_size(metric, values)):
            better = metric.better
            worse = None if better == "neither" else (change.size < 0) == (better == "higher")
            here, nearby = _what_changed(history.nights, values, change)
            first = history.nights[change.index]
            found.append(Trend(case, name, metric.unit, worse, change, first, here, nearby))
    return sorted(found, key=_order)


def _order(trend: Trend) -> tuple[int, bool, int, float]:
    metric, relative = metrics.find(trend.metric), trend.change.size_relative
    place = WATCHED.index(metric.name) if metric else len(WATCHED)
    return -trend.change.index, not trend.worse, place, -abs(relative if relative is not None else math.inf)


def watched(history: History) -> Iterator[tuple[str, str, Metric]]:
    """(case, stored name, metric) of every series that has a trend."""
    for case, names in history.cases().items():
        for name in names:
            metric = metrics.find(name)
            if metric is not None and metric.name in WATCHED:
                yield case, name, metric


def smallest_size(metric: Metric, values: Sequence[float]) -> float:
    """The smallest change of this series worth naming, in its unit; 0 where the gate has no limit either."""
    there = [value for value in values if math.isfinite(value)]
    if metric.limit is None or not there:
        return 0.0
    return SHARE_OF_LIMIT * max(metric.limit.absolute, metric.limit.relative * abs(statistics.median(there)))


def _what_changed(
    nights: Sequence[Night], values: Sequence[float], change: Change
) -> tuple[list[str], list[tuple[Night, list[str]]]]:
    """Environment changes of the change's first night, and of the other nights in which it may have begun."""
    here: list[str] = []
    nearby = []
    measured = [i for i in range(change.latest + 1) if math.isfinite(values[i])]
    for before, now in itertools.pairwise(measured):
        if now < change.earliest and now != change.index:
            continue
        lines = environment_change(nights[before], nights[now])
        if now == change.index:
            here = lines
        elif lines:
            nearby.append((nights[now], lines))
    return here, nearby


def environment_change(before: Night, now: Night) -> list[str]:
    """``torch 2.11.0 -> 2.13.0`` for each entry that differs; lowbit's commit where its source does."""
    lines = differing(before.environment, now.environment)
    edited = before.environment.get("lowbit_source") != now.environment.get("lowbit_source")
    if edited and before.commit and now.commit and before.commit != now.commit:
        lines.append(f"lowbit commit {before.commit[:12]} -> {now.commit[:12]}")
    return lines
