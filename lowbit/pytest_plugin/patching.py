"""--baseline-patch FILE: what failed or changed in this run, as a diff of the committed baseline that accepts it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowbit import baseline_patch, baselines, documents, regression
from lowbit.baseline_patch import Accepted
from lowbit.record import Record
from lowbit.report.layout import count
from lowbit.runs import Entry

if TYPE_CHECKING:
    from lowbit.pytest_plugin.session import BenchSession

CHANGED = ("regression", "missing", "improvement")


def write_patch(bench: BenchSession) -> None:
    """Write the patch, or remove the one of an earlier run when there is nothing to accept; note it in ``bench``.

    Raises LowbitError when the file can't be written.
    """
    path, baseline = bench.settings.baseline_patch, bench.baseline
    if path is None:
        return
    accepted = choose(bench) if baseline is not None else Accepted({})
    try:
        if baseline is None or not accepted.cases:
            path.unlink(missing_ok=True)
            bench.patched = "no baseline patch: " + ("nothing to accept" if baseline else "no baseline to patch")
            return
        diff = baseline_patch.make(baseline, bench.header(), accepted)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(baseline_patch.preface(_describe(bench, accepted)) + diff, encoding="utf-8")
    except OSError as error:
        raise documents.unwritable(path, error, "there is no baseline patch; the run is kept") from error
    count = len(accepted.cases)
    bench.patched = f"baseline patch: {path} accepts {count} case{'s' * (count != 1)}; apply it with: git apply {path}"


def choose(bench: BenchSession) -> Accepted:
    """The cases whose figures changed, that are new or that no longer run. Failed and void ones have no figures."""
    assert bench.baseline is not None
    rows = bench.baseline.rows
    chosen = []
    for case, record in bench.records.items():
        if record.outcome == "skipped":
            change = case in rows
        else:
            verdicts = bench.verdicts.get(case, [])
            change = case not in rows or any(verdict.status in CHANGED for verdict in verdicts)
        if change and record.outcome in ("measured", "skipped") and _is_finite(record):
            chosen.append(case)
    entries = {case: Entry(bench.records[case], _columns(bench, case)) for case in chosen}
    repeats = {case: bench.repeats[case] for case in chosen if case in bench.repeats}
    return Accepted(entries, repeats, [case for case in bench.vanished if case in rows or case in bench.baseline.skips])


def _is_finite(record: Record) -> bool:
    return all(map(math.isfinite, record.metrics.values()))


def _columns(bench: BenchSession, case: str) -> dict[str, float] | None:
    stats = bench.stats.get(case)
    return stats["stats"] if stats else None


def _describe(bench: BenchSession, accepted: Accepted) -> list[str]:
    """A line per accepted change, and per change that could not be."""
    assert bench.baseline is not None
    lines = [
        f"Accepts {count(len(accepted.cases), 'case')} into {bench.baseline.path.name}, measured {documents.now()}"
    ]
    for case, entry in accepted.entries.items():
        name, record = regression.short_name(case), entry.record
        changed = [verdict for verdict in bench.verdicts.get(case, []) if verdict.status in CHANGED]
        lines += [regression.message(case, bench.device.slug, verdict) for verdict in changed]
        if record.outcome == "skipped":
            lines.append(f"{name}: skipped now ({record.unmet})")
        elif not changed:
            lines.append(f"{name}: new")
    lines += [f"{regression.short_name(case)}: gone" for case in accepted.gone]
    for record in bench.records.values():
        if record.outcome in ("failed", "void") or not _is_finite(record):
            why = record.outcome if record.outcome != "measured" else "a metric is not finite"
            lines.append(f"not accepted, {why}: {regression.short_name(record.case)}")
    upgrades = baselines.environment_difference(bench.baseline, bench.environment)
    return [*lines, f"since the baseline: {', '.join(upgrades)}"] if upgrades else lines
