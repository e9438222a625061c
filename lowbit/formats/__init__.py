"""Every format of the suite, one row each, a file per library. A new format is one row in its library's file here.

A row names what is stored and computed (activation bits, weight bits, group size), which library does it, and what it
needs. The library's own file under ``lowbit/backends`` turns the row's ``scheme`` into quantized modules.
"""

from __future__ import annotations

from lowbit.errors import unknown
from lowbit.formats import bitsandbytes, gemlite, hqq, native, reference, torch, torchao
from lowbit.formats.row import LINEARS, Format, Suite, Unmet, UnmetKind

__all__ = ["FORMATS", "LINEARS", "Format", "Suite", "Unmet", "UnmetKind", "find"]

LIBRARIES = (torch, torchao, gemlite, bitsandbytes, hqq, native, reference)
"""In the order in which their rows run and are listed."""

FORMATS: dict[str, Format] = {row.id: row for library in LIBRARIES for row in library.ROWS}


def find(format_id: str) -> Format:
    """The row with this id. Raises LowbitError naming the known ids."""
    try:
        return FORMATS[format_id]
    except KeyError:
        raise unknown("format", format_id, FORMATS) from None
