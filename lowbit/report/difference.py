"""What ``python -m lowbit compare OLD NEW`` prints: a line per case, worst first, then every failure in words."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit import regression
from lowbit.comparison import Comparison
from lowbit.regression import Verdict
from lowbit.report.layout import NONE, Heading, count, divergence, hang, lay_out

HEADLINES = ("decode_tok_s", "ttft_ms", "kld", "ppl")
"""The metric that stands for a case in the table: the first of these that it has."""

HEADINGS = (
    Heading("case", right=False),
    Heading("metric", right=False),
    Heading("old"),
    Heading("new"),
    Heading("change"),
    Heading("verdict", right=False),
)


def difference(comparison: Comparison, *, color: bool = False) -> str:
    """The table, the environment's changes, failures with their limits, lost and new cases, and the verdict."""
    rows = [_row(case, verdicts) for case, verdicts in sorted(comparison.verdicts, key=lambda pair: _badness(pair[1]))]
    rows += [[regression.short_name(case), "", "", "", "", "LOST"] for case in comparison.lost]
    rows += [[regression.short_name(case), "", "", "", "", "void"] for case in comparison.void]
    rows += [[regression.short_name(case), "", "", "", "", "new"] for case in comparison.new]
    lines = lay_out(HEADINGS, rows, color=color) if rows else ["no case in common"]
    if comparison.environment:
        lines += ["", hang(f"environment: {'; '.join(comparison.environment)}")]
    failures = [
        regression.message(case, comparison.device, verdict)
        for case, verdicts in comparison.verdicts
        for verdict in verdicts
        if verdict.fails
    ]
    failures += [f"{regression.short_name(case)}: lost: {reason}" for case, reason in comparison.lost.items()]
    lines += ["", *map(hang, failures)] if failures else []
    judged = sum(verdict.status != "ungated" for _, verdicts in comparison.verdicts for verdict in verdicts)
    cases = count(len(comparison.verdicts), "case")
    total = f"{count(len(failures), 'failure')} in {cases}, {count(judged, 'gated metric')}"
    if comparison.void:
        total += f"; {count(len(comparison.void), 'case')} void in NEW, not judged"
    if comparison.cold:
        total += (
            f"; compile_s of {count(len(comparison.cold), 'case')} not judged: NEW's cache of compiled graphs was cold"
        )
    if comparison.left_out:
        total += f"; {count(comparison.left_out, 'case')} of OLD not selected in NEW"
    return "\n".join([*lines, "", total])


def word(verdicts: Sequence[Verdict]) -> str:
    """One word for a case: the worst of its verdicts."""
    statuses = {verdict.status for verdict in verdicts}
    known = (("regression", "REGRESSED"), ("missing", "MISSING"), ("improvement", "better"))
    return next((text for status, text in known if status in statuses), "ok")


def _badness(verdicts: Sequence[Verdict]) -> int:
    return ("REGRESSED", "MISSING", "better", "ok").index(word(verdicts))


def _shown(verdicts: Sequence[Verdict]) -> Verdict | None:
    """What failed, else what improved, else the headline."""
    for status in ("regression", "missing", "improvement"):
        for verdict in verdicts:
            if verdict.status == status:
                return verdict
    return next((v for name in HEADLINES for v in verdicts if v.metric.startswith(name)), None)


def _row(case: str, verdicts: Sequence[Verdict]) -> list[str]:
    verdict = _shown(verdicts)
    if verdict is None:
        return [regression.short_name(case), NONE, NONE, NONE, NONE, word(verdicts)]
    family = next((name for name in HEADLINES if verdict.metric.startswith(name)), verdict.metric)
    old, now, relative = verdict.baseline, verdict.now, verdict.change_relative
    if family == "kld":
        shown = [divergence(old), divergence(now)]
    else:  # a perplexity fails by a tenth of a percent, a ratio is small: as the message has them
        shown = [
            NONE if one is None else regression.figure(one, other or 0.0) for one, other in ((old, now), (now, old))
        ]
    small = relative is not None and 0 < abs(relative) < 0.01
    change = NONE if relative is None else f"{100 * relative:+.{2 if small else 1}f}%"
    return [regression.short_name(case), family, *shown, change, word(verdicts)]
