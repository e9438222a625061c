"""--update-baselines: several fresh processes' runs of one environment become this device's baseline."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lowbit import baselines, runs
from lowbit.errors import LowbitError
from lowbit.pytest_plugin import children
from lowbit.pytest_plugin.collection import belongs_to_no_suite


def usable_runs(bench: Any) -> list[runs.Run]:
    """Kept runs of the same environment that hold every selected case, newest first, at most --baseline-runs."""
    kept = runs.matching(bench.settings.runs_dir, bench.header())
    return [run for run in kept if set(bench.selected) <= set(run.cases())][: bench.settings.baseline_runs]


def nothing_to_measure(bench: Any) -> bool:
    return bool(bench.selected) and len(usable_runs(bench)) >= bench.settings.baseline_runs


def update(bench: Any, exitstatus: int) -> None:
    """Measure the runs that are missing, one fresh process each, then write the baseline (with -k: those rows)."""
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise LowbitError(
            "--update-baselines: the run did not pass, nothing was accepted; mend or deselect what failed and run it again"
        )
    while len(usable := usable_runs(bench)) < bench.settings.baseline_runs:
        bench.progress(f"baseline run {len(usable) + 1} of {bench.settings.baseline_runs} in a fresh process")
        _measure_once_more(bench)
        if len(usable_runs(bench)) <= len(usable):
            raise LowbitError(
                f"--update-baselines: a further run did not become usable ({len(usable)} of "
                f"{bench.settings.baseline_runs}): a case failed or was disturbed; nothing was accepted"
            )
    bench.accepted = baselines.save(_merge(bench, baselines.build(usable)), bench.settings.baselines_dir)


def _merge(bench: Any, fresh: baselines.Baseline) -> baselines.Baseline:
    """The rows that were selected, into the accepted baseline; rows of cases that no suite has any more go."""
    path = baselines.find(bench.settings.baselines_dir, bench.device.slug, bench.choice.name, bench.choice.load_format)
    if path is None:
        return fresh
    old = baselines.load(path)
    if bench.everything_selected:
        if old.header.subject != fresh.header.subject:
            return fresh  # another quality protocol: nothing of it can stay beside the new rows
        gone = [case for case in old.rows if belongs_to_no_suite(case, bench.choice.parameters)]
        return baselines.replace_rows(old, fresh, [*bench.selected, *gone])
    return baselines.replace_rows(old, fresh, bench.selected)


def _measure_once_more(bench: Any) -> None:
    command = [sys.executable, "-m", "pytest", *children.session_args(bench.config), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=bench.config.rootpath, check=False)
    if result.returncode not in (0, 1):
        raise LowbitError(f"--update-baselines: the process measuring a further run ended with exit code {result.returncode}")
