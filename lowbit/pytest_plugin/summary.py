"""What a bench run prints: header, expectation, progress, and at the end the table, the answer and the footer."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from lowbit import runs, vram_limit
from lowbit.cases import KINDS, SUITE_MODES, Case, enumerate_cases
from lowbit.pytest_plugin import collection, gate, products, updating
from lowbit.pytest_plugin.keys import UNLOADABLE
from lowbit.record import Record
from lowbit.regression import blunt_words, find_blunt
from lowbit.report import evaluation, kernels, recommendation, terminal
from lowbit.report.layout import count, hang
from lowbit.report.progress import Progress
from lowbit.report.rows import selection
from lowbit.spent import host_peak_mib

if TYPE_CHECKING:
    from lowbit.pytest_plugin.session import BenchSession


MOST_FORMATS = 20
"""How many are named where -k matched none of them."""
NAMED = 3
"""Of what only a larger suite has."""


def make_progress(config: pytest.Config) -> Progress:
    """Where long steps say what they wait for; silent in xdist workers and children, whose parent speaks."""
    if hasattr(config, "workerinput") or config.option.lowbit_child is not None or config.option.verbose < 0:
        return Progress(None)
    return Progress(sys.stdout)  # pytest's reporter, which is not there yet, will write to it too


def quiet_pytest_benchmark(config: pytest.Config) -> None:
    """Its table beside ours: as many columns as 100 hold beside the names, unless the user asked for others."""
    option = config.option
    if option.log_level is None:
        option.log_level = "WARNING"  # a failed compile would show a thousand lines of Dynamo's trace
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")  # the libraries' own, a dozen per import
    if not any(str(word).startswith("--benchmark-columns") for word in config.invocation_params.args):
        option.benchmark_columns = ["median", "rounds"]
    if option.lowbit_child is not None or option.no_summary:
        option.benchmark_quiet = True


def header_lines(bench: BenchSession) -> list[str]:
    lines = [
        f"lowbit: {bench.device.name} ({bench.device.slug}), model {bench.choice.name}, "
        f"load format {bench.choice.load_format}: {bench.choice.why}"
    ]
    if bench.device.limit_mib:
        lines.append(f"lowbit: measured as on a card of {bench.device.limit_mib:,.0f} MiB ({vram_limit.VARIABLE})")
    if bench.settings.profile:
        lines.append(f"lowbit: --profile: nothing is kept, compared or accepted; files in {bench.settings.profile}")
    if bench.blocking:
        lines.append(f"lowbit: {gate.BLOCKING}: speed cases are void")
    if bench.baseline is not None:
        lines.append(f"lowbit: comparing with {bench.baseline.path} ({bench.baseline.runs} runs)")
        changed = gate.upgrades(bench)
        lines += [f"lowbit: {changed}"] if changed else []
    elif bench.settings.compare_if_baseline:
        lines.append(f"lowbit: no baseline of this device and model; accept this run with: {bench.accept_command()}")
    return lines


def nothing_selected_lines(bench: BenchSession) -> list[str]:
    """What -k could have said; nothing where it was not asked."""
    if not (asked := bench.config.option.keyword):
        return []
    suite = bench.settings.suite
    if any(products.FILE in str(argument) for argument in bench.config.args):
        from lowbit.contenders import PRODUCTS

        return hang(
            f"lowbit: no kernel matches -k {asked!r}. Words: a format (python -m lowbit formats) that is no recipe and "
            f"no KV cache, int4, W4A16, torchao, {', '.join(PRODUCTS)}"
        ).splitlines()
    found = dict.fromkeys(case.format.id for case in _cases(bench, suite))
    names = ", ".join(found) if len(found) <= MOST_FORMATS else f"{len(found)}, listed by python -m lowbit formats"
    return hang(
        f"lowbit: no case of suite {suite} matches -k {asked!r}{_elsewhere(bench, asked)}. Its formats: {names}; other "
        f"words: int4, W4A16, torchao, decode, prefill, quality, eager, compiled"
    ).splitlines()


def _cases(bench: BenchSession, suite: str) -> list[Case]:
    return [case for kind in KINDS for case in enumerate_cases(kind, suite, bench.choice.parameters)]


def _elsewhere(bench: BenchSession, asked: str) -> str:
    """``; --suite nightly has a16w4_g32-torchao``: formats, modes and workloads that one of the words names, none of
    this suite's, and that only a larger suite has."""
    suites = list(SUITE_MODES)
    known = _names(bench, bench.settings.suite)
    words = [word.lower() for word in re.findall(r"[\w.-]+", asked) if word.lower() not in ("and", "or", "not")]
    words = [word for word in words if not any(word in told for told in known.values())]
    for suite in suites[suites.index(bench.settings.suite) + 1 :]:
        found = _names(bench, suite)
        more = [name for name, told in found.items() if name not in known and any(word in told for word in words)]
        if more:
            return f"; --suite {suite} has {', '.join(more[:NAMED])}{' and more' if len(more) > NAMED else ''}"
    return ""


