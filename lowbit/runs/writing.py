"""Writing a kept run: case by case while it goes, its document at the end."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit import documents
from lowbit.errors import LowbitError
from lowbit.record import Record
from lowbit.runs.kept import DOCUMENT, JOURNAL, JUDGED, Entry, Header, Run
from lowbit.runs.reading import latest_incomplete


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

    def discard(self) -> None:
        """Take the run's folder away: for one that was refused before its first case."""
        self._release()
        shutil.rmtree(self.path, ignore_errors=True)

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


def _words(selection: Mapping[str, str]) -> str:
    return "".join(f"{flag} {expression!r}, " for flag, expression in selection.items())


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
