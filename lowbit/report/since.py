"""Since when a finding is as it is: the change point of its series, or the nights in a row that it lies beyond."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowbit import history as histories
from lowbit import metrics
from lowbit.errors import LowbitError
from lowbit.history import History, Night
from lowbit.regression import Verdict, figure
from lowbit.report.content import Content, Finding
from lowbit.runs import Run
from lowbit.trend import NIGHTS, Trend, find_trends

RECENT = 14
"""Nights that a change within its limits is told of; after that it is how things are, and `trend` has it."""


@dataclass(frozen=True)
class Since:
    """``night`` is the first one so (UTC day), ``nights`` how many it has lasted, this run's counted. ``kind`` is
    "step" or "drift" where a change point says so, "" where only the limit does; ``environment`` what was upgraded
    in that night."""

    night: str
    nights: int
    kind: str = ""
    environment: Sequence[str] = ()

    def __str__(self) -> str:
        lasted = f"{self.nights} nights" if self.nights != 1 else "first night"
        return f"{self.night} ({f'{self.kind}, ' if self.kind else ''}{lasted})"


def with_history(content: Content, history: History | None) -> Content:
    """``content`` with the nights up to its own, at most ``trend.NIGHTS``, and the changes found in them."""
    if history is None:
        return content
    before = [night for night in history.nights if night.started <= content.header.started][-NIGHTS:]
    cut = replace(history, nights=before)
    return replace(content, history=cut, trends=find_trends(cut))


def read_history(folders: Sequence[Path], run: Run, others: Sequence[Run] = ()) -> tuple[History | None, list[str]]:
    """The nights under ``folders`` of what ``run`` measured, ``run`` and ``others`` among them, and the reasons for
    what can't be read. None without any night: nothing was measured."""
    header = run.header
    found: list[History] = histories.group([run, *others])
    unreadable: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            continue
        try:
            read = histories.read(folder, device=header.device, model=header.model)
        except LowbitError as error:  # a folder of other devices' runs is no fault of this one
            unreadable.append(str(error))
            continue
        found, unreadable = [*found, *read.found], [*unreadable, *read.unreadable]
    nights: list[Night] = []
    for history in found:
        if (history.device, history.model, history.load_format) == header.subject[:3]:
            nights += [night for night in history.nights if not _is_there(night, nights)]
    if not nights:
        return None, unreadable
    ordered = sorted(nights, key=lambda night: night.started)
    return History(header.device, header.device_name, header.model, header.load_format, ordered), unreadable


def _is_there(night: Night, nights: Sequence[Night]) -> bool:
    """A copy of the same run, in another folder or document."""
    return any(other.started == night.started and other.metrics == night.metrics for other in nights)


def since(content: Content, finding: Finding) -> Since | None:
    """None where the history does not tell: no verdict, no nights, or this night is not among them."""
    verdict, history = finding.verdict, content.history
    if verdict is None or history is None or len(history.nights) < 2:
        return None
    worse = finding.status != "improvement"
    last = len(history.nights)
    for trend in content.trends:
        this_way = trend.worse is None or trend.worse == worse
        if (trend.case, trend.metric) == (finding.case, verdict.metric) and trend.change.end == last and this_way:
            nights = last - trend.change.index
            return Since(trend.first.date, nights, trend.change.kind, trend.environment)
    return _in_a_row(history, finding.case, verdict)


def moving(content: Content) -> list[Trend]:
    """What gets worse within its limits: changes that began in the last ``RECENT`` nights, last until this one, are not
    among the findings and not accepted. A drift is told of before it adds up to a failure."""
    history, told = content.history, {(f.case, f.verdict.metric) for f in content.findings if f.verdict is not None}
    if history is None:
        return []
    kind = "cpu" if content.header.device.startswith("cpu") else "cuda"
    last = len(history.nights)
    return [
        trend
        for trend in content.trends
        if trend.worse
        and trend.change.end == last
        and last - trend.change.index <= RECENT
        and (trend.case, trend.metric) not in told
        and (metric := metrics.find(trend.metric)) is not None
        and kind in metric.gated_on
        and not _is_accepted(content, trend)
    ]


def _is_accepted(content: Content, trend: Trend) -> bool:
    """Whether the baseline's figure is that of after the change."""
    row = content.baseline.rows.get(trend.case) if content.baseline else None
    if row is None or trend.metric not in row.metrics:
        return False
    median = row.metrics[trend.metric].median
    return abs(trend.change.after - median) < abs(trend.change.before - median)


def moving_words(trend: Trend, nights: int) -> str:
    """``decode_tok_s 180.1 → 176.4 tok/s (-2.1 %, a drift since 2026-11-12, 10 nights)``."""
    change, relative = trend.change, trend.change.size_relative
    moved = f"{figure(change.before, change.after)} → {figure(change.after, change.before)} {trend.unit}".rstrip()
    share = "" if relative is None else f"{100 * relative:+.{2 if abs(relative) < 0.01 else 1}f} %, "
    return f"{trend.metric} {moved} ({share}a {change.kind} since {trend.first.date}, {nights - change.index} nights)"


def _in_a_row(history: History, case: str, verdict: Verdict) -> Since | None:
    """The last nights that all lie beyond the verdict's limit; nights without a value are passed over."""
    metric = metrics.find(verdict.metric)
    if metric is None or verdict.baseline is None or verdict.limit is None or verdict.now is None:
        return None
    sign = math.copysign(1.0, verdict.now - verdict.baseline)
    first, count = None, 0
    for night, value in zip(reversed(history.nights), reversed(history.series(case, verdict.metric)), strict=True):
        if not math.isfinite(value):
            continue
        if sign * (value - verdict.baseline) <= verdict.limit:
            break
        first, count = night, count + 1
    return Since(first.date, count) if first else None
