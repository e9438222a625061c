"""The answer below the table: the fastest case within a KL and a VRAM limit, with the command that reproduces it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowbit.formats import FORMATS
from lowbit.record import Record
from lowbit.report.layout import hang
from lowbit.report.rows import Row, join, memory_metric, selection


@dataclass(frozen=True)
class Candidate:
    """A measured row and what stands between it and the recommendation: share by which each limit is passed."""

    row: Row
    record: Record
    decode_tok_s: float
    memory_mib: float | None
    misses: tuple[tuple[str, float], ...]

    @property
    def distance(self) -> tuple[float, float]:
        return sum(excess for _, excess in self.misses), -self.decode_tok_s


def recommendation(
    records: Iterable[Record], *, max_kld: float, max_vram_mib: float | None, arguments: Sequence[str]
) -> str:
    """The fastest measured case (decode, batch 1, short context) in both limits; else the closest and what it misses.

    ``arguments`` are the options that choose this run's model. bf16 itself qualifies, with KL 0. Void and failed cases
    never do.
    """
    rows = join(records)
    memory = memory_metric(rows)
    candidates = find_candidates(rows, max_kld=max_kld, max_vram_mib=max_vram_mib)
    if not candidates:
        return "recommendation: none, for no decode case at batch 1 and a short context was measured"
    label = "weights" if memory == "weights_mib" else "VRAM"
    limits = f"KL ≤ {max_kld:g}"
    if max_vram_mib is not None:
        limits += f" and {label} ≤ {max_vram_mib:,.0f} MiB"
    best = best_of(candidates)
    if best is None:
        closest = min(candidates, key=lambda candidate: candidate.distance)
        missed = "; ".join(text for text, _ in closest.misses)
        return hang(
            f"recommendation: no measured case has {limits}. Closest: {_name(closest)} at "
            f"{closest.decode_tok_s:.1f} tok/s: {missed}. {_advice(closest)}"
        )
    facts = [f"{best.decode_tok_s:.1f} tok/s{_against_bf16(best, candidates)}", _divergence(best.row)]
    if best.memory_mib is not None:
        facts.append(f"{label} {best.memory_mib:,.0f} MiB")
    answer = hang(f"recommendation ({limits}): {_name(best)}: {', '.join(facts)}")
    lines = [answer, f"  reproduce: {reproduce(best.record.case, arguments)}"]
    unscored = [_name(c) for c in candidates if c.row.kld is None and c.decode_tok_s > best.decode_tok_s]
    if unscored:
        lines.append(hang(f"  faster, but without a KL in this run (test_quality gives it): {', '.join(unscored)}"))
    return "\n".join(lines)


def find_candidates(rows: Sequence[Row], *, max_kld: float, max_vram_mib: float | None) -> list[Candidate]:
    """Every row whose decode at batch 1 over a short context was measured, with what it misses of the limits."""
    memory = memory_metric(rows)
    return [_candidate(row, row.short, memory, max_kld, max_vram_mib) for row in rows if row.short is not None]


def best_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """The fastest within the limits; None where nothing is within them."""
    return max((candidate for candidate in candidates if not candidate.misses), key=_speed, default=None)


def fastest_bf16(candidates: Sequence[Candidate]) -> Candidate | None:
    """What a speed-up is told against: the base format in its fastest mode."""
    base = [c for c in candidates if c.row.format in FORMATS and FORMATS[c.row.format].is_baseline]
    return max(base, key=_speed, default=None)


def _speed(candidate: Candidate) -> float:
    return candidate.decode_tok_s


def reproduce(case: str, arguments: Sequence[str]) -> str:
    """The command that runs this case and no other: ``-k`` with the test's whole name, brackets included."""
    return " ".join(["pytest benches", *arguments, f'-k "{selection(case)}"'])


def _candidate(row: Row, record: Record, memory: str, max_kld: float, max_vram_mib: float | None) -> Candidate:
    misses = []
    kld, used = row.kld, record.metrics.get(memory, row.memory(memory))
    if kld is None:
        misses.append((f"its KL is not known ({_why_no_kld(row, record)})", float("inf")))
    elif not kld <= max_kld:
        misses.append((f"its KL is {kld:.4g}", (kld - max_kld) / max(max_kld, 1e-9)))
    if max_vram_mib is not None and used is None:
        misses.append(("its memory is not known", float("inf")))
    elif max_vram_mib is not None and used is not None and used > max_vram_mib:
        over = used - max_vram_mib
        misses.append((f"it takes {used:,.0f} MiB, {over:,.0f} too many", over / max(max_vram_mib, 1e-9)))
    return Candidate(row, record, record.metrics["decode_tok_s"], used, tuple(misses))


def _advice(closest: Candidate) -> str:
    if closest.row.kld is None and closest.row.quality is None:
        return f'Run its test_quality too: -k "{closest.row.format}"'
    return "Raise --max-kld or --max-vram, or measure more formats."


def _why_no_kld(row: Row, record: Record) -> str:
    if row.quality is None:
        return f"test_quality of this format did not run{_of_the_search(record)}"
    reasons = (reason for name, reason in row.quality.unavailable.items() if name.startswith("kld"))
    return next(reasons, row.quality.error or row.quality.outcome)


def _of_the_search(record: Record) -> str:
    """The KL by which ``auto`` chose: of another text than the scored one."""
    found = record.info.get("auto")
    if not found:
        return ""
    of = f" of the {found['kld_of']} model" if found.get("kld_of") else ""
    return f"; auto chose it by a KL of {found['kld']:.4g}{of} on the calibration text"


def _divergence(row: Row) -> str:
    if row.kld == 0.0:
        return "KL 0"
    embedded = row.quality is not None and row.quality.load_format == "dummy"
    return f"KL {row.kld:.4g}{' on the embedded model' if embedded else ''}"


def _against_bf16(best: Candidate, candidates: Sequence[Candidate]) -> str:
    fastest = fastest_bf16(candidates)
    if fastest is None:
        return ""
    if fastest is best:
        return " (the fastest bf16)"
    return f" ({best.decode_tok_s / fastest.decode_tok_s:.2f}× bf16's best, {fastest.row.mode})"


def _name(candidate: Candidate) -> str:
    return candidate.row.title
