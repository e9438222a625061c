"""Writes reports: whole or not at all, with a reason where the disk refuses."""

from __future__ import annotations

import os
from pathlib import Path

from lowbit.errors import LowbitError


def write_page(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``. Raises LowbitError, leaving the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _refused(path, error) from error


def write_summary(path: Path, text: str) -> None:
    """Append to ``$GITHUB_STEP_SUMMARY``, which earlier commands of the step have written to; replace any other."""
    if os.environ.get("GITHUB_STEP_SUMMARY") != str(path):
        write_page(path, text)
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> LowbitError:
    return LowbitError(f"can't write {path}: {error.strerror or error}; choose another place")
