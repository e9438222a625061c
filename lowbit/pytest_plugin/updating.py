"""--update-baselines: several fresh processes' runs of one environment become this device's baseline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from lowbit import baselines, regression, runs
from lowbit.errors import LowbitError
from lowbit.pytest_plugin import children
from lowbit.pytest_plugin.collection import belongs_to_no_suite
from lowbit.pytest_plugin.xdist import Workers

if TYPE_CHECKING:
    from lowbit.pytest_plugin.session import BenchSession

T = TypeVar("T")


def usable_runs(bench: BenchSession) -> list[runs.Run]:
    """Kept runs of the same environment that hold every selected case, newest first, at most --baseline-runs."""
    kept = runs.matching(bench.settings.runs_dir, bench.header())
    return [run for run in kept if set(bench.selected) <= set(run.cases())][: bench.settings.baseline_runs]


def nothing_to_measure(bench: BenchSession) -> bool:
    """True when --update-baselines can take kept runs alone."""
    # A worker must do what its controller hands out.
    wanted = bench.settings.update_baselines and bool(bench.selected) and not bench.in_worker
    return wanted and len(usable_runs(bench)) >= bench.settings.baseline_runs


def update(bench: BenchSession, exitstatus: int) -> None:
    """Measure the runs that are missing, one fresh process each, then write the baseline (with -k: those rows).

    Sets ``bench.accepted`` and ``bench.warnings``. Raises LowbitError, nothing written, when a run can't be used.
    """
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED or not bench.selected:
        return
    if exitstatus != pytest.ExitCode.OK:
        raise LowbitError(
            "--update-baselines: the run did not pass, nothing was accepted; mend or deselect what failed, "
            "then run it again"
        )
    wanted = bench.settings.baseline_runs
    workers: Any = bench.config.pluginmanager.get_plugin(Workers.NAME)
    workers.end(bench.config)  # their GPUs are for the processes to come
    while len(usable := usable_runs(bench)) < wanted:
        with bench.lab.spent.on("measure"):
            _measure_once_more(bench, len(usable) + 1)
        if len(usable_runs(bench)) <= len(usable):
            raise LowbitError(
                f"--update-baselines: a further run can't be used ({len(usable)} of {wanted} are there), nothing was "
                f"accepted; {_why_unusable(bench)}"
            )
    baseline = _merge(bench, _restrict(baselines.build(usable), set(bench.selected)))
    bench.accepted = baselines.save(baseline, bench.settings.baselines_dir)
    bench.warnings = regression.find_blunt(baseline.rows.values(), bench.device.kind)


def _restrict(fresh: baselines.Baseline, cases: set[str]) -> baselines.Baseline:
    """Without the cases that were not selected: a kept run of the whole suite has more than ``-k`` asks to accept."""

    def chosen(found: Mapping[str, T]) -> dict[str, T]:
        return {case: value for case, value in found.items() if case in cases}

    return replace(fresh, rows=chosen(fresh.rows), stats=chosen(fresh.stats), skips=chosen(fresh.skips))


def _merge(bench: BenchSession, fresh: baselines.Baseline) -> baselines.Baseline:
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


def _measure_once_more(bench: BenchSession, number: int) -> None:
    """One more run like this one, in a process of its own: it keeps its run, and prints a dot per case."""
    bench.progress.done()
    reporter: Any = bench.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.ensure_newline()
        reporter.write_line(f"lowbit: baseline run {number} of {bench.settings.baseline_runs}, in a fresh process")
    command = [
        *(sys.executable, "-m", "pytest", *children.session_args(bench.config)),
        *("-q", "--no-header", "--no-summary", "-p", "no:cacheprovider"),
    ]
    variables = {key: value for key, value in os.environ.items() if key not in children.DROPPED_VARIABLES}
    sys.stdout.flush()
    result = subprocess.run(command, cwd=bench.config.invocation_params.dir, env=variables, check=False)
    if result.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise LowbitError(
            f"--update-baselines: the process measuring a further run ended with exit code {result.returncode}, "
            f"nothing was accepted; see what it says: {' '.join(command)}"
        )


def _why_unusable(bench: BenchSession) -> str:
    """What went wrong in the newest kept run, case by case."""
    run = runs.read(runs.list_runs(bench.settings.runs_dir)[-1])
    spoiled = [
        f"{regression.short_name(case)} {record.outcome}: {record.error}"
        for case, record in ((case, entry.record) for case, entry in run.entries.items())
        if case in bench.selected and record.outcome in ("failed", "void")
    ]
    missing = [regression.short_name(case) for case in bench.selected if case not in run.entries]
    reasons = [*spoiled, *([f"not measured: {', '.join(missing)}"] if missing else [])]
    return "; ".join(reasons) or f"another environment than this run's, see {run.path}"
