"""Columns of text: widths, numbers and colours that every table of the report shares."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 100
"""Of tables and text, at most; see ``columns``."""
NARROWEST = 40

NONE = "–"

SHORT = (("max-autotune-no-cudagraphs", "max-auto-no-cg"), ("max-autotune", "max-auto"), ("bitsandbytes", "bnb"))
"""What is shortened in names, in this order, while a table is wider than ``columns``."""

COLORS = {"REGRESSED": 31, "MISSING": 31, "LOST": 31, "failed": 31, "void": 33, "new": 33, "skipped": 33, "faster": 32}
COLORS |= {"worse": 31, "better": 32}
BOLD = 1


def columns() -> int:
    """WIDTH, or a narrower terminal's own; WIDTH in a file or a pipe."""
    try:
        found = os.get_terminal_size(sys.__stdout__.fileno()).columns  # type: ignore[union-attr]  # None: no stdout
    except (OSError, ValueError, AttributeError):
        return WIDTH
    return min(WIDTH, max(NARROWEST, found)) if found else WIDTH  # 0: a terminal that was never told


class Heading(NamedTuple):
    """A column's title over its unit. Numbers are set to the right; the others are names, which may be shortened."""

    title: str
    unit: str = ""
    right: bool = True


def lay_out(
    headings: Sequence[Heading], cells: Sequence[Sequence[str]], *, color: bool = False, shorten: bool = True
) -> list[str]:
    """The lines of a table: one or two of headings, one per row of cells. The last column colours its line.

    ``shorten``: names are, while the table is wider than ``columns``.
    """
    rows = [list(row) for row in cells]
    lines = _pad(headings, rows)
    for old, new in SHORT if shorten else ():
        if len(lines[0]) <= columns():
            break
        rows = [
            [cell if heading.right else cell.replace(old, new) for cell, heading in zip(row, headings, strict=True)]
            for row in rows
        ]
        lines = _pad(headings, rows)
    head, body = [line.rstrip() for line in lines[:2] if line.strip()], [line.rstrip() for line in lines[2:]]
    if color:
        head = [paint(line, BOLD) for line in head]
        body = [paint(line, COLORS.get(row[-1])) for line, row in zip(body, rows, strict=True)]
    return [*head, *body]


def beside(lines: Sequence[str], notes: Sequence[str]) -> list[str]:
    """A last column of free text behind a table's lines; what passes ``columns`` goes on below, in the same column."""
    column = max(map(len, lines)) + 1
    told: list[str] = []
    for line, note in zip(lines, notes, strict=True):
        first, *more = textwrap.wrap(note, max(12, columns() - column), break_long_words=False) or [""]
        told += [f"{line.ljust(column)}{first}".rstrip(), *(" " * column + rest for rest in more)]
    return told


def fill(text: str, indent: str) -> str:
    """Paragraph within ``columns``, every line indented; names are not broken."""
    return hang(text, indent, first=indent)


def hang(text: str, indent: str = "  ", *, first: str = "") -> str:
    """Paragraph within ``columns``, all lines but the first indented; names are not broken."""
    return textwrap.fill(
        text, columns(), initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _pad(headings: Sequence[Heading], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[heading.title for heading in headings], [heading.unit for heading in headings], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= columns() else " "
    return [
        gap.join(
            text.rjust(width) if heading.right else text.ljust(width)
            for text, width, heading in zip(line, widths, headings, strict=True)
        )
        for line in lines
    ]


def paint(text: str, code: int | None) -> str:
    return text if code is None else f"\x1b[{code}m{text}\x1b[0m"


def count(number: int, noun: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def number(value: float | None) -> str:
    """Four significant digits at most, thousands whole: 59.8, 268.7, 1204, 16131; a dash for None."""
    if value is None:
        return NONE
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def divergence(value: float | None) -> str:
    """A KL divergence with four decimals; the small ones (8 bits) by their magnitude: 0.0312, 4.2e-05, 0."""
    if value is None:
        return NONE
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}" if value else "0"
