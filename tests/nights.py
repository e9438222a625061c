"""Builders of kept runs, a night each, for the tests of what is drawn from many of them.

``python tests/nights.py DIR --nights 200 --cases 500`` writes a history of real size, to time what reads it
(docs/trend.md): half of it decode cases with 130 timed steps each, as on an H200 (2 to 6 KB a case).
"""

from __future__ import annotations

import argparse
import random
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


NAMES = (
    *("tpot_ms_p50", "tpot_ms_p90", "tpot_ms_p99", "prompt_ttft_ms", "prefill_tok_s", "throughput_tok_s", "latency_ms"),
    *("weights_mib", "vram_peak_mib", "vram_alloc_peak_mib", "vram_quantize_peak_mib", "vram_start_mib"),
    *("vram_end_mib", "energy_j_per_tok", "mbu", "load_s", "quantize_s", "compile_s", "graph_breaks", "recompiles"),
)
"""What a decode case on a GPU has besides ``decode_tok_s``."""


def night_of(cases: int, chance: random.Random) -> list[Record]:
    """``cases`` records of a real run's size; unchanged but for 0.4 % of noise."""
    records = []
    for number in range(cases):
        name = f"a16w4_g{number}-torchao"
        if number % 2:
            records.append(quality(name, ppl_embedded_512=2.15, kld_embedded_512_8176tok=0.0014))
            continue
        step = (1 + 0.004 * chance.gauss(0, 1)) / 250
        metrics = {name: 100 * chance.random() for name in NAMES} | {"decode_tok_s": 1 / step, "vram_peak_mib": 6400.0}
        record = decode(name, **metrics)
        record.samples = {"step_s": [step * (1 + 0.01 * chance.random()) for _ in range(130)]}
        records.append(record)
    return records


def main() -> None:
    """Write the history that the arguments ask for."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nights", type=int, default=200)
    parser.add_argument("--cases", type=int, default=500)
    options = parser.parse_args()
    chance = random.Random(0)
    for night in range(options.nights):
        keep(options.folder, night_of(options.cases, chance), night=night)


if __name__ == "__main__":
    main()
