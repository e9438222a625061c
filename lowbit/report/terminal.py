"""The end of a run in a terminal, plain text of at most 100 columns: the table, what to know of it, where time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from lowbit import regression
from lowbit.formats import FORMATS
from lowbit.record import Record
from lowbit.regression import Verdict
from lowbit.report.layout import NONE, Heading, divergence, fill, hang, lay_out, number
from lowbit.report.progress import Progress
from lowbit.report.recommendation import recommendation
from lowbit.report.rows import HEADLINE, Row, join, memory_metric, selection, state, workloads_of

__all__ = ["Progress", "footer", "notes", "recommendation", "table"]

BASE = next(row.id for row in FORMATS.values() if row.is_baseline)


class Column(NamedTuple):
    """A heading and the cell of a row."""

    heading: Heading
    cell: Callable[[Row], str]


def table(
    records: Iterable[Record], verdicts: Mapping[str, Sequence[Verdict]], *, gated: bool = False, color: bool = False
) -> str:
    """One line per (format, mode), fastest first, and a second table where there are workloads that it doesn't show.

    ``verdicts`` maps a case to its verdicts; ``gated`` says whether a baseline was there to give any.
    """
    rows = [row for row in join(records) if any(record.metrics for record in row.records)]
    if not rows:
        return "no case was measured"
    verdict = Column(Heading("verdict", right=False), lambda row: state(row, verdicts, gated))
    parts = [_render([*_main_columns(rows), verdict], rows, color), _legend(rows)]
    further = _further_columns(rows)
    if further:
        parts += ["", "all workloads, tok/s (prefill: of the prompt; decode: of the whole batch)"]
        parts.append(_render([*_names(), *further], rows, color))
    return "\n".join(parts)


def _names() -> list[Column]:
    return [
        Column(Heading("format", right=False), lambda row: row.format),
        Column(Heading("mode", right=False), lambda row: row.mode or NONE),
    ]


def _main_columns(rows: Sequence[Row]) -> list[Column]:
    prefill = next(iter(workloads_of(rows, "prefill")), "")
    memory = memory_metric(rows)
    base = {row.mode: row.decode_tok_s for row in rows if row.format == BASE}
    best = max((row.decode_tok_s or 0.0 for row in rows), default=0.0)
    embedded = _quality_is_embedded(rows)

    def decode(row: Row) -> str:
        return number(row.decode_tok_s) + ("*" if row.decode_tok_s == best and best else " ")

    def speed_up(row: Row) -> str:
        reference = base.get(row.mode)
        return f"{row.decode_tok_s / reference:.2f}" if row.decode_tok_s and reference else NONE

    def perplexity(row: Row) -> str:
        found = row.quality_value("ppl")
        return "n/a" if embedded else f"{found[1]:.3f}" if found else NONE

    def mbu(row: Row) -> str:
        value = row.value("decode", HEADLINE, "mbu")
        return NONE if value is None else f"{100 * value:.0f}%"

    return [
        *_names(),
        Column(Heading("decode ", "tok/s "), decode),
        Column(Heading("×bf16"), speed_up),
        Column(Heading("TTFT", "ms"), lambda row: number(row.value("prefill", prefill, "ttft_ms"))),
        Column(
            Heading("weights" if memory == "weights_mib" else "VRAM", "MiB"), lambda row: number(row.memory(memory))
        ),
        Column(Heading("ppl"), perplexity),
        Column(Heading("KL", "(embedded)" if embedded else ""), lambda row: divergence(row.kld)),
        Column(Heading("MBU"), mbu),
    ]


def _further_columns(rows: Sequence[Row]) -> list[Column]:
    prefills, decodes = workloads_of(rows, "prefill"), workloads_of(rows, "decode")
    if len(prefills) < 2 and set(decodes) <= {HEADLINE}:
        return []  # the first table has them

    def cell(kind: str, workload: str) -> Callable[[Row], str]:
        return lambda row: number(row.value(kind, workload, f"{kind}_tok_s"))

    return [
        Column(Heading(kind, workload), cell(kind, workload))
        for kind, workloads in (("decode", decodes), ("prefill", prefills))
        for workload in workloads
    ]


def _quality_is_embedded(rows: Sequence[Row]) -> bool:
    """With dummy weights the quality records are the embedded model's, under the same format."""
    return any(row.quality and row.quality.load_format == "dummy" for row in rows)


