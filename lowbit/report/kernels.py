"""``--profile``'s table: the kernels that take the most time per decoded token, and how fast they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowbit.record import Record
from lowbit.regression import short_name
from lowbit.report.layout import NONE, Heading, lay_out, number

NAME_WIDTH = 60

MEANING = (
    "GB/s: bytes that a kernel must read / its time, 10^9 per second. Inductor's Triton kernels: inputs and\n"
    "outputs once, as Inductor counts them. Of a linear's kernels in eager mode the longest: the linear's\n"
    f"weights over all its kernels. {NONE}: not known; the line below each table has the whole step's."
)


def tables(records: Sequence[Record], *, color: bool = False) -> str:
    """A table per profiled case and, once, what GB/s means; empty where nothing was profiled."""
    profiled = [record for record in records if "profile" in record.info]
    parts = [table(record, color=color) for record in profiled]
    return "\n\n".join([*parts, MEANING]) if parts else ""


def table(record: Record, *, color: bool = False) -> str:
    """The kernels of one case and, below, what they are together."""
    profile = record.info["profile"]
    unit = "token" if record.kind == "decode" else "prefill"
    headings = [
        Heading(f"{short_name(record.case)}: kernel", right=False),
        Heading("calls", f"/{unit}"),
        Heading("µs", f"/{unit}"),
        Heading("share", "of kernels"),
        Heading("GB/s"),
    ]
    total = profile["kernels_us"]
    cells = [
        [
            shorten(kernel["name"]),
            number(kernel["calls"]),
            number(kernel["us"]),
            f"{100 * kernel['us'] / total:.1f}%",
            number(kernel["gb_s"]),
        ]
        for kernel in profile["kernels"]
    ]
    return "\n".join([*lay_out(headings, cells, color=color), *_together(record, profile, unit)])


def _together(record: Record, profile: dict[str, Any], unit: str) -> list[str]:
    shown, total = sum(kernel["us"] for kernel in profile["kernels"]), profile["kernels_us"]
    line = (
        f"{len(profile['kernels'])} of {profile['distinct']} kernels, {100 * shown / total:.0f} % of "
        f"{number(total)} µs of kernels per {unit}"
    )
    wall_us = _wall_us(record)
    if wall_us is not None:
        line += f"; wall, without the profiler: {number(wall_us)} µs"
    return [line, *_step(record, total, wall_us), f"files: {profile['folder']}"]


def _wall_us(record: Record) -> float | None:
    if record.kind == "prefill":
        milliseconds = record.metrics.get("ttft_ms")
        return None if milliseconds is None else 1e3 * milliseconds
    speed = record.metrics.get("decode_tok_s")
    return 1e6 / speed if speed else None


def _step(record: Record, kernels_us: float, wall_us: float | None) -> list[str]:
    """The bytes that a decoded token must read, over the kernels' time and over the wall's: mbu is of the latter."""
    mbu, ceiling = record.metrics.get("mbu"), (record.info.get("ceilings") or {}).get("read_gb_s")
    if mbu is None or ceiling is None or wall_us is None:
        return []
    by_wall = mbu * ceiling
    megabytes, by_kernels = by_wall * wall_us / 1e3, by_wall * wall_us / kernels_us
    return [
        f"weights and KV: {number(megabytes)} MB per token = {number(by_kernels)} GB/s of kernel time, "
        f"{number(by_wall)} of wall time; measured ceiling {number(ceiling)}"
    ]


def shorten(name: str) -> str:
    """A kernel's name in one column: template arguments and return type say little, its beginning and end much."""
    name = name.removeprefix("void ")
    if len(name) <= NAME_WIDTH:
        return name
    return f"{name[: NAME_WIDTH - 12]}…{name[-11:]}"
