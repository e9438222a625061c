"""History: the kept runs of a device, oldest first, as nights; what trend and report draw their series from.

A folder of kept runs is ``.lowbit/runs`` or any other (``--history DIR``): run folders, ``run.json`` documents under
any name, merged ones, and CI artefacts that hold them, however deep. Or a single such file. Nothing is written there
but ``digest``'s hidden files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from lowbit import digest, merge
from lowbit.errors import LowbitError
from lowbit.runs import Run

BLOCKING = "CUDA_LAUNCH_BLOCKING"


@dataclass(frozen=True)
class Night:
    """One kept run. ``metrics`` maps a measured case to its finite metrics by stored name (``ppl_embedded_512``).

    Void, failed and skipped cases have none. ``started`` is UTC, ISO 8601; ``commit`` is lowbit's own.
    """

    started: str
    path: Path
    environment: Mapping[str, str]
    commit: str = ""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def date(self) -> str:
        """``2026-11-21``: the UTC day on which it started."""
        return _time(self.started).date().isoformat()


@dataclass(frozen=True)
class History:
    """All nights of one device, model and load format, oldest first. The quality protocol is in the metrics' names."""

    device: str
    device_name: str
    model: str
    load_format: str
    nights: list[Night] = field(default_factory=list)

    def cases(self) -> dict[str, list[str]]:
        """Every case that was ever measured, with the stored names of its metrics; in order of first appearance."""
        found: dict[str, dict[str, None]] = {}
        for night in self.nights:
            for case, metrics in night.metrics.items():
                found.setdefault(case, {}).update(dict.fromkeys(metrics))
        return {case: list(metrics) for case, metrics in found.items()}

    def series(self, case: str, metric: str) -> list[float]:
        """[nights] the metric's value in each night; NaN where the case or the metric was not measured."""
        return [night.metrics.get(case, {}).get(metric, math.nan) for night in self.nights]


@dataclass(frozen=True)
class Histories:
    """What a folder holds: one History per device, model and load format, and the reasons for what can't be read."""

    found: list[History] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


class Told(NamedTuple):
    """What the history takes of a kept run: whose night it is, and the night."""

    device: str
    device_name: str
    model: str
    load_format: str
    night: Night


def read(*roots: Path, device: str | None = None, model: str | None = None) -> Histories:
    """All kept runs under ``roots``, of ``device`` (slug) and ``model`` alone where given.

    A run that can't be read costs itself and is named in ``unreadable``. Raises LowbitError when a root is not there,
    or none holds a run that was asked for, with what they do hold.
    """
    kept, unreadable = [], []
    for root in roots:
        if not root.exists():
            raise LowbitError(f"{root}: no such folder of kept runs; give one, or keep runs: pytest benches")
        for path in merge.candidates(root):
            try:
                kept += _read(path)
            except LowbitError as error:
                unreadable.append(str(error))
    histories = _group(kept)
    chosen = [h for h in histories if device in (None, h.device) and model in (None, h.model)]
    if not chosen:
        have = ", ".join(f"{h.model} ({h.load_format}) on {h.device}" for h in histories) or "no readable run"
        asked = " ".join(word for word in (model, f"on {device}" if device else None) if word) or "any kept run"
        where = ", ".join(map(str, roots))
        raise LowbitError(f"{where}: expected {asked}, got {have}" + "".join(f"; {why}" for why in unreadable[:3]))
    return Histories(chosen, unreadable)


def group(kept: Iterable[Run]) -> list[History]:
    """Runs → one History per device, model and load format, the one with most nights first. Copies count once."""
    return _group([_tell(run) for run in kept])


def _read(path: Path) -> list[Told]:
    """From the digest, if there is one; else from the file itself. [] for one that holds no run."""
    known = digest.load(path)
    if known is not None:
        try:
            return [_from_row(path, row) for row in known]
        except (TypeError, ValueError):  # of another shape than its layout says: the run itself is read
            known = None
    if not merge.may_hold_runs(path):
        return []
    stamp = digest.stamp(path)  # before it is read: what is appended meanwhile makes another one
    told = [_tell(run) for run in merge.read(path)]
    digest.save(path, stamp, [_row(one) for one in told])
    return told


def _row(told: Told) -> list[Any]:
    """A row of a digest."""
    night = {f.name: getattr(told.night, f.name) for f in fields(Night) if f.name != "path"}
    return [told.device, told.device_name, told.model, told.load_format, night]


def _from_row(path: Path, row: list[Any]) -> Told:
    device, device_name, model, load_format, night = row
    return Told(device, device_name, model, load_format, Night(path=merge.place(path), **night))


def _tell(run: Run) -> Told:
    """Raises LowbitError for a run whose start is no time."""
    header = run.header
    _time(header.started)
    night = Night(header.started, run.path, header.environment, header.commit, _metrics(run))
    return Told(header.device, header.device_name, header.model, header.load_format, night)


def _group(kept: Iterable[Told]) -> list[History]:
    histories: dict[tuple[str, str, str], History] = {}
    for device, device_name, model, load_format, night in sorted(kept, key=lambda told: _time(told.night.started)):
        if BLOCKING in night.environment:  # no timing of such a run is the card's own
            continue
        key = (device, model, load_format)
        history = histories.setdefault(key, History(device, device_name, model, load_format))
        copies = (other for other in reversed(history.nights) if other.started == night.started)
        if night.metrics and not any(other.metrics == night.metrics for other in copies):
            history.nights.append(night)
    return sorted((history for history in histories.values() if history.nights), key=lambda h: -len(h.nights))


def _metrics(run: Run) -> dict[str, dict[str, float]]:
    return {
        record.case: {name: float(value) for name, value in record.metrics.items() if math.isfinite(value)}
        for record in run.records()
        if record.outcome == "measured"
    }


def _time(started: str) -> datetime:
    """Raises LowbitError for what is no ISO 8601 time."""
    try:
        time = datetime.fromisoformat(started)
    except ValueError as error:
        raise LowbitError(f"expected the start of a run in ISO 8601, got {started!r}") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)
