"""A ``Content`` as the data of the page: JSON of columns, numbers rounded to what can be read off a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowbit import baselines, metrics
from lowbit.record import Record
from lowbit.report.content import Content, Finding
from lowbit.report.page import series
from lowbit.report.rows import Row, join, memory_metric
from lowbit.report.since import since
from lowbit.trend import environment_change
from lowbit.workloads import WORKLOADS

DIGITS = 5  # significant

HISTORY = ("decode_tok_s", "ttft_ms", "speed_ratio", "vram_peak_mib", "energy_j_per_tok", "compile_s", "ppl", "kld")
"""The metrics whose nights are in the page, if a case has them."""

HISTORY_CHARACTERS = 1_500_000
"""Of all series together; with more cases than fit, the oldest nights are left out, and the page says so."""

STATES = ("REGRESSED", "MISSING", "LOST", "failed", "new", "better", "void", "ok", "measured", "skipped")
"""A case's word, in the order in which the table shows them."""


def to_json(content: Content) -> str:
    """The data as text that is safe inside ``<script type="application/json">``: no tag can begin in it."""
    text = json.dumps(_clean(collect(content)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in ("&", "<", ">", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _clean(value: Any) -> Any:
    """JSON has no NaN: null; what is no JSON at all becomes text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def collect(content: Content) -> dict[str, Any]:
    """Everything that the page's scripts draw."""
    findings = content.findings
    cases = _cases(content, findings)
    place = {case: number for number, case in enumerate(cases["id"])}
    return {
        "cases": cases,
        "values": _values(content, cases["id"]),
        "base": _base(content, cases["id"]),
        "verdicts": _verdicts(content, place, findings),
        "metrics": _metrics(content),
        "memory": memory_metric(join(content.records)),
        "embedded": content.header.load_format == "dummy",
        "ceilings": _ceilings(content),
        "command": " ".join(["pytest benches", *content.arguments]),
        "history": _history(content, place),
    }


def _cases(content: Content, findings: Sequence[Finding]) -> dict[str, list[Any]]:
    """Columns of the cases: what was run, and after it what was lost or skipped without a record."""
    words = _words(content, findings)
    quality = {record.format: row for row in join(content.records) for record in row.records}
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            *("id", "kind", "format", "mode", "workload", "library", "batch", "state", "dtype"),
            *("kld", "ppl", "memory", "reason", "info"),
        )
    }
    known = {record.case for record in content.records}
    absent = [case for case in (*content.lost, *content.skips) if case not in known]
    batches = {workload.id: workload.batch for workload in WORKLOADS}
    memory = memory_metric(join(content.records))
    for record in content.records:
        row = quality.get(record.format, Row(record.format, None))
        values = {
            "id": record.case,
            "kind": record.kind,
            "format": record.format,
            "mode": record.mode,
            "workload": record.workload,
            "library": record.backend,
            "batch": batches.get(record.workload or "", 1),
            "state": words[record.case],
            "dtype": record.dtype,
            "kld": _rounded(row.kld),
            "ppl": _rounded((row.quality_value("ppl") or ("", None))[1]),
            "memory": _rounded(record.metrics.get(memory)),
            "reason": _reason(content, record),
            "info": _info(record),
        }
        for name, column in columns.items():
            column.append(values[name])
    for case in absent:
        reason = content.skips.get(case, "")
        blank = dict.fromkeys(columns) | {"id": case, "kind": "", "format": case, "library": "", "info": []}
        blank |= {"state": "skipped" if reason else "LOST", "reason": reason or content.lost.get(case)}
        for name, column in columns.items():
            column.append(blank[name])
    return columns


def _words(content: Content, findings: Sequence[Finding]) -> dict[str, str]:
    """Case → its word, the worst that was found."""
    words = {
        "regression": "REGRESSED",
        "missing": "MISSING",
        "lost": "LOST",
        "failed": "failed",
        "new": "new",
        "improvement": "better",
    }
    found: dict[str, str] = {}
    for finding in findings:  # worst first
        found.setdefault(finding.case, words[finding.status])
    fine = "ok" if content.judged_by else "measured"
    return {
        record.case: found.get(record.case) or (fine if record.outcome == "measured" else record.outcome)
        for record in content.records
    }


def _reason(content: Content, record: Record) -> str | None:
    if record.unmet is not None:
        return str(record.unmet)
    return record.error or content.lost.get(record.case)


def _info(record: Record) -> list[list[str]]:
    """What a case says of itself beside its figures: (name, text)."""
    told: list[list[str]] = []
    card = record.info.get("card")
    if isinstance(card, Mapping) and isinstance(after := card.get("after"), Mapping):
        clock = ", ".join(
            f"{after[key]:g} {unit}"
            for key, unit in (("sm_mhz", "MHz"), ("temperature_c", "°C"), ("power_w", "W"))
            if isinstance(after.get(key), int | float)
        )
        told += [["card after", clock]] if clock else []
        held = ", ".join(map(str, after.get("throttle") or ()))
        told += [["clocks held back by", held]] if held else []
    told += [["note", str(note)] for note in record.info.get("notes") or ()]
    told += [[f"no {name}", reason] for name, reason in record.unavailable.items()]
    return told


def _values(content: Content, ids: Sequence[str]) -> dict[str, list[float | None]]:
    """Metric → a column of the run's values."""
    by_case = {record.case: record.metrics for record in content.records}
    return _columns(ids, by_case)


def _base(content: Content, ids: Sequence[str]) -> dict[str, list[float | None]]:
    """Metric → a column of the baseline's medians; of the stored verdicts where there is no baseline any more."""
    if content.baseline is not None:
        rows = content.baseline.rows
        medians = {case: {name: v.median for name, v in row.metrics.items()} for case, row in rows.items()}
    else:
        medians = {
            case: {verdict.metric: verdict.baseline for verdict in verdicts if verdict.baseline is not None}
            for case, verdicts in content.verdicts.items()
        }
    return _columns(ids, medians)


def _columns(ids: Sequence[str], rows: Mapping[str, Mapping[str, float]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for case in ids for name in rows.get(case, ()))
    return {name: [_rounded(rows.get(case, {}).get(name)) for case in ids] for name in names}


def _verdicts(content: Content, place: Mapping[str, int], findings: Sequence[Finding]) -> dict[str, list[Any]]:
    """Case number → its gated verdicts: metric, status, limit, limit in units, σ, runs beyond, runs, reason, since."""
    details = {(f.case, f.verdict.metric): f for f in findings if f.verdict is not None}
    told: dict[str, list[Any]] = {}
    for case, verdicts in content.verdicts.items():
        for verdict in verdicts:
            if verdict.status == "ungated" or case not in place:
                continue
            finding = details.get((case, verdict.metric))
            began = since(content, finding) if finding else None
            row = [
                verdict.metric,
                verdict.status,
                _rounded(verdict.limit),
                verdict.in_units,
                _rounded(finding.spread if finding else content.spread_of(case, verdict)),
                verdict.beyond,
                verdict.runs,
                verdict.reason,
                [str(began), *began.environment] if began else [],
                _rounded(verdict.now),
            ]
            told.setdefault(str(place[case]), []).append(row)
    return told


def _metrics(content: Content) -> dict[str, list[str]]:
    """Stored name → unit, better direction, description."""
    names = dict.fromkeys(name for record in content.records for name in record.metrics)
    told = {}
    for name in names:
        metric = metrics.find(name)
        told[name] = [metric.unit, metric.better, metric.description] if metric else ["", "neither", ""]
    return told


def _ceilings(content: Content) -> dict[str, Any]:
    """The first that a case carries: they are measured once a session."""
    found = (record.info["ceilings"] for record in content.records if record.info.get("ceilings"))
    return dict(next(found, {}))


def _history(content: Content, place: Mapping[str, int]) -> dict[str, Any]:
    """Nights, their environment changes, every series, the changes found. Empty with fewer than two nights."""
    history = content.history
    if history is None or len(history.nights) < 2:
        return {"nights": []}
    wanted = [
        (case, name)
        for case, names in history.cases().items()
        if case in place
        for name in names
        if (metric := metrics.find(name)) and metric.name in HISTORY
    ]
    kept = max(2, min(len(history.nights), HISTORY_CHARACTERS // (2 * max(len(wanted), 1))))
    dropped = len(history.nights) - kept
    nights = history.nights[dropped:]
    told: dict[str, dict[str, Any]] = {}
    for case, name in wanted:
        coded = series.encode([night.metrics.get(case, {}).get(name, math.nan) for night in nights])
        if coded is not None:
            low, unit, text = coded
            told.setdefault(name, {})[str(place[case])] = [_fine(low), _fine(unit), text]
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
        _rounded(change.before),
        _rounded(change.after),
        trend.worse,
        _rounded(change.p),
        list(trend.environment),
        trend.first.date,
    ]


def environment_rows(content: Content) -> Iterable[tuple[str, str | None, str]]:
    """(name, in the baseline, in this run), what changed first. None without a baseline."""
    new = content.header.environment
    old = content.baseline.header.environment if content.baseline else None
    changed = {line.split(" ", 1)[0] for line in baselines.differing(old, new)} if old is not None else set()
    names = sorted(new.keys() | (old or {}).keys(), key=lambda name: (name not in changed, name))
    for name in names:
        yield name, old.get(name, "none") if old is not None else None, new.get(name, "none")


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def _fine(value: float) -> float:
    return float(f"{value:.9g}")
