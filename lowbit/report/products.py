"""The table of single products: one line per kernel and shape, the batches side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lowbit.report.layout import NONE, Heading, lay_out, number


def table(timings: Iterable[Mapping[str, Any]], read_gb_s: float) -> list[str]:
    """Lines for ``lowbit.products.Timing`` dicts: by shape, the fastest at batch 1 first."""
    groups: dict[tuple[str, int, int], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for timing in timings:
        shape = (timing["product"], timing["n"], timing["k"])
        groups.setdefault(shape, {}).setdefault(timing["contender"], {})[timing["batch"]] = timing
    if not groups:
        return []
    batches = sorted({batch for rows in groups.values() for row in rows.values() for batch in row})
    headings = [
        *(Heading("product", right=False), Heading("[n, k]", right=False), Heading("format", right=False)),
        *(Heading(f"b{batch}", "µs") for batch in batches),
        *(Heading("b1", "GB/s"), Heading("of read", "%"), Heading("run", right=False)),
    ]
    cells = [
        _cells(shape, contender, row, batches)
        for shape, rows in groups.items()
        for contender, row in sorted(rows.items(), key=lambda item: item[1][min(item[1])]["us"])
    ]
    notes = [f"GB/s: weight as stored, x and y; % of the read bandwidth of this run, {read_gb_s:,.0f} GB/s"]
    if any(t["cached"] for rows in groups.values() for row in rows.values() for t in row.values()):
        notes.append("* all copies of the weight fit a cache: no bandwidth of memory")
    return [*lay_out(headings, cells), *notes]


def _cells(
    shape: tuple[str, int, int], contender: str, row: Mapping[int, Mapping[str, Any]], batches: list[int]
) -> list[str]:
    first = row[min(row)]
    mark = "*" if first["cached"] else ""
    how = ", ".join(word for word in (first["kernel"], first["how"]) if word)
    return [
        *(shape[0], f"{shape[1]}×{shape[2]}", contender),
        *(number(row[batch]["us"]) if batch in row else NONE for batch in batches),
        *(number(first["gb_s"]) + mark, f"{100 * first['share']:.0f}", how),
    ]
