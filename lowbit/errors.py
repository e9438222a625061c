"""The one exception that reaches a user as a message instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterable


class LowbitError(Exception):
    """A mistake that the user can mend. Its text says what, on what, expected, got, and what to do next."""


class LoadError(LowbitError):
    """The model can't be loaded: no case of this run can be measured."""


def unknown(what: str, got: str, known: Iterable[str]) -> LowbitError:
    """The error for a name that is not in a table: lists the names that are."""
    return LowbitError(f"unknown {what} {got!r}; known: {', '.join(sorted(known))}")


def tell_left_out(why: LowbitError | str) -> None:
    """One of many files can't be read: it costs itself, and is named on standard error."""
    print(f"lowbit: left out: {why}", file=sys.stderr)
