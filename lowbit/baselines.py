"""Baselines: the medians of several runs of one device, model and load format, as pytest-benchmark's own JSON.

``<baselines_dir>/<device slug>/NNNN_<model>-<load_format>.json`` is readable by ``pytest-benchmark compare``; each
benchmark's ``extra_info["lowbit"]`` carries the row that the gate judges by: each metric's values, one per run; the
median is taken when the file is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from lowbit import documents
from lowbit.errors import LowbitError
from lowbit.metrics import find as find_metric
from lowbit.record import Record
from lowbit.runs import Header, Run
from lowbit.spread import Row, Values

DIGITS, EXACT_DIGITS = 6, 11  # significant, of noisy metrics and of those held to 1e-9: 300 cases fit in 1 MB
INFO_CHARACTERS = 200
COMPILING = ("compile_s", "compiled_anew")
"""What a cold cache of compiled graphs changes."""
DEFAULT_RUNS = 5
"""Fresh processes that ``--update-baselines`` asks for: with fewer the limits of the gate are wide."""

T = TypeVar("T")


@dataclass(frozen=True)
class Baseline:
    """What is compared with. ``stats`` are pytest-benchmark's, of each case's median run; ``skips`` the cases that
    could not run when it was made, each with its kind and reason; ``environments`` the distinct ones of its runs."""

    path: Path
    header: Header
    rows: dict[str, Row] = field(default_factory=dict)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)
    skips: dict[str, tuple[str, str]] = field(default_factory=dict)
    runs: int = 0
    environments: list[dict[str, str]] = field(default_factory=list)
    created: str = field(default_factory=documents.now)

    @property
    def identity(self) -> str:
        """``0001_embedded-auto.json of 2026-11-21T02:17:00+00:00``: the file may be overwritten by a later one."""
        return f"{self.path.name} of {self.created}"


def file_stem(model: str, load_format: str) -> str:
    """``meta-llama/Llama-3.1-8B``, ``dummy`` → ``meta-llama-Llama-3.1-8B-dummy``: the name less its number."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{model}-{load_format}").strip("-")


def find(root: Path, slug: str, model: str, load_format: str) -> Path | None:
    """The accepted baseline (the highest number) of this device, model and load format; None when there is none."""
    name = re.compile(rf"\d{{4}}_{re.escape(file_stem(model, load_format))}\.json")
    return max((path for path in (root / slug).glob("*.json") if name.fullmatch(path.name)), default=None)


