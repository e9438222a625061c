"""What ``python -m lowbit trend`` prints: per night what changed in its environment, then in the figures."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterable, Sequence

from lowbit import metrics
from lowbit.history import History, Night
from lowbit.regression import short_name
from lowbit.report.layout import NONE, Heading, count, divergence, hang, lay_out, number
from lowbit.trend import Trend

HEADINGS = (
    Heading("case", right=False),
    Heading("metric", right=False),
    Heading("before"),
    Heading("after"),
    Heading("size", "%"),
    Heading("sure", "%"),
    Heading("", right=False),
)

CASE_WIDTH = 52
"""A longer name stands in a line of its own, so that the columns keep within WIDTH."""

ALIKE = 4
"""Cases listed of those whose same metric moved the same way on the same night; the others are counted."""


def trends(history: History, found: Sequence[Trend], *, everything: bool = False, color: bool = False) -> str:
    """The whole text for one device, model and load format; ``everything``: each change, however many are alike."""
    nights = history.nights
    span = f"{count(len(nights), 'night')}, {nights[0].date} to {nights[-1].date}"
    title = f"{history.model} ({history.load_format}) on {history.device}: {span}"
    if not found:
        return f"{title}: no change"
    shown, alike = (list(found), {}) if everything else _shorten(found)
    names = _metric_names(found)
    table = lay_out(HEADINGS, [_row(trend, names) for trend in shown], color=color)
    head, body = table[: -len(shown)], table[-len(shown) :]
    worse = sum(trend.worse is True for trend in found)
    lines = [*_item(f"{title}: {count(len(found), 'change')}, {worse} worse"), "", *head]
    rows = zip(shown, body, strict=True)
    for (_, environment), group in itertools.groupby(rows, key=lambda row: _night(row[0])):
        several = list(group)
        date, what = several[0][0].first.date, ", ".join(environment) or "environment unchanged"
        lines += ["", *_item(f"since {date}: {what}")]
        for trend, line in several:
            name = short_name(trend.case)
            lines += [name, line] if len(name) > CASE_WIDTH else [line]
            lines += [found for note in _notes(history, trend) for found in _item(f"    {note}")]
            if hidden := alike.get(id(trend)):
                lines += _item(f"    and {names[trend.metric]} of {count(len(hidden), 'more case')}: {_range(hidden)}")
        lines += _which([trend for trend, _ in several], nights)
    return "\n".join(lines)


def _which(several: Sequence[Trend], nights: Sequence[Night]) -> list[str]:
    """The command that tells which of several upgrades to suspect for what got worse; its paths are not wrapped."""
    worst = next((trend for trend in several if trend.worse and trend.change.index), None)
    if worst is None or len(worst.environment) < 2:
        return []
    old, new = (shlex.quote(str(night.path)) for night in (nights[worst.change.index - 1], worst.first))
    return [f"    which of them: python -m lowbit bisect {old} {new}"]


def _night(trend: Trend) -> tuple[str, tuple[str, ...]]:
    return trend.first.started, tuple(trend.environment)


def _shorten(found: Iterable[Trend]) -> tuple[list[Trend], dict[int, list[Trend]]]:
    """The first ``ALIKE`` of the changes of one metric, one way, on one night; by the last one's id, the others."""
    groups: dict[tuple[object, ...], list[Trend]] = {}
    for trend in found:
        groups.setdefault((_night(trend), trend.metric, trend.worse, trend.change.size > 0), []).append(trend)
    shown: list[Trend] = []
    alike: dict[int, list[Trend]] = {}
    for several in groups.values():
        first = several if len(several) == ALIKE + 1 else several[:ALIKE]
        shown += first
        alike[id(first[-1])] = several[len(first) :]
    return shown, alike


def _metric_names(found: Iterable[Trend]) -> dict[str, str]:
    """``ppl_embedded_512`` → ``ppl`` where there is one protocol alone."""
    stored = dict.fromkeys(trend.metric for trend in found)
    plain = {name: metric.name if (metric := metrics.find(name)) else name for name in stored}
    return {name: short if list(plain.values()).count(short) == 1 else name for name, short in plain.items()}


def _row(trend: Trend, names: dict[str, str]) -> list[str]:
    change, relative = trend.change, trend.change.size_relative
    show = divergence if trend.metric.startswith("kld") else number
    if trend.metric.startswith("ppl"):
        show = lambda value: NONE if value is None else f"{value:.4g}"  # noqa: E731
    name = short_name(trend.case)
    return [
        name if len(name) <= CASE_WIDTH else "",
        names[trend.metric],
        show(change.before),
        show(change.after),
        NONE if relative is None else f"{100 * relative:+.1f}",
        certainty(change.p),
        "" if trend.worse is None else "worse" if trend.worse else "better",
    ]


def _notes(history: History, trend: Trend) -> list[str]:
    """What is not to be seen from the row: that it is a drift, that it is over, and where else it may have begun."""
    change, nights = trend.change, history.nights
    notes = []
    if change.kind == "drift":
        rate = f"{100 * change.slope / abs(change.before):+.2f} %" if change.before else f"{change.slope:+.3g}"
        notes.append(f"a drift: {rate} a night")
    if change.end < len(nights):
        notes.append(f"for {count(change.end - change.index, 'night')}, until {nights[change.end].date}")
    if change.earliest < change.latest:
        notes.append(f"may have begun from {nights[change.earliest].date} to {nights[change.latest].date}")
    since = [f"or since {other.date}: {', '.join(changes)}" for other, changes in trend.nearby]
    return [*(["; ".join(notes)] if notes else []), *since]


def certainty(p: float) -> str:
    """The confidence in percent, never rounded up to 100: 99.910, 99.998, >99.999."""
    return ">99.999" if p < 1e-5 else f"{math.floor(1e5 * (1 - p)) / 1e3:.3f}"


def _range(several: Iterable[Trend]) -> str:
    """``+47.9 to +50.3 %``: of what is not listed."""
    sizes = sorted(100 * size for trend in several if (size := trend.change.size_relative) is not None)
    if not sizes:
        return "from 0"
    low, high = f"{sizes[0]:+.1f}", f"{sizes[-1]:+.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def _item(text: str) -> list[str]:
    indent = "    " if text.startswith(" ") else ""
    return hang(text.strip(), f"{indent}    ", first=indent).splitlines()
