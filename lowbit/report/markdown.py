"""The run in Markdown, at most one screen: for ``$GITHUB_STEP_SUMMARY`` and for a comment on a pull request."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from lowbit.baselines import DEFAULT_RUNS
from lowbit.regression import Verdict, blunt_words
from lowbit.report.common import in_common
from lowbit.report.content import Content, Finding, format_of, name
from lowbit.report.layout import NONE, count, divergence, number
from lowbit.report.recommendation import recommendation
from lowbit.report.rows import Row, join, memory_metric
from lowbit.report.since import moving, moving_words, since
from lowbit.report.terminal import first_line

FAILURES, BETTER, MOVING, FASTEST, REASONS, UPGRADES, CELL = 8, 2, 3, 4, 4, 8, 160
"""Rows of each part, so that all of it stays below 40 lines, and characters of a cell. What is left out is counted."""

WORDS = {
    "regression": ("regression", "regressions"),
    "missing": ("metric missing", "metrics missing"),
    "lost": ("case stopped running", "cases stopped running"),
    "failed": ("case failed", "cases failed"),
    "new": ("case without a baseline", "cases without a baseline"),
    "improvement": ("unexplained improvement", "unexplained improvements"),
}


def summary(content: Content) -> str:
    """Verdict first; then what failed, what was upgraded, the fastest cases, the answer and the skips."""
    findings = content.findings
    lines = [f"### {headline(content)}", "", facts(content), *_blunt(content)]
    failing, better = [f for f in findings if f.fails], [f for f in findings if not f.fails]
    if failing:
        lines += ["", *_findings(content, failing, FAILURES)]
    if content.upgrades:
        kept = [code(change) for change in content.upgrades[:UPGRADES]]
        more = len(content.upgrades) - len(kept)
        lines += ["", f"**Changed since the baseline:** {', '.join(kept)}{f' and {more} more' if more else ''}"]
    if better:
        lines += ["", "**Better, unexplained** (accept: `pytest benches --update-baselines`)"]
        lines += [f"- {_sentence(finding)}" for finding in better[:BETTER]]
        lines += [f"- and {len(better) - BETTER} more"] if len(better) > BETTER else []
    lines += _moving(content)
    lines += ["", *_fastest(content)]
    without = [*_skips(content), *_void(content)]
    lines += ["", ". ".join(without)] if without else []
    return "\n".join(lines) + "\n"


def verdict_words(content: Content) -> tuple[str, str]:
    """(state, words): ``("bad", "2 regressions, 1 case failed")``; the state is bad, good, open or none."""
    failing = Counter(finding.status for finding in content.findings if finding.fails)
    if failing:
        return "bad", ", ".join(f"{count} {WORDS[status][count != 1]}" for status, count in failing.items())
    if content.is_baseline:
        return "none", "baseline: the figures that runs are judged by"
    if not content.complete:
        return "open", "unfinished run: nothing got worse in what was measured"
    if not content.judged_by:
        return "none", "measured, not compared with a baseline"
    void = content.counts.get("void", 0)
    if void and not content.verdicts:
        return "open", f"nothing could be judged; {count(void, 'case')} void"
    good = "nothing got worse beyond its limit" if moving(content) else "nothing got worse"
    return ("open", f"{good} in what could be judged; {count(void, 'case')} void") if void else ("good", good)


def headline(content: Content) -> str:
    state, words = verdict_words(content)
    mark = {"bad": "❌", "good": "✅", "open": "⚠️", "none": "📏"}[state]
    return f"{mark} {words}: {text(subject(content))}"


def subject(content: Content) -> str:
    """``llama-3.1-8b (dummy weights) on NVIDIA H200``."""
    header = content.header
    weights = " (dummy weights)" if header.load_format == "dummy" else ""
    return f"{header.model}{weights} on {header.device_name}"


def facts(content: Content) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in content.counts.items()) or "no case"
    parts = [f"{counts}; suite {text(content.header.suite)}, {text(content.header.started[:16].replace('T', ' '))} UTC"]
    if content.judged_by:
        runs = f" ({content.baseline.runs} runs)" if content.baseline else ""
        parts.append(f"judged by {code(content.judged_by)}{runs}")
    if content.header.commit:
        parts.append(f"lowbit {code(content.header.commit[:12])}")
    return "; ".join(parts)


def _blunt(content: Content) -> list[str]:
    """How sure "nothing got worse" is: what could have and would have passed. The next line of the same paragraph."""
    told = blunt_words(content.blunt)
    return (
        [f"⚠️ {text(told)}; more runs narrow them: `--update-baselines --baseline-runs {DEFAULT_RUNS}`"] if told else []
    )


def _moving(content: Content) -> list[str]:
    """In one line: what gets worse and does not fail yet."""
    found, history = moving(content), content.history
    if not found or history is None:
        return []
    told = [f"{code(name(one.case))} {text(moving_words(one, len(history.nights)))}" for one in found[:MOVING]]
    more = f"; and {len(found) - MOVING} more" if len(found) > MOVING else ""
    return ["", f"**Getting worse, within the limits:** {'; '.join(told)}{more} (`python -m lowbit trend`)"]


def _findings(content: Content, findings: Sequence[Finding], limit: int) -> list[str]:
    lines = [
        "| case | metric | base → now | change | limit | spread σ | runs | since |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += ["| " + " | ".join(_cells(content, finding)) + " |" for finding in findings[:limit]]
    more, shared = len(findings) - limit, in_common(content)
    lines += ["", f"and {more} more, in the report"] if more > 0 else []
    return [*lines, "", f"**In common:** {', '.join(map(code, shared))}"] if shared else lines


def _cells(content: Content, finding: Finding) -> list[str]:
    verdict = finding.verdict
    if verdict is None:
        reason = f"**{WORDS[finding.status][0]}**: {code(finding.reason)}"
        return [code(name(finding.case)), reason, *[NONE] * 6]
    began = since(content, finding)
    return [
        code(name(finding.case)),
        code(verdict.metric),
        *figures(verdict, finding.spread),
        NONE if began is None else text(str(began)),
    ]


def figures(verdict: Verdict, spread: float | None) -> list[str]:
    """base → now, change, limit, spread and confirming runs, as text."""
    base, now, unit = verdict.baseline, verdict.now, verdict.unit
    moved = f"{_amount(base, unit)} → {_amount(now, unit) if now is not None else 'missing'} {unit}".rstrip()
    change = verdict.change_relative
    limit = verdict.limit_relative if not verdict.in_units else None
    shown = f"{verdict.limit:.3g} {unit}".rstrip() if verdict.limit is not None else NONE
    share = spread / abs(base) if spread is not None and base else None
    return [
        moved,
        NONE if change is None else f"{100 * change:+.{2 if abs(change) < 0.01 else 1}f} %",
        shown if limit is None else f"{100 * limit:.{2 if limit < 0.01 else 1}f} %",
        NONE if share is None else f"{100 * share:.2f} %",
        f"{verdict.beyond} of {verdict.runs}" if verdict.runs else NONE,
    ]


def _amount(value: float | None, unit: str) -> str:
    """A perplexity, which has no unit, with four decimals: a tenth of a percent of it fails."""
    if value is None or value == 0:
        return NONE if value is None else "0"
    if not unit and 1 <= abs(value) < 1000:
        return f"{value:.4f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4f}" if abs(value) < 1 else thousands(value)


def thousands(value: float | None) -> str:
    """As the terminal writes a number, with commas: 59.8, 1,204."""
    return number(value) if value is None or abs(value) < 1000 else f"{value:,.0f}"


def _sentence(finding: Finding) -> str:
    assert finding.verdict is not None
    moved, change, *_ = figures(finding.verdict, None)
    return f"{code(name(finding.case))} {code(finding.verdict.metric)} {moved} ({change})"


def _fastest(content: Content) -> list[str]:
    rows = [row for row in join(content.scored) if row.short]
    rows = sorted(rows, key=lambda row: -row.short.metrics["decode_tok_s"] if row.short else 0.0)[:FASTEST]
    if not rows:
        return ["No decode case at batch 1 and a short context was measured."]
    memory = memory_metric(rows)
    lines = [
        f"| fastest decode | tok/s | {'weights' if memory == 'weights_mib' else 'VRAM'} MiB | KL | MBU |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += ["| " + " | ".join(_row(row, memory)) + " |" for row in rows]
    return [*lines, "", *_answer(content)]


def _row(row: Row, memory: str) -> list[str]:
    measured = row.short.metrics if row.short else {}
    mbu = measured.get("mbu")
    share = NONE if mbu is None else f"{100 * mbu:.0f} %"
    used = thousands(measured.get(memory, row.memory(memory)))
    return [code(row.title), thousands(measured.get("decode_tok_s")), used, divergence(row.kld), share]


def _answer(content: Content) -> list[str]:
    """The recommendation as one paragraph and its command."""
    told = recommendation(
        content.scored, max_kld=content.max_kld, max_vram_mib=content.max_vram_mib, arguments=content.arguments
    )
    body, _, rest = told.partition("\n  reproduce: ")
    command = rest.splitlines()[0] if rest else ""
    words = " ".join(body.split()).removeprefix("recommendation")
    words += f" (KL of formats that this run did not score: {content.scored_by})" if content.scores else ""
    lines = [f"**Answer**{' ' if words.startswith(' ') else ''}{text(words)}"]
    return [*lines, f"Reproduce: {code(command)}"] if command else lines


def _void(content: Content) -> list[str]:
    """One line: by reason, as the card was disturbed."""
    reasons = Counter(first_line(record.error) for record in content.records if record.outcome == "void")
    return _by_reason(
        "Void, neither good nor worse", [f"{number} × {code(reason)}" for reason, number in reasons.most_common()]
    )


def _skips(content: Content) -> list[str]:
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for case, reason in content.skips.items():
        reasons[reason].append(case)
    ordered = sorted(reasons.items(), key=lambda pair: -len(pair[1]))
    return _by_reason("Skipped", [f"{len(cases)} × {code(reason)}{_formats(cases)}" for reason, cases in ordered])


def _by_reason(what: str, reasons: Sequence[str]) -> list[str]:
    """One line of the first reasons, the most frequent ones, and how many more there are; none without reasons."""
    if not reasons:
        return []
    more = len(reasons) - REASONS
    return [f"{what}: {'; '.join(reasons[:REASONS])}{f'; {more} more reasons' if more > 0 else ''}"]


def _formats(cases: Iterable[str]) -> str:
    """The formats that those cases are of, where few."""
    ids = sorted({fmt for case in cases if (fmt := format_of(case))})
    return f" ({', '.join(map(code, ids))})" if 0 < len(ids) <= 3 else ""


def text(words: str) -> str:
    """As plain text of one line: no mark-up, no mention, no link comes of it."""
    flat = " ".join(words.split())
    escaped = re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"@(?=\w)", "@\u200b", escaped)  # GitHub would call the person so named


def code(words: str) -> str:
    """As a code span that fits a table's cell: one line, at most CELL characters, nothing in it is mark-up."""
    flat = " ".join(words.split()).replace("`", "'").replace("|", "¦")
    return f"`{flat if len(flat) <= CELL else flat[: CELL - 1] + '…'}`" if flat else NONE