def build(runs: Sequence[Run]) -> Baseline:
    """Median and values of ``runs``, which are one subject's. Void and failed records never enter.

    The caller leaves out runs that regressed. Raises LowbitError for no runs, runs of different subjects, or a value
    that is not finite.
    """
    if not runs:
        raise LowbitError("a baseline needs at least one kept run, got none; run `pytest benches` first")
    newest = max(runs, key=lambda run: run.header.started)
    for run in runs:
        _refuse_foreign(run.path, run.header, newest.header.subject)
    cases = dict.fromkeys(case for run in runs for case in run.entries)
    rows: dict[str, Row] = {}
    stats: dict[str, dict[str, Any]] = {}
    skips: dict[str, tuple[str, str]] = {}
    for case in cases:
        entries = [run.entries[case] for run in runs if case in run.entries]
        measured = [entry for entry in entries if entry.record.outcome == "measured"]
        skipped = [entry.record.unmet for entry in entries if entry.record.unmet is not None]
        last = newest.entries.get(case)
        if measured and (last is None or last.record.unmet is None):  # a case that the newest run skips is a skip now
            rows[case] = _make_row([entry.record for entry in measured])
            timed = sorted((entry.stats for entry in measured if entry.stats), key=lambda found: float(found["median"]))
            if timed:
                middle = timed[(len(timed) - 1) // 2]
                stats[case] = {key: _short(middle[key]) for key in documents.STATS if key in middle}
        elif skipped:
            skips[case] = (skipped[-1].kind, skipped[-1].reason)
    environments: list[dict[str, str]] = []
    for run in runs:
        if dict(run.header.environment) not in environments:
            environments.append(dict(run.header.environment))
    return Baseline(Path(), newest.header, rows, stats, skips, len(runs), environments)


def _make_row(records: list[Record]) -> Row:
    names = dict.fromkeys(name for record in records for name in record.metrics)
    metrics = {}
    for name in names:
        taken = _warmest(records) if name in COMPILING else records
        values = [record.metrics[name] for record in taken if name in record.metrics]
        if not all(map(math.isfinite, values)):
            raise LowbitError(f"{records[0].case}: {name} is not finite ({values}): such a run can't become a baseline")
        digits = _digits(name)
        metrics[name] = Values.of(_rounded(value, digits) for value in values)
    last = records[-1]
    info = {key: value for key, value in last.info.items() if _is_small(value)}
    if isinstance(ceilings := last.info.get("ceilings"), Mapping):  # what mbu was held against: the report draws by it
        info["ceilings"] = {key: _rounded(value, DIGITS) for key, value in ceilings.items() if isinstance(value, float)}
    return Row(last.case, last.kind, last.format, last.mode, last.workload, last.dtype, metrics, info)


def _warmest(records: Sequence[Record]) -> list[Record]:
    """Those that compiled the fewest graphs anew: the seconds of a first process, whose cache was empty, would be taken
    for spread, and no compiler could get slow enough to fail."""
    anew = [record.metrics["compiled_anew"] for record in records if "compiled_anew" in record.metrics]
    if len(anew) < len(records):  # of a lowbit that did not count
        return list(records)
    return [record for record, count in zip(records, anew, strict=True) if count == min(anew)]


def _digits(name: str) -> int:
    """Enough that rounding stays far below the metric's relative limit."""
    metric = find_metric(name)
    fine = metric is None or (metric.limit is not None and 0 < metric.limit.relative < 1e-4)
    return EXACT_DIGITS if fine else DIGITS


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _short(value: Any) -> Any:
    return _rounded(value, DIGITS) if isinstance(value, float) else value


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float | bool) or (isinstance(value, str) and len(value) <= INFO_CHARACTERS)


def replace_rows(old: Baseline, new: Baseline, cases: Iterable[str]) -> Baseline:
    """``old`` with the rows and skips of ``cases`` taken from ``new``: what ``--update-baselines -k`` accepts."""
    _refuse_foreign(old.path, old.header, new.header.subject)
    chosen = set(cases)
    rows, stats = _taken(old.rows, new.rows, chosen), _taken(old.stats, new.stats, chosen)
    skips = _taken(old.skips, new.skips, chosen)
    environments = [*old.environments, *(found for found in new.environments if found not in old.environments)]
    header = replace(old.header, environment=new.header.environment, started=new.header.started)
    return Baseline(old.path, header, rows, stats, skips, max(old.runs, new.runs), environments)


def _taken(old: Mapping[str, T], new: Mapping[str, T], cases: set[str]) -> dict[str, T]:
    kept = {case: value for case, value in old.items() if case not in cases}
    return kept | {case: value for case, value in new.items() if case in cases}


def save(baseline: Baseline, root: Path) -> Path:
    """Write it under ``root``, over the accepted one of the same name or as the next number; all or nothing."""
    header = baseline.header
    path = find(root, header.device, header.model, header.load_format)
    if path is None:
        numbers = [int(found.name[:4]) for found in (root / header.device).glob("[0-9][0-9][0-9][0-9]_*.json")]
        name = f"{max(numbers, default=0) + 1:04}_{file_stem(header.model, header.load_format)}.json"
        path = root / header.device / name
    documents.write(path, to_document(baseline), "the baseline stays as it was")
    return path


def to_document(baseline: Baseline) -> dict[str, Any]:
    """What ``save`` writes: the whole pytest-benchmark document."""
    timed, untimed = [], []
    for case in sorted(baseline.rows):
        row = baseline.rows[case]
        data = {key: value for key, value in asdict(row).items() if key not in ("case", "metrics")}
        data["metrics"] = {name: list(values.runs) for name, values in row.metrics.items()}
        params = {"format": row.format, "mode": row.mode, "workload": row.workload}
        if case in baseline.stats:
            timed.append(documents.benchmark(case, row.kind, params, baseline.stats[case], data))
        else:
            untimed.append({"case": case, **data})
    lowbit = {
        "kind": "baseline",
        "header": asdict(baseline.header),
        "runs": baseline.runs,
        "environments": baseline.environments,
        "skips": {case: list(why) for case, why in sorted(baseline.skips.items())},
        "created": baseline.created,
        "untimed": untimed,
    }
    return documents.document(timed, lowbit, baseline.header.environment, baseline.header.commit)


