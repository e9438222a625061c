"""The parts of the page that need no script: verdict, findings, answer, environment. Every text is escaped here."""

from __future__ import annotations

import html
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

from lowbit import __version__
from lowbit.report.content import Content, Finding, name
from lowbit.report.markdown import WORDS, figures, subject, verdict_words
from lowbit.report.page.data import environment_rows
from lowbit.report.recommendation import recommendation
from lowbit.report.since import since

FINDINGS = 12
"""Shown beside the verdict; the table has all of them on top."""

__all__ = ["environment", "escape", "facts", "footer", "state", "subject", "title", "verdict"]


def escape(text: object) -> str:
    """For element content and for attributes in double quotes."""
    return html.escape(str(text), quote=True)


def title(content: Content) -> str:
    return f"{verdict_words(content)[1]} – {subject(content)}"


def state(content: Content) -> str:
    """The class of the verdict: bad, good, open or none."""
    return verdict_words(content)[0]


def facts(content: Content) -> str:
    header = content.header
    parts = [f"{header.started[:16].replace('T', ' ')} UTC", f"suite {header.suite}"]
    parts += [f"{count} {what}" for what, count in content.counts.items()]
    parts += [f"lowbit {header.lowbit}{f' at {header.commit[:12]}' if header.commit else ''}"]
    return escape(" · ".join(parts))


def verdict(content: Content) -> str:
    """Words, by what, how sure; findings beside what was upgraded; the answer with its command."""
    _, words = verdict_words(content)
    parts = [f'<h2 id="verdict-words">{escape(words[0].upper() + words[1:])}</h2>', f"<p>{_judged(content)}</p>"]
    columns = [column for column in (_findings(content), _upgrades(content)) if column]
    if columns:
        parts.append(f'<div class="columns">{"".join(f"<div>{column}</div>" for column in columns)}</div>')
    parts.append(f'<div class="answer">{_answer(content)}</div>')
    return "\n".join(parts)


def _judged(content: Content) -> str:
    if content.is_baseline:
        return "Each figure is the median of several runs, each of a fresh process."
    if not content.judged_by:
        return "Accept these figures with <code>pytest benches --update-baselines</code>; later runs are held to them."
    runs = f", the median of {content.baseline.runs} runs" if content.baseline else ""
    sure = (
        "Each suspicion was measured again in fresh processes."
        if content.confirmed
        else "Judged by what this run measured once; no suspicion was measured again."
    )
    return f"Judged by <code>{escape(content.judged_by)}</code>{escape(runs)}. {escape(sure)}"


def _findings(content: Content) -> str:
    findings = content.findings
    if not findings:
        return ""
    items = "".join(_finding(content, finding) for finding in findings[:FINDINGS])
    more = len(findings) - FINDINGS
    rest = f'<p class="more">and {more} more, on top of <a href="#cases">the table</a></p>' if more > 0 else ""
    return f'<h3>What to look at</h3><ul class="findings">{items}</ul>{rest}'


def _finding(content: Content, finding: Finding) -> str:
    link = f'<a href="#case={quote(finding.case, safe="")}">{escape(name(finding.case))}</a>'
    if finding.verdict is None:
        told = f"<b>{escape(WORDS[finding.status][0])}</b>: {escape(finding.reason[:300])}"
        return f'<li class="{finding.status}">{link}<div class="figures">{told}</div></li>'
    moved, change, limit, spread, runs = figures(finding.verdict, finding.spread)
    sure = [f"limit {limit}", f"σ {spread}"]
    sure += [f"beyond it in {runs} runs"] if finding.fails else []
    began = since(content, finding)
    if began is not None:
        sure.append(f"since {began}")
        sure += [f"that night: {', '.join(began.environment).replace(' -> ', ' → ')}"] if began.environment else []
    sure += [finding.reason] if finding.reason else []
    text = f"{escape(finding.verdict.metric)} {escape(moved)} <b>({escape(change)})</b>"
    return (
        f'<li class="{finding.status}">{link}<div class="figures">{text}</div>'
        f'<div class="sure">{escape(" · ".join(sure))}</div></li>'
    )


