"""The gate: which baseline a run is judged by, and the verdict on a case, confirmed in fresh processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowbit import baselines, regression
from lowbit.baselines import Baseline
from lowbit.cases import Case
from lowbit.errors import LowbitError
from lowbit.record import Record
from lowbit.regression import Verdict
from lowbit.report.layout import count
from lowbit.report.rows import selection

if TYPE_CHECKING:
    from lowbit.pytest_plugin.session import BenchSession

AGAIN = "measure again when the card is free"
BLOCKING = "CUDA_LAUNCH_BLOCKING=1: the host waits for each kernel, so no timing is the card's own"


def refuse_blocking(bench: BenchSession) -> None:
    """Raises LowbitError where a run under CUDA_LAUNCH_BLOCKING is to be judged or accepted."""
    asked = {"--benchmark-compare": bench.settings.compare, "--update-baselines": bench.settings.update_baselines}
    for option, given in asked.items():
        if bench.blocking and given:
            raise LowbitError(f"{option}: {BLOCKING}; unset it, or leave {option} out")


def check_accepted(bench: BenchSession) -> None:
    """Raises LowbitError where --update-baselines would find a file that it can't read, after hours of measuring."""
    settings, choice = bench.settings, bench.choice
    if settings.update_baselines and settings.child is None:
        path = baselines.find(settings.baselines_dir, bench.device.slug, choice.name, choice.load_format)
        if path is not None:
            baselines.load(path)


def find_baseline(bench: BenchSession) -> Baseline | None:
    """The baseline to judge by. Raises LowbitError when one is asked for and missing, corrupt or foreign."""
    settings, choice, device = bench.settings, bench.choice, bench.device
    asked = settings.compare or (settings.compare_if_baseline and not bench.blocking)
    if settings.child is not None or not asked:
        return None
    path = _find_path(bench)
    if path is None:
        if settings.compare_if_baseline and not settings.compare:
            return None
        raise LowbitError(
            f"--benchmark-compare: no baseline of {choice.name} ({choice.load_format}) on {device.slug} "
            f"in {settings.baselines_dir / device.slug}; make one with: {bench.accept_command()}"
        )
    baseline = baselines.load(path)
    baselines.check(baseline, device.slug, choice.name, choice.load_format, bench.source.protocol)
    return baseline


def _find_path(bench: BenchSession) -> Path | None:
    settings, slug = bench.settings, bench.device.slug
    wanted = settings.compare_to
    if wanted is None:
        return baselines.find(settings.baselines_dir, slug, bench.choice.name, bench.choice.load_format)
    if Path(wanted).is_file():
        return Path(wanted)
    folder = settings.baselines_dir / slug
    stored = sorted(folder.glob("*.json"))
    matches = [path for path in stored if path.name.startswith(wanted)]
    if not matches:
        have = ", ".join(path.name for path in stored) or "none"
        raise LowbitError(
            f"--benchmark-compare={wanted}: no such file, nor a baseline of that number in {folder} (it has: {have})"
        )
    return matches[-1]


def tolerates_new(bench: BenchSession) -> bool:
    """Whether a case that the baseline lacks passes: --compare-if-baseline compares where there is something to
    compare with, and the baseline that came with the repository has a few rows of hundreds."""
    return bench.settings.compare_if_baseline and not bench.settings.compare


def upgrades(bench: BenchSession) -> str:
    """``since the baseline: torch 2.11.0 -> 2.13.0``; empty where nothing of the environment changed."""
    changes = baselines.environment_difference(bench.baseline, bench.environment) if bench.baseline else []
    return f"since the baseline: {', '.join(changes)}" if changes else ""


