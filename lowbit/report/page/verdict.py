"""The first section of the page: in words how the run went, what to look at and why, which case to run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import quote

from lowbit.baselines import DEFAULT_RUNS
from lowbit.report.common import in_common
from lowbit.report.content import Content, Finding, name
from lowbit.report.layout import divergence
from lowbit.report.markdown import WORDS, figures, thousands, verdict_words
from lowbit.report.page.markup import escape
from lowbit.report.recommendation import Candidate, best_of, fastest_bf16, find_candidates, recommendation
from lowbit.report.rows import join, memory_metric, workloads_of
from lowbit.report.since import moving, moving_words, since

CARDS = 8
"""Shown beside the verdict; the table has all of them on top."""

CASES = 4
"""Links of a card that many cases share, for they failed with the same words."""

REASON = 300
"""Characters of an error's first line."""


def verdict(content: Content) -> str:
    """Words, by what, how sure; findings beside what was upgraded; the answer with its command."""
    _, words = verdict_words(content)
    parts = [f'<h2 id="verdict-words">{escape(words[0].upper() + words[1:])}</h2>', f"<p>{_judged(content)}</p>"]
    columns = [column for column in (_findings(content), _upgrades(content)) if column]
    if columns:
        parts.append(f'<div class="columns">{"".join(f"<div>{column}</div>" for column in columns)}</div>')
    parts.append(_moving(content))
    parts.append(f'<div class="answer">{_answer(content)}</div>')
    return "\n".join(parts)


def _judged(content: Content) -> str:
    if content.is_baseline:
        return _made_of(content)
    if not content.judged_by:
        return "Accept these figures with <code>pytest benches --update-baselines</code>; later runs are held to them."
    runs = f", the median of {content.baseline.runs} runs" if content.baseline else ""
    sure = (
        "Each suspicion was measured again in fresh processes."
        if content.confirmed
        else "Judged by what this run measured once; no suspicion was measured again."
    )
    by, _, moment = content.judged_by.partition(" of ")
    when = f" of {moment[:16].replace('T', ' ')} UTC" if moment else ""
    return f"Judged by <code>{escape(by)}</code>{escape(when + runs)}. {escape(sure)}{_blunt(content)}"


def _made_of(content: Content) -> str:
    """Of a baseline: how many runs, and which limits those are too few or too noisy for."""
    median = f"the median of {content.runs} runs, each of a fresh process"
    told = f"Each figure is {median if content.runs > 1 else 'of one run'}."
    if content.runs < DEFAULT_RUNS:
        told += f" {DEFAULT_RUNS} are asked for: with fewer the gate's limits are wider."
    return told + _blunt(content)


def _blunt(content: Content) -> str:
    """To unfold: what may get worse unseen. Closes the paragraph that it follows, and opens another."""
    if not content.blunt:
        return ""
    lines = "".join(f"<li>{escape(one)}</li>" for one in content.blunt)
    title = f"Limits too wide to guard much: {len(content.blunt)}"
    return f"</p><details><summary>{title}</summary><ul>{lines}</ul></details><p>"


# -- what to look at ---------------------------------------------------------------------------------------------------


def _findings(content: Content) -> str:
    cards = _cards(content.findings)
    if not cards:
        return ""
    items = "".join(_card(content, card) for card in cards[:CARDS])
    more = len({finding.case for card in cards[CARDS:] for finding in card})
    rest = (
        f'<p class="more">and {more} more case{"s" if more > 1 else ""}, on top of <a href="#cases">the table</a></p>'
        if more
        else ""
    )
    shared = in_common(content)
    told = f'<p class="shared"><b>All that fail have in common:</b> {escape(" · ".join(shared))}</p>' if shared else ""
    return f'<h3>What to look at</h3>{told}<ul class="findings">{items}</ul>{rest}'


