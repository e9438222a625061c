"""A ``Content`` as the data of the page: JSON of columns, numbers rounded to what can be read off a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowbit import baselines, metrics
from lowbit.formats import FORMATS
from lowbit.record import Record
from lowbit.report.content import Content, Finding, format_of
from lowbit.report.content import name as name_of
from lowbit.report.page import nights
from lowbit.report.page.series import rounded
from lowbit.report.recommendation import best_of, find_candidates
from lowbit.report.rows import HEADLINE, Row, join, memory_metric, workloads_of
from lowbit.report.since import since
from lowbit.roofline import mean_context
from lowbit.workloads import SMALL_MODEL_PARAMETERS, WORKLOADS

SMALL_MIB = 2.0 * SMALL_MODEL_PARAMETERS / 2**20
"""A model of fewer MiB has the small workloads of its name: a record says the name alone."""

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
    short = _short(content, place)
    return {
        "cases": cases,
        "values": _values(content, cases["id"]),
        "base": _base(content, cases["id"]),
        "verdicts": _verdicts(content, place, findings),
        "metrics": _metrics(content),
        "workloads": workloads_of(join(content.records), "decode"),
        "memory": memory_metric(join(content.records)),
        "start": _start(content, short),
        "short": short,
        "embedded": content.header.load_format == "dummy",
        "scores": [len(content.scores), content.scored_by],
        "cpu": content.header.device.startswith("cpu"),
        "ceilings": _ceilings(content),
        "command": " ".join(["pytest benches", *content.arguments]),
        "history": nights.of(content, place),
    }


def _short(content: Content, place: Mapping[str, int]) -> list[int]:
    """The numbers of the cases that stand for their rows at batch 1 and a short context; [] where all have the same
    workload, which then says as much."""
    found = [row.short for row in join(content.records) if row.short is not None]
    return [place[record.case] for record in found] if len({record.workload for record in found}) > 1 else []


def _start(content: Content, short: Sequence[int]) -> str | None:
    """The workload that the plots begin with: all rows at a short context, else the recommended case's, else the
    headline's or the first there is."""
    if short:
        return "short context"
    limits = {"max_kld": content.max_kld, "max_vram_mib": content.max_vram_mib}
    best = best_of(find_candidates(join(content.scored), **limits))  # type: ignore[arg-type]
    known = workloads_of(join(content.records), "decode")
    return best.record.workload if best else next(iter(sorted(known, key=lambda name: name != HEADLINE)), None)


def _cases(content: Content, findings: Sequence[Finding]) -> dict[str, list[Any]]:
    """Columns of the cases: what was run, and after it what was lost or skipped without a record."""
    words = _words(content, findings)
    quality = {record.format: row for row in join(content.scored) for record in row.records}
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            *("id", "kind", "format", "mode", "workload", "library", "batch", "state", "dtype"),
            *("kld", "ppl", "memory", "kv", "reason", "info"),
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
            "kld": rounded(row.kld),
            "ppl": rounded((row.quality_value("ppl") or ("", None))[1]),
            "memory": rounded(record.metrics.get(memory)),
            "kv": rounded(_kv_bytes(record)),
            "reason": _reason(content, record),
            "info": _info(record),
        }
        for name, column in columns.items():
            column.append(values[name])
    for case in absent:
        reason = content.skips.get(case, "")
        fmt = format_of(case) or ""
        blank = dict.fromkeys(columns) | {"id": case, "kind": _kind(case), "format": fmt, "info": []}
        blank |= {"library": FORMATS[fmt].backend if fmt else ""}
        blank |= {"state": "skipped" if reason else "LOST", "reason": reason or content.lost.get(case)}
        for name, column in columns.items():
            column.append(blank[name])
    return columns


def _kind(case: str) -> str:
    """``decode`` of ``benches/test_decode.py::test_decode[…]``."""
    return name_of(case).partition("[")[0]


def _kv_bytes(record: Record) -> float | None:
    """Bytes of KV cache that one decoded step of the whole batch reads; None where the run did not count them."""
    per_token = record.metrics.get("kv_bytes_per_tok")
    scale = "small" if record.metrics.get("weights_mib", math.inf) < SMALL_MIB else "full"
    rows = [row for row in WORKLOADS if row.id == record.workload and row.phase == "decode"]
    row = next((row for row in rows if row.scale == scale), rows[0] if rows else None)
    if per_token is None or row is None:
        return None
    return per_token * row.batch * mean_context(row.prompt_tokens, row.new_tokens)


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
    held = content.baseline.rows if content.baseline else content.verdicts  # what there was to be judged by

    def fine(case: str) -> str:
        return "ok" if content.judged_by and case in held else "measured"

    return {
        record.case: found.get(record.case) or (fine(record.case) if record.outcome == "measured" else record.outcome)
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
    return {name: [rounded(rows.get(case, {}).get(name)) for case in ids] for name in names}


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
                rounded(verdict.limit),
                verdict.in_units,
                rounded(finding.spread if finding else content.spread_of(case, verdict)),
                verdict.beyond,
                verdict.runs,
                verdict.reason,
                [str(began), *began.environment] if began else [],
                rounded(verdict.now),
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


def environment_rows(content: Content) -> Iterable[tuple[str, str | None, str]]:
    """(name, in the baseline, in this run), what changed first. None without a baseline."""
    new = content.header.environment
    old = content.baseline.header.environment if content.baseline else None
    changed = {line.split(" ", 1)[0] for line in baselines.differing(old, new)} if old is not None else set()
    names = sorted(new.keys() | (old or {}).keys(), key=lambda name: (name not in changed, name))
    for name in names:
        yield name, old.get(name, "none") if old is not None else None, new.get(name, "none")
