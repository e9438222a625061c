"""Builders of kept runs, a night each, for the tests of what is drawn from many of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

from lowbit import runs
from lowbit.record import Record

DECODE = "benches/test_decode.py::test_decode[{format}-default-b1_c0]"
QUALITY = "benches/test_quality.py::test_quality[{format}]"
FIRST = datetime(2026, 5, 1, 3, tzinfo=UTC)
TORCH = {"torch": "2.11.0", "torchao": "0.18.0", "driver": "580.159.04"}


def decode(format: str = "bf16-torch", outcome: str = "measured", model: str = "llama-3.1-8b", **metrics) -> Record:
    """A decode case's record with these metrics."""
    record = Record(DECODE.format(format=format), "decode", format, "default", "b1_c0", model, "dummy", "bf16", outcome)
    record.metrics = metrics
    return record


def quality(format: str = "bf16-torch", **metrics) -> Record:
    """A quality case's record with these metrics."""
    record = Record(QUALITY.format(format=format), "quality", format, None, None, "llama-3.1-8b", "dummy", "bf16")
    record.metrics = metrics
    return record


def keep(root: Path, records: list[Record], *, night: int = 0, **fields) -> Path:
    """Keep a run under ``root`` that started ``night`` nights after FIRST; returns its folder. ``fields``: Header's."""
    defaults = {
        "device": "nvidia-h200",
        "device_name": "NVIDIA H200",
        "model": "llama-3.1-8b",
        "load_format": "dummy",
        "protocol": "embedded_512",
        "suite": "quick",
        "environment": TORCH,
        "started": (FIRST + timedelta(days=night)).isoformat(),
    }
    without_waiting = mock.patch("os.fsync")  # 40 nights of it are seconds
    with without_waiting, runs.start(root, runs.Header(**defaults | fields)) as writer:
        for record in records:
            stats = {"median": 1 / 200, "rounds": 3} if record.kind == "decode" else None
            writer.append(record, stats)
        return writer.close(0).parent
