"""The gate's decision, pure: values now, a baseline row and the device's spread in; verdicts out. No I/O, no torch.

A metric's limit is ``max(absolute floor, relative floor * |baseline|, k * pooled run-to-run spread)``. A value that is
worse by more than that is a *suspicion*; it fails only when ``REPEATS`` measurements in fresh processes are all beyond
the same limit. docs/gate.md has the two figures (false alarms, misses) and ``lowbit.simulation`` prints them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lowbit import metrics
from lowbit.metrics import Metric
from lowbit.record import Record
from lowbit.spread import Row, Spread, Spreads, Values, floors, host_bound, pool_spread, scale, spread_factor

Status = Literal["ok", "regression", "improvement", "new", "missing", "ungated"]

REPEATS = 2
"""Fresh processes that must confirm a suspicion: it fails when all ``1 + REPEATS`` runs are beyond the limit."""

NO_EVIDENCE = ("void", "skipped")
"""Outcomes of a repeat that neither acquit nor confirm: the card was disturbed, or had no room."""

BLUNT = 0.25
"""Share of a baseline's value beyond which a limit that comes of noise is worth a warning."""


@dataclass(frozen=True)
class Blunt:
    """A limit that a baseline's own noise has made too wide to guard much: ``share`` of the value, out of ``runs``."""

    case: str
    metric: str
    share: float
    runs: Sequence[float] = ()
    unit: str = ""

    def __str__(self) -> str:
        gave = f": its runs gave {', '.join(map(figure, self.runs))} {self.unit}".rstrip() if self.runs else ""
        return f"{short_name(self.case)}: {self.metric} limit {100 * self.share:.0f} %{gave}"


@dataclass(frozen=True)
class Verdict:
    """One metric of one case. ``limit`` is in the metric's unit; ``beyond`` of ``runs`` measurements passed it.

    ``regression`` and ``missing`` fail. ``improvement`` (better by more than the limit, unexplained) and ``new`` are
    reported. ``ungated`` metrics have no limit, or none on this kind of device.
    """

    metric: str
    status: Status
    unit: str = ""
    baseline: float | None = None
    now: float | None = None
    limit: float | None = None
    in_units: bool = False
    beyond: int = 0
    runs: int = 1
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without what is as by default: ``Verdict(**…)`` reads it back."""
        blank = asdict(Verdict(self.metric, self.status))
        return {key: value for key, value in asdict(self).items() if key in ("metric", "status") or value != blank[key]}

    @property
    def fails(self) -> bool:
        return self.status in ("regression", "missing")

    @property
    def change(self) -> float | None:
        """now - baseline, in the metric's unit."""
        return None if self.now is None or self.baseline is None else self.now - self.baseline

    @property
    def change_relative(self) -> float | None:
        """(now - baseline) / |baseline|; None where the baseline is 0."""
        return None if self.change is None or not self.baseline else self.change / abs(self.baseline)

    @property
    def limit_relative(self) -> float | None:
        """limit / |baseline|; None where the baseline is 0."""
        return None if self.limit is None or not self.baseline else self.limit / abs(self.baseline)


def limit_for(metric: Metric, baseline: Values, spread: Spread, host_bound: bool, stderr: float = 0.0) -> float:
    """How far ``metric`` may move in its worse direction, in its unit. Raises ValueError for an ungated metric.

    ``stderr`` is the baseline value's own standard error, which counts ``Limit.stderrs`` times.
    """
    floor = floors(metric, host_bound)
    if floor is None:
        raise ValueError(f"{metric.name} has no limit")
    noise = spread_factor(spread.degrees_of_freedom, len(baseline.runs)) * spread.sigma * scale(floor, baseline.median)
    return max(floor.absolute, floor.relative * abs(baseline.median), noise, floor.stderrs * stderr)