def _cards(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings of one case belong together, and cases that failed with the same words; in the order of the worst."""
    cards: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        better = "" if finding.fails else "better"
        key = (finding.status, finding.reason) if finding.verdict is None else (finding.case, better)
        cards.setdefault(key, []).append(finding)
    return list(cards.values())


def _card(content: Content, card: Sequence[Finding]) -> str:
    first = card[0]
    if first.verdict is not None:
        figures = "".join(map(_figures, [content] * len(card), card))
        return f'<li class="{first.status}">{_link(first.case)}{figures}</li>'
    links = "<br>".join(_link(finding.case) for finding in card[:CASES])
    more = f'<br><a href="#cases">and {len(card) - CASES} more</a>' if len(card) > CASES else ""
    words = WORDS[first.status][len(card) > 1]
    counted = f"{len(card)} {words}" if len(card) > 1 else words
    return (
        f'<li class="{first.status}"><div class="figures"><b>{escape(counted)}</b>: '
        f'<span class="message">{escape(first.reason[:REASON])}</span></div>{links}{more}</li>'
    )


def _link(case: str) -> str:
    return f'<a class="case" href="#case={quote(case, safe="")}">{escape(name(case))}</a>'


def _figures(content: Content, finding: Finding) -> str:
    assert finding.verdict is not None
    moved, change, limit, spread, runs = figures(finding.verdict, finding.spread)
    sure = [f"limit {limit}", f"σ {spread}"]
    sure += [f"beyond it in {runs} runs"] if finding.fails else []
    began = since(content, finding)
    if began is not None:
        sure.append(f"since {began}{_upgraded(began.environment)}")
    sure += [finding.reason] if finding.reason else []
    text = f"{escape(finding.verdict.metric)} {escape(moved)} <b>({escape(change)})</b>"
    return f'<div class="figures">{text}</div><div class="sure">{escape(" · ".join(sure))}</div>'


def _moving(content: Content) -> str:
    """What gets worse and does not fail yet: its history opens by a click."""
    found, history = moving(content), content.history
    if not found or history is None:
        return ""
    nights = len(history.nights)
    items = "".join(f"<li>{_link(one.case)} {escape(moving_words(one, nights))}</li>" for one in found[:CASES])
    more = f'<p class="more"><a href="#history">and {len(found) - CASES} more</a></p>' if len(found) > CASES else ""
    return f'<div class="moving"><h3>Getting worse, within the limits</h3><ul>{items}</ul>{more}</div>'


def _upgraded(lines: Sequence[str]) -> str:
    """Names alone; from which version to which stands beside the findings and in the history."""
    names = [line.split(" ", 1)[0] for line in lines]
    return f", the night that {', '.join(names)} changed" if names else ""


def _upgrades(content: Content) -> str:
    if content.baseline is None or not content.findings:
        return ""
    items = "".join(_upgrade(line) for line in content.upgrades)
    listed = f'<ul class="upgrades">{items}</ul>' if items else '<p class="hint">Nothing: the same versions.</p>'
    return f"<h3>Changed since the baseline</h3>{listed}"


def _upgrade(line: str) -> str:
    what, _, versions = line.partition(" ")
    return f"<li><b>{escape(what)}</b> {escape(versions.replace(' -> ', ' → '))}</li>"


# -- which one to run --------------------------------------------------------------------------------------------------


def _answer(content: Content) -> str:
    limits = {"max_kld": content.max_kld, "max_vram_mib": content.max_vram_mib}
    told = recommendation(content.scored, **limits, arguments=content.arguments)  # type: ignore[arg-type]
    body, _, rest = told.partition("\n  reproduce: ")
    rows = join(content.scored)
    candidates = find_candidates(rows, **limits)  # type: ignore[arg-type]
    best = best_of(candidates)
    if best is None:
        words = " ".join(body.split()).removeprefix("recommendation").lstrip(": ")
        return f"<h3>Which one to run</h3><p>{escape(words[:1].upper() + words[1:])}</p>"
    command, _, after = rest.partition("\n")
    limit = f"the fastest with KL ≤ {content.max_kld:g}"
    if content.max_vram_mib is not None:
        limit += f" and {_memory_name(memory_metric(rows))} ≤ {content.max_vram_mib:,.0f} MiB"
    title = f"<b>{escape(best.row.format)}</b>{escape(best.row.title.removeprefix(best.row.format))}"
    lines = [
        f'<h3>Which one to run</h3><p class="best">{title} <span class="hint">{escape(limit)}</span></p>',
        f'<dl class="tiles">{"".join(_tiles(content, best, fastest_bf16(candidates), memory_metric(rows)))}</dl>',
        f'<p class="command"><code id="answer-command">{escape(command)}</code>'
        '<button type="button" class="small copy" data-copies="answer-command">Copy</button></p>',
    ]
    lines += [f'<p class="hint">{escape(" ".join(after.split()))}</p>'] if after.strip() else []
    return "".join(lines)


def _memory_name(metric: str) -> str:
    return "weights" if metric == "weights_mib" else "VRAM"


def _tiles(content: Content, best: Candidate, bf16: Candidate | None, memory: str) -> Iterable[str]:
    """What one asks of a case before running it, with bf16's figure under each."""
    other = bf16 if bf16 is not best else None
    factor = f"{best.decode_tok_s / other.decode_tok_s:.2f}× bf16's {thousands(other.decode_tok_s)}" if other else ""
    yield _tile("decode", thousands(best.decode_tok_s), "tok/s", factor)
    ttft = next(iter(workloads_of([best.row], "prefill")), "")
    kinds = (("prefill", ttft, "ttft_ms", f"TTFT of {ttft.lstrip('p')} tokens", "ms"),)
    for kind, workload, metric, title, unit in (*kinds, ("decode", "", "energy_j_per_tok", "energy", "J/tok")):
        value = _value(best, kind, workload, metric)
        if value is not None:
            base = _value(other, kind, workload, metric) if other else None
            yield _tile(title, thousands(value), unit, f"bf16 {thousands(base)}" if base is not None else "")
    if best.memory_mib is not None:
        base = other.memory_mib if other else None
        beside = f"bf16 {base:,.0f}" if base is not None else ""
        yield _tile(_memory_name(memory), f"{best.memory_mib:,.0f}", "MiB", beside)
    model = "of the embedded model" if content.header.load_format == "dummy" else "from this run's bf16"
    if any(score.format == best.row.format for score in content.scores):
        model += f", scored in {content.scored_by}"
    yield _tile("KL divergence", divergence(best.row.kld), "nat", model)


def _value(candidate: Candidate, kind: str, workload: str, metric: str) -> float | None:
    """Of a decode the candidate's own record; of a prefill its row's."""
    return candidate.record.metrics.get(metric) if kind == "decode" else candidate.row.value(kind, workload, metric)


def _tile(title: str, value: str, unit: str, beside: str) -> str:
    small = f"<small>{escape(beside)}</small>" if beside else ""
    return f"<div><dt>{escape(title)}</dt><dd><b>{escape(value)}</b> {escape(unit)}{small}</dd></div>"
