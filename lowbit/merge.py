"""Kept runs of many hosts and GPUs as one pytest-benchmark JSON, with every conflict between them named.

Runs of one device, model, load format, protocol and environment become one run; where that is all there is, the file is
a kept run like any other (kind ``run``). Otherwise it holds several (kind ``merge``), their cases' names told apart
by what differs: ``test_decode[…]@nvidia-a100``. ``read`` gives the runs back from either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from lowbit import documents, runs
from lowbit.baselines import differing
from lowbit.errors import LowbitError
from lowbit.formats import Suite
from lowbit.record import Record
from lowbit.runs import DOCUMENT, JOURNAL, Entry, Header, Run

RUN, MERGE = "run", "merge"
SUITES = get_args(Suite)
HEADLINES = ("decode_tok_s", "ttft_ms", "ppl_", "kld_")
"""What a conflict tells of a measurement; a case has one of these kinds."""


@dataclass(frozen=True)
class Merged:
    """One run per device, model, load format, protocol and environment; ``conflicts`` are sentences."""

    runs: list[Run] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def find(root: Path) -> Iterator[Path]:
    """What ``read`` takes under ``root``, itself included: journals, and documents without a journal beside them."""
    return (path for path in candidates(root) if path == root or may_hold_runs(path))


def candidates(root: Path) -> Iterator[Path]:
    """What ``find`` looks into."""
    if root.is_file():
        yield root
        return
    journals = sorted(root.rglob(JOURNAL))
    yield from journals
    beside = {path.with_name(DOCUMENT) for path in journals}
    yield from (path for path in sorted(root.rglob("*.json")) if path not in beside)


def may_hold_runs(path: Path) -> bool:
    """False for JSON of another kind: baselines, pytest-benchmark's own files. What can't be read may."""
    if path.suffix == ".jsonl":
        return True
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return True
    part = data.get("lowbit") if isinstance(data, dict) else None
    return isinstance(part, dict) and part.get("kind") in (RUN, MERGE)


def place(path: Path) -> Path:
    """By what a run is named: its own folder, or the document where it stands among others."""
    return path.parent if path.name in (JOURNAL, DOCUMENT) else path


def read(path: Path) -> list[Run]:
    """The runs of a kept run (folder, ``run.json``, journal) or of a merged file. Raises LowbitError for another."""
    if path.is_dir() or path.suffix == ".jsonl":
        return [runs.read(path)]
    data = documents.read(path, "lowbit run")
    if data["lowbit"].get("kind") != MERGE:
        return [replace(runs.read(path), path=place(path))]
    try:
        parts = data["lowbit"]["runs"]
        rows: list[list[dict[str, Any]]] = [[] for _ in parts]
        for row in data["benchmarks"]:
            rows[row["extra_info"]["lowbit"].pop("run")].append(row)
    except (KeyError, TypeError, IndexError) as error:
        raise LowbitError(f"{path}: expected a merge of lowbit runs, a part is missing ({error!r})") from error
    found = [
        runs.from_document(path, {"benchmarks": row, "lowbit": part}) for row, part in zip(rows, parts, strict=True)
    ]
    return [replace(run, path=place(path)) for run in found]


def noted(run: Run, note: str) -> Run:
    """The run with ``note`` among the notes of every case that was not skipped: what its header can't tell."""

    def with_note(entry: Entry) -> Entry:
        record = entry.record
        if record.outcome == "skipped":
            return entry
        notes = list(dict.fromkeys([*record.info.get("notes", []), note]))
        return replace(entry, record=replace(record, info={**record.info, "notes": notes}))

    return replace(run, entries={case: with_note(entry) for case, entry in run.entries.items()})


def merge(parts: Sequence[Run]) -> Merged:
    """One run of each sort, oldest first. A case that two runs of a sort have is kept once, and named unless both are
    the same result or skip it alike: a measurement before anything else, then the later one. Raises LowbitError for
    no runs at all."""
    if not parts:
        raise LowbitError("merge: expected at least one kept run, got none")
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in sorted(parts, key=lambda run: run.header.started):
        key = (*run.header.subject, *sorted(run.header.environment.items()))
        groups.setdefault(key, []).append(run)
    conflicts: list[str] = []
    merged = [_join(group, conflicts) for group in groups.values()]
    return Merged(merged, [*_environments(merged), *conflicts])


def _join(group: Sequence[Run], conflicts: list[str]) -> Run:
    entries: dict[str, Entry] = {}
    origin: dict[str, Path] = {}
    for run in group:
        for case, entry in run.entries.items():
            if case in entries:
                entry, run_path = _choose(case, entries[case], origin[case], entry, run.path, conflicts)
            else:
                run_path = run.path
            entries[case], origin[case] = entry, run_path
    suite = max((run.header.suite for run in group), key=SUITES.index)
    header = replace(group[0].header, suite=suite, selection=_selection(group), argv=[])
    return Run(
        group[0].path,
        header,
        entries,
        all(run.complete for run in group),
        any(run.regressed for run in group),
        max((run.exit_status for run in group if run.exit_status is not None), default=None),
    )


