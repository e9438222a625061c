"""Compares two files, each a kept run or a baseline: what ``python -m lowbit compare OLD NEW`` prints and exits by."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit import baselines, runs
from lowbit.baselines import Baseline
from lowbit.errors import LowbitError
from lowbit.record import Record
from lowbit.regression import Verdict, judge
from lowbit.runs import Run
from lowbit.spread import Row, Spreads, Values, pool_spread

Side = Run | Baseline


@dataclass(frozen=True)
class Comparison:
    """NEW against OLD. ``lost`` are cases measured in OLD without a measurement in NEW, each with the reason;
    ``new`` those of NEW alone; ``void`` those disturbed in NEW, which are not judged; ``environment`` what changed;
    ``left_out`` how many of OLD's cases NEW's own -k or -m did not select; ``cold`` those whose compile_s alone is not
    judged."""

    device: str
    verdicts: list[tuple[str, list[Verdict]]] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    void: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    left_out: int = 0
    cold: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """True when a metric regressed or is missing, or a case was lost."""
        return bool(self.lost) or any(verdict.fails for _, verdicts in self.verdicts for verdict in verdicts)


def read(path: Path) -> Side:
    """A baseline or a kept run: its folder, ``run.json`` or journal, or a folder of runs, of which the newest is meant.

    Raises LowbitError for anything else.
    """
    if runs.holds_runs(path):
        found = runs.newest(path)
        if found is None:
            raise LowbitError(
                f"{path}: expected a kept run, a baseline or a folder of kept runs, got none that is whole"
            )
        return found
    if path.is_dir() or path.suffix == ".jsonl":
        return runs.read(path)
    return baselines.load(path) if _kind(path) == "baseline" else runs.read(path)


def _kind(path: Path) -> Any:
    """The file's own word for what it is; None where there is none, which its reader then explains."""
    try:
        return json.loads(path.read_bytes())["lowbit"]["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rows_of(side: Side) -> dict[str, Row]:
    """What OLD holds as baseline rows. A single run's have one value per metric: no spread, so the floors judge."""
    if isinstance(side, Baseline):
        return side.rows
    measured = [record for record in side.records() if record.outcome == "measured"]
    return {record.case: _row(record) for record in measured}


def _row(record: Record) -> Row:
    # nothing can be judged by a NaN: such a metric is new in NEW
    metrics = {name: Values(value, (value,)) for name, value in record.metrics.items() if math.isfinite(value)}
    return Row(record.case, record.kind, record.format, record.mode, record.workload, record.dtype, metrics)


def records_of(side: Side) -> dict[str, Record]:
    """What NEW holds as records; a baseline's are its medians."""
    if isinstance(side, Run):
        return {record.case: record for record in side.records()}
    return {
        case: Record(
            case=case,
            kind=row.kind,  # type: ignore[arg-type]  # checked when the run was made
            format=row.format,
            mode=row.mode,
            workload=row.workload,
            dtype=row.dtype,
            metrics={name: values.median for name, values in row.metrics.items()},
            model=side.header.model,
            load_format=side.header.load_format,
        )
        for case, row in side.rows.items()
    }


def compare(old: Side, new: Side) -> Comparison:
    """Judge every case of OLD by NEW, without confirmation: NEW is all there is.

    Cases that NEW's own -k or -m left out are not lost. Raises LowbitError when the two are foreign to each other.
    """
    if old.header.subject != new.header.subject:
        raise LowbitError(
            f"{old.path} and {new.path} measured different things: expected device, model, load format and protocol "
            f"{', '.join(old.header.subject)}, got {', '.join(new.header.subject)}"
        )
    device = new.header.device
    kind = "cpu" if device.startswith("cpu") else "cuda"
    rows, records = rows_of(old), records_of(new)
    spreads = pool_spread(rows.values()) if isinstance(old, Baseline) else Spreads()
    left_out = sum(case not in records for case in rows) if any(new.header.selection.values()) else 0
    changed = baselines.differing(old.header.environment, new.header.environment)
    result = Comparison(device, environment=changed, left_out=left_out)
    for case, row in rows.items():
        record = records.get(case)
        if record is None:
            if not left_out:
                result.lost[case] = _skip_in(new, case) or "not in the new run"
        elif record.outcome == "measured":
            verdicts = judge(record, row, spreads, kind)
            slow = [one for one in verdicts if one.metric == "compile_s" and one.status == "regression"]
            if slow and _colder(record, row):
                result.cold.append(case)
                verdicts = [one for one in verdicts if one not in slow]
            result.verdicts.append((case, verdicts))
        elif record.outcome == "void":
            result.void.append(case)
        else:
            result.lost[case] = f"{record.outcome}: {record.unmet or record.error}"
    result.new.extend(case for case, record in records.items() if case not in rows and record.outcome == "measured")
    return result


def _colder(record: Record, row: Row) -> bool:
    """Whether NEW compiled graphs anew where OLD's all came from Inductor's cache, or OLD has no count: its seconds are
    another figure.

    A session would measure the case again in a fresh process, which finds the cache filled; here NEW is all there is.
    """
    old = row.metrics.get("compiled_anew")
    return record.metrics.get("compiled_anew", 0.0) > 0 and (old is None or old.median == 0)


def _skip_in(side: Side, case: str) -> str | None:
    if isinstance(side, Baseline) and case in side.skips:
        return "skipped: " + ": ".join(side.skips[case])
    return None


def compare_runs(old: Path, new: Path) -> Comparison:
    """``compare`` of two files. Raises LowbitError naming the one that can't be read, and for two with no case in
    common, or none that was not disturbed: exit code 0 would say that nothing got worse."""
    result = compare(read(old), read(new))
    if result.verdicts or result.lost:
        return result
    if result.void:
        raise LowbitError(
            f"{new}: all {len(result.void)} cases that it has in common with {old} are void, for the card was "
            "disturbed: nothing to compare; measure again when the card is free"
        )
    raise LowbitError(f"{old} and {new} have no measured case in common: nothing to compare")