def find_blunt(rows: Iterable[Row], device_kind: str) -> list[Blunt]:
    """What a baseline's own noise hides: each gated metric whose limit is over ``BLUNT`` of its value.

    To be shown when a baseline is accepted, and with whatever is judged by it: such a case could lose a quarter of its
    speed and pass.
    """
    rows = list(rows)
    spreads, found = pool_spread(rows), []
    for row in rows:
        for name, values in row.metrics.items():
            metric = metrics.find(name)
            floor = floors(metric, host_bound(row)) if metric else None
            if metric is None or floor is None or device_kind not in metric.gated_on or not values.median:
                continue
            limit = limit_for(metric, values, spreads.of(name, row), host_bound(row))
            if limit > max(BLUNT * abs(values.median), floor.absolute, floor.relative * abs(values.median)):
                found.append(Blunt(row.case, name, limit / abs(values.median), values.runs, metric.unit))
    return found


def blunt_words(found: Iterable[Blunt]) -> str:
    """In one line: ``10 limits are too wide to guard much: speed_ratio of 9 cases (up to 113 %), …``; "" for none."""
    shares: dict[str, list[float]] = {}
    for one in found:
        shares.setdefault(one.metric, []).append(one.share)
    if not shares:
        return ""
    every = sum(map(len, shares.values()))
    told = [
        f"{name} of {len(of)} case{'s'[: len(of) > 1]} (up to {100 * max(of):.0f} %)" for name, of in shares.items()
    ]
    return f"{every} limit{'s are' if every > 1 else ' is'} too wide to guard much: {', '.join(told)}"


def _beyond(metric: Metric, baseline: float, now: float, limit: float) -> Status:
    if not math.isfinite(now - baseline):  # NaN compares false with everything: it must not pass by that
        return "regression"
    worse = baseline - now if metric.better == "higher" else now - baseline
    if metric.better == "neither":
        worse = abs(worse)
    if worse > limit:
        return "regression"
    return "improvement" if -worse > limit else "ok"


def judge(record: Record, row: Row, spreads: Spreads, device_kind: str) -> list[Verdict]:
    """One verdict per metric that the row or the record has. ``device_kind`` is "cuda" or "cpu".

    A ``regression`` here is a suspicion until ``confirm``; ``missing`` (a gated metric that the record lacks, with
    the record's own reason) needs no confirmation.
    """
    values = record.metrics
    verdicts = []
    for name in [*row.metrics, *(name for name in values if name not in row.metrics)]:
        metric, now = metrics.find(name), values.get(name)
        unit = metric.unit if metric else ""
        if name not in row.metrics:
            verdicts.append(Verdict(name, "new", unit, now=now))
            continue
        baseline = row.metrics[name]
        floor = floors(metric, host_bound(row)) if metric else None
        if metric is None or floor is None or device_kind not in metric.gated_on:
            verdicts.append(Verdict(name, "ungated", unit, baseline.median, now))
            continue
        stderr = row.metrics.get(metrics.stderr_of(name) or "")
        limit = limit_for(
            metric, baseline, spreads.of(name, row), host_bound(row), 0.0 if stderr is None else stderr.median
        )
        in_units = not floor.relative or limit <= floor.absolute
        verdict = Verdict(name, "missing", unit, baseline.median, now, limit, in_units)
        if now is None:
            reason = record.unavailable.get(name, "not measured, no reason given")
            verdicts.append(replace(verdict, runs=0, reason=reason))
            continue
        status = _beyond(metric, baseline.median, now, limit)
        verdicts.append(replace(verdict, status=status, beyond=int(status == "regression")))
    return verdicts