def _legend(rows: Sequence[Row]) -> str:
    parts = [f"decode: {HEADLINE}, * fastest", f"×bf16: over {BASE} in the same mode"]
    prefill = workloads_of(rows, "prefill")
    if prefill:
        parts.append(f"TTFT: {prefill[0]}")
    memory = memory_metric(rows)
    if memory == "vram_alloc_peak_mib":
        parts.append("VRAM: torch's allocator, for want of NVML")
    divergences = [found[0] for row in rows if (found := row.quality_value("kld"))]
    if _quality_is_embedded(rows):
        parts.append("ppl: dummy weights have none")
        parts.append(f"KL (embedded): the embedded model's under the same format{_protocol(divergences, 'kld')}")
    else:
        perplexities = [found[0] for row in rows if (found := row.quality_value("ppl"))]
        parts += [f"ppl{_protocol(perplexities, 'ppl')}"] if perplexities else []
        parts += [f"KL from this run's bf16{_protocol(divergences, 'kld')}"] if divergences else []
    return fill("; ".join(parts), "")


def _protocol(names: Sequence[str], family: str) -> str:
    return f": {names[0].removeprefix(family + '_').replace('_', ' ')}" if names else ""


def _render(columns: Sequence[Column], rows: Sequence[Row], color: bool) -> str:
    cells = [[column.cell(row) for column in columns] for row in rows]
    return "\n".join(lay_out([column.heading for column in columns], cells, color=color))


def notes(
    records: Iterable[Record], verdicts: Mapping[str, Sequence[Verdict]], *, accept: Callable[[str | None], str]
) -> str:
    """Below the table: skips by reason, failures, voids, and improvements with the command that accepts them.

    ``accept(selection)`` gives the command that makes what was measured the baseline.
    """
    records = list(records)
    parts: list[str] = []
    skipped: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.outcome == "skipped":
            skipped[str(record.unmet)].append(record)
    for reason, cases in skipped.items():
        formats = list(dict.fromkeys(record.format for record in cases))
        parts.append(hang(f"skipped, {reason}: {_counted(cases)} of {', '.join(formats)}"))
    for outcome in ("failed", "void"):
        parts += [
            hang(f"{outcome}: {regression.short_name(record.case)}: {first_line(record.error)}{_place(record)}")
            for record in records
            if record.outcome == outcome
        ]
    for case, judged in verdicts.items():
        better = [verdict for verdict in judged if verdict.status == "improvement"]
        if better:
            changes = ", ".join(_change(verdict) for verdict in better)
            parts.append(hang(f"unexplained improvement: {regression.short_name(case)}: {changes}"))
            parts.append(f"  accept it: {accept(selection(case))}")
    return "\n".join(parts)


def _place(record: Record) -> str:
    """The last of lowbit's own lines that a library's error came by, where the record has it."""
    lines = record.info.get("raised_in")
    return f" (in {lines[-1].partition(' ')[0]})" if lines else ""


def _counted(cases: Sequence[Record]) -> str:
    return "1 case" if len(cases) == 1 else f"{len(cases)} cases"


def _change(verdict: Verdict) -> str:
    text = f"{verdict.metric} {number(verdict.baseline)} -> {number(verdict.now)} {verdict.unit}".rstrip()
    relative = verdict.change_relative
    return text if relative is None else f"{text} ({100 * relative:+.1f} %)"


def first_line(text: str | None) -> str:
    return next((line for line in (text or "").splitlines() if line.strip()), "no message")


def footer(spent: object, *, wall_s: float, host_peak_mib: float | None) -> str:
    """lowbit's own time and memory. ``spent`` has one attribute in seconds per purpose (load, quantize, compile …)."""
    times = {name: seconds for name, seconds in vars(spent).items() if seconds >= 0.05}
    own = max(0.0, wall_s - sum(vars(spent).values()))
    shares = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items())
    share = 100 * own / wall_s if wall_s > 0 else 0.0
    text = f"lowbit: {wall_s:.1f} s wall: {shares + ', ' if shares else ''}own {own:.1f} s ({share:.1f} %)"
    memory = "" if host_peak_mib is None else f"; peak host memory {host_peak_mib:,.0f} MiB"
    whole = (text + memory).replace(" %", "\N{NO-BREAK SPACE}%")  # fill breaks at no such space
    return hang(whole).replace("\N{NO-BREAK SPACE}", " ")
