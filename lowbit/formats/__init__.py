"""Every format of the suite, one row each, a file per library. A new format is one row in its library's file here.

A row names what is stored and computed (activation bits, weight bits, group size), which library does it, and what it
needs. The library's own file under ``lowbit/backends`` turns the row's ``scheme`` into quantized modules. ``recipes``
are rows made of these rows.
"""

from __future__ import annotations

from lowbit.errors import LowbitError
from lowbit.formats import (
    auto,
    bitsandbytes,
    calibrated,
    gemlite,
    hqq,
    kv,
    native,
    recipes,
    reference,
    tables,
    torch,
    torchao,
    torchao_reference,
)
from lowbit.formats.row import LINEARS, Format, Suite, Unmet, UnmetKind, table_of, unknown_format

__all__ = ["FORMATS", "LINEARS", "Format", "Suite", "Unmet", "UnmetKind", "find", "register"]

LIBRARIES = (torch, torchao, torchao_reference, gemlite, bitsandbytes, hqq, native, calibrated, reference, tables, kv)
"""In the order in which their rows run and are listed."""

FORMATS: dict[str, Format] = table_of(row for library in LIBRARIES for row in library.ROWS)
FORMATS = table_of([*FORMATS.values(), *recipes.rows(FORMATS), *auto.ROWS])


def find(format_id: str) -> Format:
    """The row with this id. Raises LowbitError naming the known ids."""
    try:
        return FORMATS[format_id]
    except KeyError:
        raise unknown_format(format_id, FORMATS) from None


def rows_of(fmt: Format) -> list[Format]:
    """The rows that a recipe mixes, each once; any other row itself."""
    return [find(part) for part in dict.fromkeys(fmt.parts.values())] or [fmt]


def head_row(fmt: Format) -> Format | None:
    """The row of lm_head: a recipe's part, another row itself if it names the head; None where it stays as it is."""
    named = {name: part for _, name, part in recipes.assignment(fmt, 0)}
    part = named.get("lm_head")
    return None if part is None else fmt if part == fmt.id else find(part)


def register(row: Format) -> Format:
    """Add a row to this process's table, last in order. Raises LowbitError if its id is taken by another row."""
    if FORMATS.setdefault(row.id, row) != row:
        raise LowbitError(f"there is a format {row.id} already: give the recipe another name")
    return row