def judge(bench: BenchSession, case: Case, record: Record) -> list[str]:
    """Compare with the baseline; confirm a suspicion in fresh processes. Returns the messages that fail the test."""
    baseline, slug = bench.baseline, bench.device.slug
    if baseline is None or record.outcome in ("void", "failed"):
        return []
    row = baseline.rows.get(record.case)
    accept = bench.accept_command(selection(record.case))
    if record.outcome == "skipped":
        return [
            f"{case.name} on {slug}: measured in the baseline, skipped now ({reason}); "
            f"mend the environment, or accept the skip with: {accept}"
            for reason in baselines.new_skips(baseline, [record]).values()
        ]
    if row is None and tolerates_new(bench):
        return []
    if row is None:
        return [f"{case.name} on {slug}: not in the baseline {baseline.path.name}; accept it with: {accept}"]
    verdicts = regression.judge(record, row, bench.spreads, bench.device.kind)
    _note(bench, record, verdicts)  # a suspicion whose confirmation breaks off stands: its run is no baseline
    if regression.suspicions(verdicts):
        verdicts, repeats = _confirm(bench, case, record, verdicts)
        if regression.undecided(verdicts) and not any(verdict.fails for verdict in verdicts):
            _void(bench, record, verdicts, repeats)
            return []
        _note(bench, record, verdicts)
    failures = [regression.message(case.name, slug, verdict) for verdict in verdicts if verdict.fails]
    changed = upgrades(bench)
    return [*failures, changed] if failures and changed else failures


def _note(bench: BenchSession, record: Record, verdicts: list[Verdict]) -> None:
    bench.note_verdicts(record, verdicts)
    if bench.in_worker:  # travels to the controller with the record
        record.info["verdicts"] = [verdict.to_dict() for verdict in verdicts if verdict.status != "ungated"]


def _void(bench: BenchSession, record: Record, verdicts: list[Verdict], repeats: list[Record]) -> None:
    """A suspicion that could not be confirmed for the card's sake is no regression, nor is it good."""
    suspected = ", ".join(verdict.metric for verdict in regression.undecided(verdicts))
    reason = next(repeat.error or str(repeat.unmet) for repeat in repeats if repeat.outcome in regression.NO_EVIDENCE)
    record.outcome, record.error = "void", f"{suspected} beyond the limit, which could not be confirmed: {reason}"
    bench.withdraw_verdicts(record)


def _confirm(
    bench: BenchSession, case: Case, record: Record, verdicts: list[Verdict]
) -> tuple[list[Verdict], list[Record]]:
    """Measure again in fresh processes, the device freed for them, until one acquits or all have spoken. A disturbed
    one is measured once more. Returns the final verdicts, and what the fresh processes measured."""
    repeats: list[Record] = []
    suspected = ", ".join(verdict.metric for verdict in regression.suspicions(verdicts))
    for turn in range(1, regression.REPEATS + 1):
        bench.progress(
            f"{case.name}: {suspected} beyond the limit; confirming in fresh process {turn} of {regression.REPEATS}"
        )
        with bench.lab.spent.on("confirm"):
            repeat = bench.run_child(record.case)[0]
            if repeat.outcome == "void":
                bench.progress(f"{case.name}: disturbed ({repeat.error}); once more in a fresh process")
                repeat = bench.run_child(record.case)[0]
            repeats.append(repeat)
        confirmed = regression.confirm(verdicts, repeats)
        if not regression.suspicions(confirmed) and not regression.undecided(confirmed):
            break
    bench.repeats[record.case] = [dict(repeat.metrics) for repeat in repeats if repeat.outcome == "measured"]
    if bench.in_worker:  # travels to the controller as the verdicts do
        record.info["repeats"] = bench.repeats[record.case]
    return confirmed, repeats


def check_judged(bench: BenchSession) -> None:
    """Raises LowbitError where a run with a baseline has no figure to judge because the card was disturbed each time:
    exit code 0 would say that nothing got worse."""
    outcomes = [record.outcome for record in bench.records.values()]
    if bench.baseline is not None and "void" in outcomes and not {"measured", "failed"} & {*outcomes}:
        told = count(outcomes.count("void"), "case")
        raise LowbitError(f"nothing was judged by {bench.baseline.path.name}: {told} void, none measured; {AGAIN}")
