"""What ``python -m lowbit trend`` prints: per night what changed in its environment, then in the figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from lowbit.history import History
from lowbit.regression import short_name
from lowbit.report.layout import NONE, WIDTH, Heading, divergence, lay_out, number
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


def trends(history: History, found: Sequence[Trend], *, newest: int | None = None, color: bool = False) -> str:
    """The whole text for one device, model and load format; ``newest``: how many changes at most."""
    nights = history.nights
    span = f"{len(nights)} nights, {nights[0].date} to {nights[-1].date}"
    title = f"{history.model} ({history.load_format}) on {history.device}: {span}"
    if not found:
        return f"{title}: no change"
    shown = list(found)[:newest]
    rows = [_row(trend) for trend in shown]
    table = lay_out(HEADINGS, rows, color=color)
    head, body = table[: -len(rows)], table[-len(rows) :]
    worse = sum(trend.worse is True for trend in found)
    lines = [f"{title}: {len(found)} changes, {worse} for the worse", "", *head]
    night = None
    for trend, line in zip(shown, body, strict=True):
        if (trend.first.started, trend.environment) != night:
            night = (trend.first.started, trend.environment)
            lines += [
                "",
                *_item(f"since {trend.first.date}: {', '.join(trend.environment) or 'environment unchanged'}"),
            ]
        lines.append(line)
        for other, changes in trend.nearby:
            lines += _item(f"  or since {other.date}: {', '.join(changes)}")
    if len(shown) < len(found):
        lines += ["", f"{len(found) - len(shown)} older changes not shown"]
    return "\n".join(lines)


def _row(trend: Trend) -> list[str]:
    change, relative = trend.change, trend.change.size_relative
    show = divergence if trend.metric.startswith("kld") else number
    if trend.metric.startswith("ppl"):
        show = lambda value: NONE if value is None else f"{value:.4g}"  # noqa: E731
    if change.kind == "drift" and change.before:
        note = f"drift, {100 * change.slope / abs(change.before):+.2f} % a night"
    else:
        note = "step" if change.kind == "step" else "drift"
    return [
        short_name(trend.case),
        trend.metric,
        show(change.before),
        show(change.after),
        NONE if relative is None else f"{100 * relative:+.1f}",
        certainty(change.p),
        f"{note}, worse" if trend.worse else f"{note}, better" if trend.worse is False else note,
    ]


def certainty(p: float) -> str:
    """The confidence in percent, never rounded up to 100: 99.910, 99.998, > 99.999."""
    return "> 99.999" if p < 1e-5 else f"{math.floor(1e5 * (1 - p)) / 1e3:.3f}"


def _item(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
