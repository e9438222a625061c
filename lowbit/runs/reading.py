"""Reading kept runs: one of them, and those of a folder that are alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit import documents
from lowbit.errors import LowbitError, tell_left_out
from lowbit.record import Record
from lowbit.runs.kept import DOCUMENT, JOURNAL, JUDGED, Entry, Header, Run


def read(path: Path) -> Run:
    """A kept run, from its folder, ``run.json`` or journal. Raises LowbitError for what is none."""
    if path.is_dir():
        path = path / JOURNAL if (path / JOURNAL).exists() else path / DOCUMENT
    return _read_journal(path) if path.suffix == ".jsonl" else _from_document(path)


def list_runs(root: Path) -> list[Path]:
    """Folders of all kept runs, oldest first."""
    return sorted(path.parent for path in root.glob(f"*/{JOURNAL}"))


def holds_runs(path: Path) -> bool:
    """Whether this is no run's own folder but one of runs, as ``.lowbit/runs``; an empty folder is one too."""
    return path.is_dir() and not any((path / name).exists() for name in (JOURNAL, DOCUMENT))


def newest(root: Path) -> Run | None:
    """The newest run of a folder that can be read; a later one that was killed as it began is named on standard error.
    None where the folder holds none."""
    for path in reversed(list_runs(root)):
        try:
            return read(path)
        except LowbitError as error:
            tell_left_out(error)
    return None


def latest_incomplete(root: Path, header: Header) -> Run | None:
    """The newest run of this subject, suite, ``-k``, ``-m`` and environment if it was interrupted; None otherwise.

    Parts of one sweep share a folder of runs (docs/slurm.md): each is told by its selection.
    """
    for path in _alike(root, header):
        run = read(path)
        if run.header.suite == header.suite and dict(run.header.selection) == dict(header.selection):
            return None if run.complete else run
    return None


def matching(root: Path, header: Header, n: int | None = None) -> list[Run]:
    """Up to ``n`` runs that may become a baseline, newest first: same subject and environment, whole, unregressed.

    None from before a regressed one: who accepts a slowdown in an unchanged environment means what is measured now.
    """
    found: list[Run] = []
    for path in _alike(root, header):
        if n is not None and len(found) >= n:
            break
        run = read(path)
        if run.regressed:
            break
        if run.complete:
            found.append(run)
    return found


def wall_seconds(root: Path, header: Header) -> dict[str, float]:
    """The last known wall time of each case on this subject, whatever the versions; {} before the first run.

    By the process that measured it: with workers, an entry's own wall time is how long after another case it came in.
    """
    seconds: dict[str, float] = {}
    for path in list_runs(root)[-20:]:
        other = _header_if_any(path / JOURNAL)
        if other is not None and other.subject == header.subject:
            seconds |= {
                case: entry.record.info.get("wall_s", entry.wall_s) for case, entry in read(path).entries.items()
            }
    return seconds


def _alike(root: Path, header: Header) -> Iterator[Path]:
    """Runs of this subject and environment, newest first. Of the others no more than the first line is read."""
    for path in reversed(list_runs(root)):
        other = _header_if_any(path / JOURNAL)
        if other and other.subject == header.subject and dict(other.environment) == dict(header.environment):
            yield path


def _header_if_any(journal: Path) -> Header | None:
    """None for a run killed before its first line was whole and for another schema's: they can't be alike."""
    try:
        with journal.open("rb") as file:
            return _header(journal, _line(journal, 1, file.readline()))
    except LowbitError:
        return None


def _header(path: Path, data: Mapping[str, Any]) -> Header:
    documents.check_schema(path, data.get("schema"))
    try:
        return Header(**{key: value for key, value in data.items() if key not in ("type", "schema")})
    except TypeError as error:
        raise LowbitError(f"{path}: not the header of a lowbit run ({error})") from error


def _line(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw)
        if isinstance(data, dict) and "type" in data:
            return data
    except ValueError as error:
        raise LowbitError(f"{path}: line {number} is broken ({error}); move this run's folder away") from error
    raise LowbitError(f"{path}: line {number} is no line of a lowbit journal; move this run's folder away")


def _read_journal(path: Path) -> Run:
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is empty or torn
    except OSError as error:
        raise LowbitError(f"{path}: can't read this run ({error.strerror})") from error
    if not lines:
        raise LowbitError(
            f"{path}: expected a run's journal, got no whole line (killed as it began); move its folder away"
        )
    run = Run(path.parent, _header(path, _line(path, 1, lines[0])))
    for number, raw in enumerate(lines[1:], start=2):
        data = _line(path, number, raw)
        try:
            if data["type"] == "end":
                run = replace(run, **{key: data[key] for key in ("complete", "regressed", "exit_status")})
            elif data["type"] == JUDGED:
                info = run.entries[data["case"]].record.info
                info[JUDGED] = {"by": data["by"], "verdicts": data["verdicts"]}
            else:
                record = Record.from_dict(data["record"])
                run.entries[record.case] = Entry(record, data["stats"], data["wall_s"])
                run = replace(run, complete=False)  # taken up again after an end line
        except (KeyError, TypeError) as error:
            raise LowbitError(f"{path}: line {number} lacks {error}; move this run's folder away") from error
    return run


def _from_document(path: Path) -> Run:
    data = documents.read(path, "lowbit run")
    kind = data["lowbit"].get("kind", "file of another kind")
    if kind == "merge":
        devices = dict.fromkeys(part["header"]["device"] for part in data["lowbit"]["runs"])
        way_out = (
            f"take a device's out: python -m lowbit merge {path} --device {next(iter(devices))} -o ONE.json"
            if len(devices) > 1
            else "they differ in model, protocol or environment: merge those of one environment"
        )
        raise LowbitError(
            f"{path}: expected one lowbit run, got a merge of {len(data['lowbit']['runs'])} (on {', '.join(devices)}); "
            f"{way_out}"
        )
    if kind != "run":
        raise LowbitError(f"{path}: expected a lowbit run, got a {kind}; kept runs are in .lowbit/runs")
    return from_document(path, data)


def from_document(path: Path, data: Mapping[str, Any]) -> Run:
    """The run that ``to_document`` made this of. Raises LowbitError, naming ``path``, for another shape."""
    part = data["lowbit"]
    try:
        rows = [(row["extra_info"]["lowbit"], row["stats"]) for row in data["benchmarks"]]
        entries: dict[str, Entry] = {}
        for record, stats in [*rows, *((row, None) for row in part["untimed"])]:
            wall_s = record.pop("wall_s")
            entries[record["case"]] = Entry(Record.from_dict(record), stats, wall_s)
        header = _header(path, {"schema": part["schema"], **part["header"]})
        return Run(path.parent, header, entries, part["complete"], part["regressed"], part["exit_status"])
    except (KeyError, TypeError, AttributeError) as error:
        raise LowbitError(
            f"{path}: expected a lowbit run, a part of it is missing or of another shape ({error})"
        ) from error