def suspicions(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Those that a fresh process has to confirm before they fail."""
    return [verdict for verdict in verdicts if verdict.status == "regression"]


def confirm(verdicts: Sequence[Verdict], repeats: Sequence[Record]) -> list[Verdict]:
    """The final verdicts, given what fresh processes measured for the same case.

    A suspicion stays a regression only if every repeat is beyond the same limit too; one within it acquits, so the
    caller may stop there, and otherwise makes ``REPEATS`` of them. A repeat without the metric (it failed) does not
    acquit. A void or skipped one is no evidence either way: a suspicion that only such repeats kept from failing is
    ``undecided``. The value reported is the median of the runs.
    """
    evidence = [repeat.metrics for repeat in repeats if repeat.outcome not in NO_EVIDENCE]
    silent = [repeat.outcome for repeat in repeats if repeat.outcome in NO_EVIDENCE]
    final = []
    for verdict in verdicts:
        metric = metrics.find(verdict.metric)
        if verdict.status != "regression" or not repeats or metric is None:
            final.append(verdict)
            continue
        assert verdict.baseline is not None
        assert verdict.now is not None
        assert verdict.limit is not None
        runs = [verdict.now, *(values.get(verdict.metric, math.nan) for values in evidence)]
        beyond = sum(_beyond(metric, verdict.baseline, now, verdict.limit) == "regression" for now in runs)
        finite = [now for now in runs if math.isfinite(now)]
        fails = beyond == len(runs) and not silent
        why = f"not confirmed{f': of its repeats {len(silent)} were {silent[0]}' if silent else ''}"
        final.append(
            replace(
                verdict,
                status="regression" if fails else "ok",
                now=statistics.median(finite) if finite else math.nan,
                beyond=beyond,
                runs=len(runs),
                reason="" if fails else why,
            )
        )
    return final


def undecided(confirmed: Iterable[Verdict]) -> list[Verdict]:
    """Those that ``confirm`` neither acquitted nor confirmed: beyond the limit in every run that is evidence, with a
    repeat that is none."""
    return [verdict for verdict in confirmed if verdict.status == "ok" and 0 < verdict.beyond == verdict.runs]


def short_name(case: str) -> str:
    """``benches/test_decode.py::test_decode[a-b]`` → ``decode[a-b]``."""
    return case.rpartition("::")[2].removeprefix("test_")


def figure(value: float, beside: float = 0.0) -> str:
    """Four significant digits of the larger of the two, so that "268.7 -> 241.0" lines up."""
    size = max((abs(x) for x in (value, beside) if math.isfinite(x)), default=0.0)
    if not math.isfinite(value) or size == 0:
        return f"{value:g}"
    digits = 3 - math.floor(math.log10(size))
    return f"{value:.3g}" if digits > 6 else f"{value:.{max(digits, 0)}f}"


def message(case: str, device: str, verdict: Verdict) -> str:
    """One line: ``decode[…] on nvidia-h200: decode_tok_s 268.7 -> 241.0 tok/s (-10.3 %, limit 2.0 %, 3 of 3 runs)``."""
    head = f"{short_name(case)} on {device}: {verdict.metric}"
    baseline, now, unit = verdict.baseline, verdict.now, f" {verdict.unit}".rstrip()
    if baseline is None:
        return f"{head} {figure(now) if now is not None else '?'}{unit} (not in the baseline)"
    if now is None:
        return f"{head} {figure(baseline)}{unit} -> missing ({verdict.reason or 'not measured'})"
    notes = []
    if not math.isfinite(now - baseline):
        notes.append("not a finite number")
    elif verdict.change_relative is None:
        notes.append(f"{verdict.change:+.3g}{unit}")
    else:
        small = verdict.limit_relative is not None and verdict.limit_relative < 0.01
        notes.append(f"{100 * verdict.change_relative:+.{2 if small else 1}f} %")
    if verdict.limit is not None:
        relative = None if verdict.in_units else verdict.limit_relative
        small = relative is not None and relative < 0.01
        shown = f"{verdict.limit:.3g}{unit}" if relative is None else f"{100 * relative:.{2 if small else 1}f} %"
        notes.append(f"limit {shown}")
    if verdict.runs > 1:
        notes.append(f"{verdict.beyond} of {verdict.runs} runs")
    if verdict.reason:
        notes.append(verdict.reason)
    return f"{head} {figure(baseline, now)} -> {figure(now, baseline)}{unit} ({', '.join(notes)})"
