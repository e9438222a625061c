"""What the cases that failed have in common: the first thing that one looks for in a list of them."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.record import Record
from lowbit.report.content import Content

FACETS: tuple[tuple[str, Callable[[Record], str | None]], ...] = (
    ("format", lambda record: record.format),
    ("library", lambda record: record.backend),
    ("mode", lambda record: record.mode),
    ("workload", lambda record: record.workload),
    ("test", lambda record: record.kind),
)


CHANCE = 0.01
"""A half of all cases decode: that four which failed do too says nothing."""


def in_common(content: Content) -> list[str]:
    """``["format a16w4_g128-torchao", "mode eager"]``: what all failing cases share, and so many would not by chance.

    Empty with fewer than two failing cases. A format names its library, a workload its test: the narrower one is told.
    """
    failing = {finding.case for finding in content.failures}
    ran = [record for record in content.records if record.outcome != "skipped"]
    inside = [record for record in ran if record.case in failing]
    if len(inside) < 2 or len(inside) < len(failing):  # what stopped running has no record to compare
        return []
    shared: dict[str, str] = {}
    for name, read in FACETS:
        values = {read(record) for record in inside}
        value = values.pop() if len(values) == 1 else None
        likely = sum(read(record) == value for record in ran) / len(ran)
        if value is not None and likely ** len(inside) < CHANCE:
            shared[name] = value
    for narrow, wide in (("format", "library"), ("workload", "test")):
        if narrow in shared:
            shared.pop(wide, None)
    return [f"{name} {value}" for name, value in shared.items()]
