"""Kept runs: append-only folders under ``.lowbit/runs``, one line on disk per finished case before the next starts.

``<UTC>-<pid>-<hex>/journal.jsonl`` holds a header, one line per record (fsynced) and, once the run ended, an end line;
a SIGKILL costs the case in flight. ``run.json`` is written at the end: pytest-benchmark's document, raw samples kept.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit import __version__, documents
from lowbit.errors import LowbitError
from lowbit.record import Record

JOURNAL, DOCUMENT = "journal.jsonl", "run.json"
JUDGED = "judged"
"""Of a record's info: the gate's verdicts with their confirmations, and the baseline that they were reached by."""


@dataclass(frozen=True)
class Header:
    """What a run was made with. ``device`` is the slug; ``protocol`` names text and window of the quality cases;
    ``selection`` holds the ``-k`` and ``-m`` expressions that were given; ``commit`` is lowbit's own."""

    device: str
    device_name: str
    model: str
    load_format: str
    protocol: str
    suite: str
    environment: Mapping[str, str]
    argv: list[str] = field(default_factory=list)
    selection: Mapping[str, str] = field(default_factory=dict)
    started: str = field(default_factory=documents.now)
    lowbit: str = __version__
    commit: str = ""

    @property
    def subject(self) -> tuple[str, str, str, str]:
        """What is measured: runs that differ in it are foreign to each other. Versions are no part of it."""
        return (self.device, self.model, self.load_format, self.protocol)


@dataclass(frozen=True)
class Entry:
    """One finished case: its record, pytest-benchmark's stats (None if it was not timed) and its wall time."""

    record: Record
    stats: dict[str, Any] | None
    wall_s: float = 0.0


@dataclass(frozen=True)
class Run:
    """A kept run as read from disk. ``complete`` is False for one that was interrupted or killed."""

    path: Path
    header: Header
    entries: dict[str, Entry] = field(default_factory=dict)
    complete: bool = False
    regressed: bool = False
    exit_status: int | None = None

    def cases(self) -> list[str]:
        """Cases with a result to build on: measured, or skipped with its reason. Failed and void ones have none."""
        return [case for case, entry in self.entries.items() if entry.record.outcome in ("measured", "skipped")]

    def records(self) -> list[Record]:
        return [entry.record for entry in self.entries.values()]


