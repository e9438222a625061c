"""Digests: what the history needs of a kept run, in a hidden file beside it, so that many nights are read in a second.

A digest never stands for its run: it names the size and the time of change of the file that it was made from, and where
these are others, or the digest can't be read or written, the run itself is read. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYOUT = 1
"""Of what is in a digest; one of another layout is made anew."""


def path_of(source: Path) -> Path:
    """``…/journal.jsonl`` → ``…/.journal.jsonl.digest``: not among the files that are searched for runs."""
    return source.with_name(f".{source.name}.digest")


def stamp(source: Path) -> list[int] | None:
    """[size in bytes, time of the last change in ns, layout]: a digest with another one is not this file's.

    None for a file that is not there.
    """
    try:
        status = source.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, LAYOUT]


def load(source: Path) -> list[Any] | None:
    """What ``save`` was given for this file as it is now; None where there is no such digest."""
    try:
        data = json.loads(path_of(source).read_bytes())
        return list(data["rows"]) if data["stamp"] == (stamp(source) or ()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(source: Path, made_from: Sequence[int] | None, rows: Sequence[Any]) -> None:
    """Keep ``rows`` beside ``source``, whose stamp before it was read was ``made_from``.

    A folder that can't be written (an artefact, another user's history) goes without: it is read in full each time.
    """
    if made_from is None:
        return
    path = path_of(source)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        try:
            temporary.write_text(json.dumps({"stamp": list(made_from), "rows": list(rows)}), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
