"""What a bench run prints: header, expectation, progress, and at the end the table, the answer and the footer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

import pytest

from lowbit import runs
from lowbit.pytest_plugin import collection
from lowbit.pytest_plugin.keys import CASE
from lowbit.report import recommendation, terminal
from lowbit.report.progress import Progress


def make_progress(config: pytest.Config) -> Progress:
    """Where long steps say what they wait for; silent in xdist workers and children, whose parent speaks."""
    if hasattr(config, "workerinput") or config.option.lowbit_child is not None or config.option.verbose < 0:
        return Progress(None)
    return Progress(sys.stdout)  # pytest's reporter, which is not there yet, will write to it too


def quiet_pytest_benchmark(config: pytest.Config) -> None:
    """Its table beside ours: three columns and short names, unless the user asked for others."""
    option = config.option
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")  # the libraries' own, a dozen per import
    if not any(str(word).startswith("--benchmark-columns") for word in config.invocation_params.args):
        option.benchmark_columns = ["median", "iqr", "rounds"]
    if option.lowbit_child is not None:
        option.benchmark_quiet = True


def header_lines(bench: Any) -> list[str]:
    lines = [
        f"lowbit: {bench.device.name} ({bench.device.slug}), model {bench.choice.name}, "
        f"load format {bench.choice.load_format}: {bench.choice.why}"
    ]
    if bench.baseline is not None:
        lines.append(f"lowbit: comparing with {bench.baseline.path} ({bench.baseline.runs} runs)")
    elif bench.settings.compare_if_baseline:
        lines.append(f"lowbit: no baseline of this device and model; accept this run with: {bench.accept_command()}")
    return lines


def expectation_lines(bench: Any, items: Iterable[pytest.Item]) -> list[str]:
    benches = [item for item in items if CASE in item.stash]
    measured = runs.wall_seconds(bench.settings.runs_dir, bench.header())
    minutes = collection.expected_minutes(benches, measured, bench.device.kind)
    basis = "by the last kept run" if measured else "a guess until a run is kept"
    processes = f" × {bench.settings.baseline_runs} runs" if bench.settings.update_baselines else ""
    return [f"lowbit: {len(benches)} cases, about {minutes:.0f} min{processes} ({basis})"]


def write(reporter: Any, bench: Any) -> None:
    """The final section of the run."""
    if bench.settings.child is not None:
        return
    if bench.error:
        reporter.write_line(f"ERROR: {bench.error}", red=True)
    records = list(bench.records.values())
    if not records:
        return
    from lowbit.lab import host_peak_mib  # brings torch, which tests/ alone need not wait for

    reporter.section("lowbit", sep="=", bold=True)
    color = bool(reporter.hasmarkup)
    vram = bench.settings.max_vram or bench.device.total_mib
    parts = [
        terminal.table(records, bench.verdicts, gated=bench.baseline is not None, color=color),
        terminal.notes(records, bench.verdicts, accept=bench.accept_command),
        recommendation.recommendation(
            records, max_kld=bench.settings.max_kld, max_vram_mib=vram, arguments=bench.model_arguments()
        ),
        terminal.footer(
            bench.lab.spent, wall_s=time.perf_counter() - bench.started, host_peak_mib=host_peak_mib()
        ),
    ]
    if bench.writer is not None:
        parts.append(f"run kept in {bench.writer.path}")
    if bench.accepted is not None:
        parts.append(f"baseline written: {bench.accepted}")
    elif bench.baseline is None and not bench.settings.update_baselines:
        parts.append(f"not compared with a baseline; accept this machine's figures with: {bench.accept_command()}")
    for part in parts:
        if part:
            reporter.write_line(part)
