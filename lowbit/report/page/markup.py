"""The parts of the page that need no script, but for the verdict: heading, environment, footer. All text is escaped."""

from __future__ import annotations

import html
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lowbit import __version__
from lowbit.report.content import Content
from lowbit.report.markdown import subject, verdict_words
from lowbit.report.page.data import environment_rows

__all__ = ["environment", "escape", "facts", "footer", "state", "subject", "title"]


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
    this = "baseline" if content.is_baseline else "this run"
    head = "".join(f"<th scope=col><span>{word}</span></th>" for word in ("", *(["baseline"] * compared), this))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Versions">{table}</div>'


def _card(content: Content) -> str:
    header = content.header
    rows = [
        ("device", f"{header.device_name} ({header.device})"),
        ("model", f"{header.model}, load format {header.load_format}"),
        ("quality protocol", header.protocol),
        ("started", f"{header.started[:16].replace('T', ' ')} UTC"),
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