def _names(bench: BenchSession, suite: str) -> dict[str, str]:
    """The formats, modes and workloads of a suite, and the words for their batches; each with what -k finds it by."""
    cases = _cases(bench, suite)
    workloads = [case.workload for case in cases if case.workload]
    names = [*(case.mode for case in cases if case.mode), *(workload.id for workload in workloads)]
    names += [f"batch{workload.batch}" for workload in workloads]
    formats = {case.format.id: " ".join(sorted(case.format.selectors)).lower() for case in cases}
    return formats | {name: name.lower() for name in names}


def expectation_lines(bench: BenchSession, nodeids: Sequence[str], *, workers: int | None = None) -> list[str]:
    """How many cases and minutes a run will be; with enough kept runs to accept, none."""
    if updating.nothing_to_measure(bench):
        kept = count(bench.settings.baseline_runs, "kept run")
        return [f"lowbit: {count(len(nodeids), 'case')}, nothing to measure: to be accepted from {kept}"]
    if not nodeids:  # single kernels, or nothing: pytest's own count says it
        return []
    measured = runs.wall_seconds(bench.settings.runs_dir, bench.header())
    minutes = collection.expected_minutes(nodeids, measured, bench.device) / (workers or 1)
    basis = "by the last kept runs" if measured else "a guess until a run is kept"
    processes = f" × {count(bench.settings.baseline_runs, 'run')}" if bench.settings.update_baselines else ""
    duration = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    return [
        f"lowbit: {count(len(nodeids), 'case')}, {duration}{processes} ({basis})",
        *_new_to_the_baseline(bench, nodeids),
    ]


def _new_to_the_baseline(bench: BenchSession, nodeids: Sequence[str]) -> list[str]:
    """Said before they are measured: a baseline of a smaller suite lacks cases by the hundred."""
    if bench.baseline is None:
        return []
    new = sum(nodeid not in bench.baseline.rows and nodeid not in bench.baseline.skips for nodeid in nodeids)
    if not new:
        return []
    told = f"lowbit: {new} of them not in the baseline (suite {bench.baseline.header.suite}): those that run here "
    if gate.tolerates_new(bench):
        return [f"{told}are measured and not judged; accept them with: {bench.accept_command()}"]
    return [f"{told}fail as new, until accepted with: {bench.accept_command()}"]


def announce_workers_run(bench: BenchSession, nodeids: list[str]) -> bool:
    """In a controller, which collects nothing itself: begin the run with what its workers collected, say how much.

    False when there is nothing to measure.
    """
    bench.select(nodeids)
    measures = not updating.nothing_to_measure(bench)
    if measures:
        bench.open_run()
    reporter: Any = bench.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        for line in expectation_lines(bench, bench.selected, workers=bench.config.option.numprocesses or 1):
            reporter.write_line(line)
    return measures


def write(reporter: Any, bench: BenchSession) -> None:
    """The final section of the run: table, answer, footer, and what became of the run. A child has none."""
    if bench.settings.child is not None or bench.in_worker or bench.config.option.no_summary:
        return
    parts = [*_results(bench, bool(reporter.hasmarkup)), *_consequences(bench)]
    if parts:
        reporter.section("lowbit", sep="=", bold=True)
        reporter.write_line("\n".join(parts))
    if bench.error:
        reporter.write_line(f"ERROR: {bench.error}", red=True)