def _upgrades(content: Content) -> str:
    if content.baseline is None or not content.findings:
        return ""
    items = "".join(f"<li>{escape(line.replace(' -> ', ' → '))}</li>" for line in content.upgrades)
    listed = f'<ul class="upgrades">{items}</ul>' if items else '<p class="hint">Nothing: the same versions.</p>'
    return f"<h3>Changed since the baseline</h3>{listed}"


def _answer(content: Content) -> str:
    told = recommendation(
        content.records, max_kld=content.max_kld, max_vram_mib=content.max_vram_mib, arguments=content.arguments
    )
    body, _, rest = told.partition("\n  reproduce: ")
    lines = [
        f"<p><b>Which one to run:</b> {escape(' '.join(body.split()).removeprefix('recommendation').lstrip(': '))}</p>"
    ]
    if rest:
        command, _, after = rest.partition("\n")
        lines.append(
            f'<p class="command"><code id="answer-command">{escape(command)}</code>'
            '<button type="button" class="small copy" data-copies="answer-command">Copy</button></p>'
        )
        lines += [f'<p class="hint">{escape(" ".join(after.split()))}</p>'] if after.strip() else []
    return "".join(lines)


def environment(content: Content) -> str:
    """Versions beside the baseline's, what changed first; the device and the state of its card."""
    return f'<div class="pair"><div>{_versions(content)}</div><div>{_card(content)}</div></div>'


def _versions(content: Content) -> str:
    rows = list(environment_rows(content))
    compared = any(old is not None for _, old, _ in rows)
    body = "".join(
        f"<tr{' class=changed' if old not in (None, new) else ''}><td>{escape(key)}</td>"
        f"{f'<td>{escape(old)}</td>' if compared else ''}<td>{escape(new)}</td></tr>"
        for key, old, new in rows
    )
    head = "".join(f"<th scope=col><span>{word}</span></th>" for word in ("", *(["baseline"] * compared), "this run"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Versions">{table}</div>'


def _card(content: Content) -> str:
    header = content.header
    rows = [
        ("device", f"{header.device_name} ({header.device})"),
        ("model", f"{header.model}, load format {header.load_format}"),
        ("quality protocol", header.protocol),
        ("started", f"{header.started} (UTC)"),
        ("command", " ".join(["pytest", *header.argv])),
        ("kept in", str(content.path)),
        *_clocks(content),
    ]
    return f"<dl>{''.join(f'<dt>{escape(key)}</dt><dd>{escape(value)}</dd>' for key, value in rows)}</dl>"


def _clocks(content: Content) -> Iterable[tuple[str, str]]:
    """Clocks, heat and power after the cases: least, median, most; who held the clocks back, and who else was there."""
    states = [
        state
        for record in content.records
        if isinstance(card := record.info.get("card"), Mapping)
        for state in (card.get("before"), card.get("after"))
        if isinstance(state, Mapping)
    ]
    if not states:
        yield "card", "its clocks were not read" if not content.is_baseline else "a baseline keeps no clocks"
        return
    kinds = (("SM clock", "sm_mhz", "MHz"), ("memory clock", "mem_mhz", "MHz"), ("temperature", "temperature_c", "°C"))
    for title, key, unit in (*kinds, ("power", "power_w", "W")):
        found = [state[key] for state in states if isinstance(state.get(key), int | float)]
        if found:
            least, most = min(found), max(found)
            span = (
                f"{least:.0f}" if least == most else f"{least:.0f} – {most:.0f}, median {statistics.median(found):.0f}"
            )
            yield title, f"{span} {unit}"
    held = Counter(reason for state in states for reason in state.get("throttle") or ())
    yield (
        "clocks held back by",
        ", ".join(f"{why} ({count} of {len(states)})" for why, count in held.items()) or "nothing",
    )
    others = _others(states)
    yield "other processes", ", ".join(others) or "none seen"


def _others(states: Sequence[Mapping[str, object]]) -> list[str]:
    found: dict[str, None] = {}
    for state in states:
        others = state.get("others")
        if isinstance(others, list | tuple):
            found |= dict.fromkeys(map(str, others))
    return list(found)[:10]


def footer() -> str:
    return (
        f"Made by lowbit {escape(__version__)}; nothing in this file asks a network. Plots by "
        "Apache ECharts 6.1.0 (Apache-2.0) with zrender (BSD-3-Clause), inlined; their licences are in lowbit's "
        "package, <code>lowbit/report/page/vendor</code>."
    )
