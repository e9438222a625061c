"""What a report of one run tells, gathered from files or a session: the run, its judgement, what stands beside it.

The page and the Markdown summary are two views of a ``Content``. Nothing here knows HTML or Markdown.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lowbit import comparison, metrics, regression
from lowbit.baselines import Baseline
from lowbit.formats import FORMATS
from lowbit.history import History
from lowbit.record import Record
from lowbit.regression import Blunt, Verdict
from lowbit.report.terminal import first_line
from lowbit.runs import JUDGED, Header, Run
from lowbit.spread import Spreads, floors, host_bound, pool_spread, scale

if TYPE_CHECKING:
    from lowbit.trend import Trend

Status = Literal["regression", "missing", "lost", "failed", "new", "improvement"]
FAILING: tuple[Status, ...] = ("regression", "missing", "lost", "failed", "new")
"""What makes the run a failure; an improvement is only told."""


@dataclass(frozen=True)
class Finding:
    """One thing to look at. ``verdict`` is None where it is about the whole case; ``spread`` is σ in the metric's unit
    from run to run, None where the baseline knows none."""

    case: str
    status: Status
    verdict: Verdict | None = None
    spread: float | None = None
    reason: str = ""

    @property
    def fails(self) -> bool:
        return self.status in FAILING


@dataclass(frozen=True)
class Content:
    """``verdicts`` has every metric that the run and the baseline share, gated or not. ``judged_by`` names the
    baseline, "" without one; ``confirmed`` is True where suspicions were measured again in fresh processes. Of a
    baseline shown alone, ``runs`` are those its figures are medians of. ``blunt`` are its limits that are too wide to
    guard much; of a run, those of the cases that it was judged in. ``scores`` are quality records from elsewhere
    (``scored_by``) of formats that this run did not score: shown beside its figures, no case of it, never judged."""

    header: Header
    records: list[Record]
    complete: bool = True
    path: Path = Path()
    baseline: Baseline | None = None
    judged_by: str = ""
    confirmed: bool = False
    verdicts: Mapping[str, Sequence[Verdict]] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    new: Sequence[str] = ()
    skips: Mapping[str, str] = field(default_factory=dict)
    upgrades: Sequence[str] = ()
    is_baseline: bool = False
    runs: int = 1
    blunt: Sequence[Blunt] = ()
    scores: Sequence[Record] = ()
    scored_by: str = ""
    history: History | None = None
    trends: Sequence[Trend] = ()
    max_kld: float = 0.05
    max_vram_mib: float | None = None

    @property
    def arguments(self) -> list[str]:
        """The options of ``pytest benches`` that measure this run's model again."""
        return arguments_of(self.header)

    @property
    def scored(self) -> list[Record]:
        """The run's records, and the scores that stand beside them."""
        return [*self.records, *self.scores]

    @cached_property
    def _spreads(self) -> Spreads:
        return pool_spread(self.baseline.rows.values()) if self.baseline else Spreads()

    def spread_of(self, case: str, verdict: Verdict) -> float | None:
        """σ of the metric from run to run, in its unit; None where the baseline knows none."""
        metric, row = metrics.find(verdict.metric), self.baseline.rows.get(case) if self.baseline else None
        floor = floors(metric, host_bound(row)) if metric and row else None
        if row is None or floor is None or verdict.baseline is None:
            return None
        spread = self._spreads.of(verdict.metric, row)
        return spread.sigma * scale(floor, verdict.baseline) if spread.degrees_of_freedom else None

    @cached_property
    def findings(self) -> list[Finding]:
        """What failed, worst first, then what got better."""
        found = [
            Finding(case, verdict.status, verdict, self.spread_of(case, verdict), verdict.reason)
            for case, verdicts in self.verdicts.items()
            for verdict in verdicts
            if verdict.status in ("regression", "missing", "improvement")
        ]
        failed = {record.case: first_line(record.error) for record in self.records if record.outcome == "failed"}
        found += [Finding(case, "lost", reason=reason) for case, reason in self.lost.items() if case not in failed]
        found += [Finding(case, "failed", reason=reason) for case, reason in failed.items()]
        found += [Finding(case, "new", reason="not in the baseline") for case in self.new]
        order = {status: place for place, status in enumerate((*FAILING, "improvement"))}
        return sorted(found, key=lambda finding: (order[finding.status], -_size(finding.verdict)))

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.fails]

    @property
    def counts(self) -> dict[str, int]:
        """Cases by outcome: measured, skipped, failed, void; those that are there."""
        outcomes: list[str] = [record.outcome for record in self.records]
        names: tuple[str, ...] = ("measured", "failed", "void")
        found = {name: outcomes.count(name) for name in names if name in outcomes}
        return {**found, "skipped": len(self.skips)} if self.skips else found