def _results(bench: BenchSession, color: bool) -> list[str]:
    records = list(bench.records.values())
    if not records:
        return []
    vram = bench.settings.max_vram or bench.device.total_mib
    arguments = bench.model_arguments()
    told = [record for record in records if UNLOADABLE not in record.info]  # that ended the run, which pytest tells
    parts = [
        terminal.table(records, bench.verdicts, gated=bench.baseline is not None, color=color),
        terminal.notes(told, bench.verdicts, accept=bench.accept_command),
        gate.upgrades(bench) if bench.regressed else "",
        ""
        if bench.settings.profile or not _measured(bench)
        else recommendation.recommendation(
            records, max_kld=bench.settings.max_kld, max_vram_mib=vram, arguments=arguments
        ),
        kernels.tables(records, color=color),
        evaluation.table(records),
        _notes(records),
        _footer(bench, records),
    ]
    return [part for part in parts if part]


def _measured(bench: BenchSession) -> bool:
    """Whether there is a figure to recommend or to accept."""
    return any(record.outcome == "measured" for record in bench.records.values())


def _notes(records: list[Record]) -> str:
    """What did not go as planned: page-locking refused, CUDA graphs given up, no NVML. Each once."""
    told = dict.fromkeys(f"note: {note}" for record in records for note in record.info.get("notes") or ())
    return "\n".join(map(hang, told))


def _footer(bench: BenchSession, records: list[Record]) -> str:
    wall_s = time.perf_counter() - bench.started
    workers = len(getattr(bench.config.option, "tx", None) or ())
    if workers:  # who spent what, they know; this process only waited
        measured_s = sum(record.info.get("wall_s", 0.0) for record in records)
        return f"lowbit: {wall_s:.1f} s wall with {workers} workers, {measured_s:.1f} s of cases"
    return terminal.footer(bench.lab.spent, wall_s=wall_s, host_peak_mib=host_peak_mib())


def _void(bench: BenchSession) -> list[str]:
    """What is neither good nor worse, and how to have it measured."""
    cases = [record.case for record in bench.records.values() if record.outcome == "void"]
    if not cases or bench.blocking:
        return []
    only = f', with -k "{" or ".join(map(selection, cases))}"' if len(cases) <= NAMED else ""
    told = f"{count(len(cases), 'case')} void: neither good nor worse, no figure of theirs is judged or accepted"
    return [hang(f"{told}; {gate.AGAIN}: the same command{only}")]


def _consequences(bench: BenchSession) -> list[str]:
    lines = []
    if bench.writer is not None:
        lines.append(f"run kept in {bench.writer.path}")
        if bench.unreached and not bench.refused:
            reached = f"{len(bench.selected) - bench.unreached} of {count(len(bench.selected), 'case')}"
            lines.append(f"it has {reached}; the rest: the same command with --resume")
    lines += _void(bench)
    lines += bench.told
    lines += [bench.patched] if bench.patched else []
    if bench.accepted is not None:
        lines.append(f"baseline written: {bench.accepted}")
        lines += [f"too noisy to be gated well: {line}" for line in bench.warnings]
        if bench.warnings:
            lines.append("what helps: a quieter machine, more runs (--baseline-runs), or more cases at once")
    elif bench.settings.profile:
        lines.append("profiled: nothing was kept or compared; measure without --profile for figures")
    elif bench.baseline is not None:
        kind = bench.device.kind
        blunt = [one for one in find_blunt(bench.baseline.rows.values(), kind) if one.case in bench.verdicts]
        told = f"{blunt_words(blunt)}; more runs in the baseline narrow them (--baseline-runs)" if blunt else ""
        lines += [hang(told)] if told else []
    elif _measured(bench) and not (bench.settings.update_baselines or bench.unreached):
        lines.append(f"not compared with a baseline; accept this machine's figures with: {bench.accept_command()}")
    return lines
