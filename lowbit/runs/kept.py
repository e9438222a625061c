"""What a kept run is: its header, its finished cases, its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit import __version__, documents
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
