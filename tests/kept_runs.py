"""Kept runs of one H200's decode cases, for tests of what is read from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit import runs
from lowbit.record import Record
from lowbit.runs import Header

STATS = {"min": 1.0, "max": 1.2, "mean": 1.1, "stddev": 0.1, "rounds": 2, "median": 1.1, "data": [1.0, 1.2]}


def header(**changes: Any) -> Header:
    made = Header(
        device="nvidia-h200",
        device_name="NVIDIA H200",
        model="llama-3.1-8b",
        load_format="dummy",
        protocol="embedded_512",
        suite="quick",
        environment={"torch": "2.11.0", "python": "3.12.3"},
        argv=["benches"],
    )
    return replace(made, **changes)


def node(case: str) -> str:
    return f"benches/test_decode.py::test_decode[{case}]"


def record(case: str = "a", tok_s: float = 268.7, **fields: Any) -> Record:
    fields.setdefault("metrics", {"decode_tok_s": tok_s})
    return Record(node(case), "decode", "bf16-torch", "default", "b1_c0", "llama-3.1-8b", "dummy", **fields)


def keep(root: Path, *records: Record, end: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run of ``records`` under ``root``; ``end`` are close's arguments, None leaves it interrupted."""
    with runs.start(root, header(**changes)) as writer:
        for each in records:
            writer.append(each, STATS if each.outcome == "measured" else None)
        if end is not None:
            writer.close(0, **end)
    return writer.path