class RunWriter:
    """An open run. Every method raises LowbitError naming the path when the disk refuses."""

    def __init__(self, run: Run) -> None:
        self.path, self.header, self.entries = run.path, run.header, dict(run.entries)
        self._since = time.monotonic()
        try:
            self._file = os.open(run.path / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._refused(error) from error

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    def append(self, record: Record, stats: Mapping[str, Any] | None) -> None:
        """Put a finished case on disk. Returns once it is there. A case that comes again replaces its first entry."""
        entry = Entry(record, dict(stats) if stats is not None else None, round(time.monotonic() - self._since, 3))
        self._write({"type": "case", "record": record.to_dict(), "stats": entry.stats, "wall_s": entry.wall_s})
        self.entries[record.case] = entry
        self._since = time.monotonic()

    def judged(self, case: str, verdicts: Iterable[Mapping[str, Any]], by: str) -> None:
        """Put a kept case's verdicts on disk; ``by`` names the baseline. Those that come again replace the first."""
        judged = {"by": by, "verdicts": [dict(verdict) for verdict in verdicts]}
        self._write({"type": "judged", "case": case, **judged})
        self.entries[case].record.info[JUDGED] = judged

    def close(self, exit_status: int, *, complete: bool = True, regressed: bool = False) -> Path:
        """End the run and write ``run.json``. ``regressed`` keeps it from ever becoming a baseline by itself."""
        end = {"exit_status": exit_status, "complete": complete, "regressed": regressed, "finished": documents.now()}
        try:
            self._write({"type": "end", **end})
        finally:
            self._release()
        path = self.path / DOCUMENT
        documents.write(path, to_document(self.header, self.entries, end), self._consequence())
        return path

    def _consequence(self) -> str:
        return f"{len(self.entries)} finished cases are in {self.path / JOURNAL}"

    def _refused(self, error: OSError) -> LowbitError:
        return documents.unwritable(self.path / JOURNAL, error, self._consequence())

    def _write(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line, default=str) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            raise self._refused(error) from error

    def _release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def start(root: Path, header: Header) -> RunWriter:
    """Begin a run in a new folder under ``root``. Raises LowbitError when it can't be written."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    path = root / f"{stamp}-{os.getpid()}-{secrets.token_hex(2)}"
    try:
        path.mkdir(parents=True)
        documents.sync_folder(root)
    except OSError as error:
        raise documents.unwritable(path, error, "the run could not be started") from error
    writer = RunWriter(Run(path, header))
    try:
        writer._write({"type": "header", "schema": documents.SCHEMA, **asdict(header)})
    except LowbitError:
        shutil.rmtree(path, ignore_errors=True)  # a run without a header is none
        raise
    return writer


def resume(root: Path, header: Header) -> RunWriter:
    """Take up the newest interrupted run of this subject, suite, selection and environment; LowbitError without one."""
    run = latest_incomplete(root, header)
    if run is None:
        raise LowbitError(
            f"--resume: no interrupted run of {header.model} ({header.load_format}), suite {header.suite}, "
            f"{_words(header.selection)}in this environment on {header.device} under {root}; run without --resume"
        )
    journal = run.path / JOURNAL
    try:
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)  # a torn last line must not run into the next one
        (run.path / DOCUMENT).unlink(missing_ok=True)
    except OSError as error:
        raise documents.unwritable(journal, error, "the run could not be resumed") from error
    return RunWriter(run)


def read(path: Path) -> Run:
    """A kept run, from its folder, ``run.json`` or journal. Raises LowbitError for what is none."""
    if path.is_dir():
        path = path / JOURNAL if (path / JOURNAL).exists() else path / DOCUMENT
    return _read_journal(path) if path.suffix == ".jsonl" else _from_document(path)


def list_runs(root: Path) -> list[Path]:
    """Folders of all kept runs, oldest first."""
    return sorted(path.parent for path in root.glob(f"*/{JOURNAL}"))


def latest_incomplete(root: Path, header: Header) -> Run | None:
    """The newest run of this subject, suite, ``-k``, ``-m`` and environment if it was interrupted; None otherwise.

    Parts of one sweep share a folder of runs (docs/slurm.md): each is told by its selection.
    """
    for path in _alike(root, header):
        run = read(path)
        if run.header.suite == header.suite and dict(run.header.selection) == dict(header.selection):
            return None if run.complete else run
    return None


def _words(selection: Mapping[str, str]) -> str:
    return "".join(f"{flag} {expression!r}, " for flag, expression in selection.items())


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
    """The last known wall time of each case on this subject, whatever the versions; {} before the first run."""
    seconds: dict[str, float] = {}
    for path in list_runs(root)[-20:]:
        other = _header_if_any(path / JOURNAL)
        if other is not None and other.subject == header.subject:
            seconds |= {case: entry.wall_s for case, entry in read(path).entries.items()}
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
        raise LowbitError(f"{path}: expected a run's journal, got no whole line")
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


def to_document(header: Header, entries: Mapping[str, Entry], end: Mapping[str, Any]) -> dict[str, Any]:
    """``run.json``: pytest-benchmark's document. ``end`` has ``complete``, ``regressed`` and ``exit_status``."""
    timed, untimed = [], []
    for entry in entries.values():
        record = entry.record
        data = {**record.to_dict(), "wall_s": entry.wall_s}
        params = {"format": record.format, "mode": record.mode, "workload": record.workload}
        if entry.stats is None:
            untimed.append(data)
        else:
            timed.append(documents.benchmark(record.case, record.kind, params, entry.stats, data))
    lowbit = {"kind": "run", "header": asdict(header), **end, "untimed": untimed}
    return documents.document(timed, lowbit, header.environment, header.commit)


def _from_document(path: Path) -> Run:
    data = documents.read(path, "lowbit run")
    kind = data["lowbit"].get("kind", "file of another kind")
    if kind == "merge":
        devices = dict.fromkeys(part["header"]["device"] for part in data["lowbit"]["runs"])
        raise LowbitError(
            f"{path}: expected one lowbit run, got a merge of {len(data['lowbit']['runs'])} (on {', '.join(devices)}); "
            f"take a device's out: python -m lowbit merge {path} --device {next(iter(devices))} -o ONE.json"
        )
    if kind != "run":
        raise LowbitError(f"{path}: expected a lowbit run, got a {kind}")
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