def _size(verdict: Verdict | None) -> float:
    """How far beyond: the change in limits."""
    if verdict is None or verdict.change is None or not verdict.limit:
        return 0.0
    return abs(verdict.change) / verdict.limit


def of_run(run: Run, baseline: Baseline | None, **limits: float | None) -> Content:
    """A kept run beside a baseline, if there is one. Verdicts that the bench run itself reached by that baseline
    count, with their confirmations; otherwise the run is judged here, by what it measured once.

    Raises LowbitError when the baseline is foreign to the run.
    """
    records, stored, by = run.records(), _stored(run), _judged_by(run)
    skips = {record.case: str(record.unmet) for record in records if record.outcome == "skipped"}
    common = {"header": run.header, "records": records, "complete": run.complete, "path": run.path, "skips": skips}
    common |= limits
    if baseline is None:
        return Content(**common, judged_by=by, confirmed=bool(by), verdicts=stored)  # type: ignore[arg-type]
    judgement = comparison.compare(baseline, run)
    same = by == baseline.identity
    verdicts = {case: _prefer(found, stored.get(case, []) if same else []) for case, found in judgement.verdicts}
    whole = _is_whole(run, baseline)
    there = {record.case for record in records}
    return Content(
        **common,  # type: ignore[arg-type]
        baseline=baseline,
        judged_by=baseline.identity,
        confirmed=same,
        verdicts=verdicts,
        lost={case: why for case, why in judgement.lost.items() if whole or case in there},
        new=() if _tolerates_new(run.header) else judgement.new,
        upgrades=judgement.environment,
        blunt=[one for one in _blunt(baseline) if one.case in verdicts],
    )


def of_baseline(baseline: Baseline, **limits: float | None) -> Content:
    """A baseline's own medians as if they were one run: nothing is judged."""
    records = list(comparison.records_of(baseline).values())
    for record in records:
        record.info = dict(baseline.rows[record.case].info)
    skips = {case: f"{kind}: {reason}" for case, (kind, reason) in baseline.skips.items()}
    return Content(
        baseline.header,
        records,
        path=baseline.path,
        is_baseline=True,
        runs=baseline.runs,
        blunt=_blunt(baseline),
        skips=skips,
        **limits,  # type: ignore[arg-type]
    )


def _blunt(baseline: Baseline) -> list[Blunt]:
    kind = "cpu" if baseline.header.device.startswith("cpu") else "cuda"
    return regression.find_blunt(baseline.rows.values(), kind)


def _stored(run: Run) -> dict[str, list[Verdict]]:
    """The verdicts that the bench run left beside its records."""
    return {
        record.case: [Verdict(**verdict) for verdict in record.info[JUDGED]["verdicts"]]
        for record in run.records()
        if JUDGED in record.info
    }


def _judged_by(run: Run) -> str:
    return next((str(record.info[JUDGED]["by"]) for record in run.records() if JUDGED in record.info), "")


def _prefer(judged: Sequence[Verdict], stored: Sequence[Verdict]) -> list[Verdict]:
    """``judged`` with what the bench run knew better."""
    known = {verdict.metric: verdict for verdict in stored}
    return [known.get(verdict.metric, verdict) for verdict in judged]


def _tolerates_new(header: Header) -> bool:
    """As ``gate.tolerates_new``, of a kept run."""
    compares = any(word.startswith("--benchmark-compare") for word in header.argv)
    return "--compare-if-baseline" in header.argv and not compares


def _is_whole(run: Run, baseline: Baseline) -> bool:
    """False where cases of the baseline may be absent because nobody asked for them."""
    header = run.header
    chosen = any(header.selection.values()) or header.suite != baseline.header.suite
    chosen = chosen or any(".py" in word or word in ("--lf", "--last-failed", "-x") for word in header.argv)
    return run.complete and not chosen


def format_of(case: str) -> str | None:
    """The format of a case that left no record, by its id: the longest that fits; None for a format of another day."""
    return max((fmt for fmt in FORMATS if f"[{fmt}-" in case or f"[{fmt}]" in case), key=len, default=None)


def name(case: str) -> str:
    """As messages word it: ``decode[a16w4_g128-torchao-eager-b1_c0]``."""
    return regression.short_name(case)


def arguments_of(header: Header) -> list[str]:
    """The options of ``pytest benches`` that measure this run's model again."""
    words = ["--model", shlex.quote(header.model)]
    words += ["--load-format", "dummy"] if header.load_format == "dummy" else []
    words += ["--suite", header.suite] if header.suite != "quick" else []
    argv = list(header.argv)
    for here, word in enumerate(argv):
        if word == "--text" and here + 1 < len(argv):
            words += ["--text", shlex.quote(argv[here + 1])]
        elif word.startswith("--text="):
            words.append(shlex.quote(word))
    return words
