"""The formats of embedding and head alone: packed tables of our own (lowbit/backends/tables.py)."""

from __future__ import annotations

from lowbit.formats.row import TABLES, Format, row

ROWS: tuple[Format, ...] = (
    row(
        *("a16w8", "tables", "int8", (16, 8), "int8", "head8", "embed8"),
        targets=TABLES,
        suite="full",
        note="rows are gathered, then dequantized; which kernel multiplies with the head stands in coverage",
    ),
    row(
        *("a16w4_g64", "tables", "int4_g64", (16, 4), "int4", "head4", "embed4"),
        group_size=64,
        targets=TABLES,
        suite="full",
        note="as a16w8-tables; two codes a byte, one scale and one offset per 64",
    ),
)
