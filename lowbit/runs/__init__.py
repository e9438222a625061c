"""Kept runs: append-only folders under ``.lowbit/runs``, one line on disk per finished case before the next starts.

``<UTC>-<pid>-<hex>/journal.jsonl`` holds a header, one line per record (fsynced) and, once the run ended, an end line;
a SIGKILL costs the case in flight. ``run.json`` is written at the end: pytest-benchmark's document, raw samples kept.
"""

from lowbit.runs.kept import DOCUMENT, JOURNAL, JUDGED, Entry, Header, Run
from lowbit.runs.reading import (
    from_document,
    holds_runs,
    latest_incomplete,
    list_runs,
    matching,
    newest,
    read,
    wall_seconds,
)
from lowbit.runs.writing import RunWriter, resume, start, to_document

__all__ = [
    "DOCUMENT",
    "JOURNAL",
    "JUDGED",
    "Entry",
    "Header",
    "Run",
    "RunWriter",
    "from_document",
    "holds_runs",
    "latest_incomplete",
    "list_runs",
    "matching",
    "newest",
    "read",
    "resume",
    "start",
    "to_document",
    "wall_seconds",
]