def load(path: Path) -> Baseline:
    """Raises LowbitError, saying what it found, for a file that is missing, empty, broken, foreign or too new."""
    data = documents.read(path, "lowbit baseline")
    part = data["lowbit"]
    if part.get("kind") != "baseline":
        raise LowbitError(
            f"{path}: expected a lowbit baseline, got a {part.get('kind', 'file of another kind')}; "
            "make one with: pytest benches --update-baselines"
        )
    try:
        timed = [{"case": row["fullname"], **row["extra_info"]["lowbit"]} for row in data["benchmarks"]]
        return Baseline(
            path=path,
            header=Header(**part["header"]),
            rows={row["case"]: _to_row(path, row) for row in [*timed, *part["untimed"]]},
            stats={row["fullname"]: row["stats"] for row in data["benchmarks"]},
            skips={case: (kind, reason) for case, (kind, reason) in part["skips"].items()},
            runs=part["runs"],
            environments=part["environments"],
            created=part["created"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LowbitError(
            f"{path}: expected a lowbit baseline, a part of it is missing or of another shape ({error!r}); "
            f"{documents.ANEW}"
        ) from error


def _to_row(path: Path, data: Mapping[str, Any]) -> Row:
    metrics = {name: Values.of(map(float, runs)) for name, runs in data["metrics"].items()}
    for name, values in metrics.items():
        if not all(map(math.isfinite, values.runs)):
            raise LowbitError(
                f"{path}: {data['case']}: {name} is not finite, nothing can be judged by it; {documents.ANEW}"
            )
    return Row(**{**data, "metrics": metrics})


def check(baseline: Baseline, slug: str, model: str, load_format: str, protocol: str) -> None:
    """Raise LowbitError for a foreign baseline: another device, model, load format or quality protocol.

    Never for other versions of anything: that upgrade is what the gate is there to judge.
    """
    _refuse_foreign(baseline.path, baseline.header, (slug, model, load_format, protocol))


def _refuse_foreign(path: Path, header: Header, expected: tuple[str, str, str, str]) -> None:
    names = ("device", "model", "load format", "quality protocol")
    pairs = zip(names, expected, header.subject, strict=True)
    differing = [f"{name}: expected {want}, got {got}" for name, want, got in pairs if want != got]
    if differing:
        raise LowbitError(
            f"{path} is foreign to this run ({'; '.join(differing)}); compare with a baseline of the same "
            "device, model, load format and protocol, or make one with: pytest benches --update-baselines"
        )


def environment_difference(baseline: Baseline, environment: Mapping[str, str]) -> list[str]:
    """What changed since the baseline: ``torch 2.11.0 -> 2.13.0``. Sorted by name."""
    return differing(baseline.header.environment, environment)


def differing(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """``name old -> new`` for each entry that is not the same in both; "none" for one that is not there."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"{name} {old.get(name, 'none')} -> {new.get(name, 'none')}" for name in names]


def vanished(baseline: Baseline, collected: Iterable[str]) -> list[str]:
    """Cases of the baseline, measured or skipped, that are absent from collection (before -k, -m and --lf).

    Collect at the baseline's suite (``baseline.header.suite``): a smaller one lacks cases without having lost them.
    """
    there = set(collected)
    return sorted(case for case in baseline.rows.keys() | baseline.skips.keys() if case not in there)


def new_skips(baseline: Baseline, records: Iterable[Record]) -> dict[str, str]:
    """Cases measured in the baseline and skipped now, each with its reason: failures."""
    return {
        record.case: str(record.unmet)
        for record in records
        if record.outcome == "skipped" and record.case in baseline.rows
    }