def _choose(
    case: str, old: Entry, old_path: Path, new: Entry, new_path: Path, conflicts: list[str]
) -> tuple[Entry, Path]:
    """Which of two results of one case stays; appends the conflict, if it is one."""
    if old == new:  # a copy
        return old, old_path
    kept = (old, old_path) if _rank(old.record) > _rank(new.record) else (new, new_path)
    if (old.record.outcome, new.record.outcome) != ("skipped", "skipped") or old.record.unmet != new.record.unmet:
        found = f"{_told(old.record)} in {old_path}, {_told(new.record)} in {new_path}"
        conflicts.append(f"{case}: {found}; kept: that of {kept[1]}")
    return kept


def _rank(record: Record) -> int:
    return ("failed", "void", "skipped", "measured").index(record.outcome)


def _told(record: Record) -> str:
    """``measured (decode_tok_s 268.7)``: the outcome, and the metric that one asks for first, or the reason."""
    if record.outcome == "measured":
        names = sorted(record.metrics, key=lambda name: not name.startswith(HEADLINES))
        why = next((f"{name} {record.metrics[name]:.4g}" for name in names), "")
    else:
        why = str(record.unmet or record.error or "").splitlines()[0] if record.unmet or record.error else ""
    return f"{record.outcome} ({why})" if why else record.outcome


def _selection(group: Sequence[Run]) -> dict[str, str]:
    """``-k`` and ``-m`` of the parts, joined by ``or``; a flag that one part lacks left nothing out there."""
    flags = {flag for run in group for flag in run.header.selection}
    return {
        flag: " or ".join(dict.fromkeys(f"({run.header.selection[flag]})" for run in group))
        for flag in sorted(flags)
        if all(run.header.selection.get(flag) for run in group)
    }


def _environments(merged: Sequence[Run]) -> list[str]:
    """A sentence per pair of runs that measured the same thing in different environments or by different protocols."""
    found = []
    for i, run in enumerate(merged):
        for other in merged[i + 1 :]:
            one, two = run.header, other.header
            if (one.device, one.model, one.load_format) != (two.device, two.model, two.load_format):
                continue
            lines = differing(one.environment, two.environment)
            if one.protocol != two.protocol:
                lines.append(f"protocol {one.protocol} -> {two.protocol}")
            both = len(run.entries.keys() & other.entries.keys())
            found.append(
                f"{one.model} ({one.load_format}) on {one.device} was measured in two environments, {run.path} and "
                f"{other.path}: {', '.join(lines)}; {both} {'case' if both == 1 else 'cases'} in both"
            )
    return found


def to_document(merged: Merged) -> dict[str, Any]:
    """The file: a kept run where there is one, else all of them with their cases' names told apart."""
    parts = [_part(run) for run in merged.runs]
    if len(parts) == 1:
        parts[0]["lowbit"]["conflicts"] = merged.conflicts
        return parts[0]
    benchmarks = []
    for number, (part, label) in enumerate(zip(parts, labels([run.header for run in merged.runs]), strict=True)):
        for row in part["benchmarks"]:
            info = {**row["extra_info"]["lowbit"], "run": number}
            names = {key: f"{row[key]}@{label}" for key in ("name", "fullname")}
            benchmarks.append({**row, **names, "extra_info": {"lowbit": info}})
    lowbit = {"kind": MERGE, "conflicts": merged.conflicts, "runs": [part["lowbit"] for part in parts]}
    first = merged.runs[0].header
    return documents.document(
        benchmarks, lowbit, _common([run.header.environment for run in merged.runs]), first.commit
    )


def _part(run: Run) -> dict[str, Any]:
    end = {"complete": run.complete, "regressed": run.regressed, "exit_status": run.exit_status}
    return runs.to_document(run.header, run.entries, end)


def labels(headers: Sequence[Header]) -> list[str]:
    """What tells the runs apart: those of device, model, load format and protocol that differ; a number where none."""
    parts = list(zip(*(header.subject for header in headers), strict=True))
    telling = [values for values in parts if len(set(values)) > 1]
    named = [",".join(words) for words in zip(*telling, strict=True)] if telling else [""] * len(headers)
    seen: dict[str, int] = {}
    result = []
    for name in named:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if named.count(name) == 1 else f"{name}#{seen[name]}")
    return result


def _common(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all have alike; ``differs`` for the rest."""
    names = dict.fromkeys(name for environment in environments for name in environment)
    first = environments[0]
    alike = {name: all(environment.get(name) == first.get(name) for environment in environments) for name in names}
    return {name: first[name] if alike[name] else "differs" for name in names}
