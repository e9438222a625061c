"""Rows of the table: the records of one run joined by format (with its backend) and compile mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lowbit.formats import FORMATS
from lowbit.record import Record
from lowbit.regression import Verdict
from lowbit.workloads import WORKLOADS

HEADLINE = "b1_c0"
"""The workload that rows are sorted and recommended by: decode at batch 1, context ~0."""

SHORT = (HEADLINE, "b1_c128")
"""Decode at batch 1 over a short context: where the first was not measured the second is told of, by its name. It reads
more KV cache, so nothing looks faster by it."""

SPEED_METRICS = ("decode_tok_s", "ttft_ms", "speed_ratio")
VRAM_METRICS = ("vram_peak_mib", "vram_alloc_peak_mib", "weights_mib")
"""What stands for a case's memory, best first: NVML's peak, the allocator's, the weights alone (all that a CPU has)."""


@dataclass
class Row:
    """One format under one mode: its speed records by (kind, workload), and the format's quality record."""

    format: str
    mode: str | None
    speed: dict[tuple[str, str], Record] = field(default_factory=dict)
    quality: Record | None = None

    @property
    def headline(self) -> Record | None:
        return self.speed.get(("decode", HEADLINE))

    @property
    def short(self) -> Record | None:
        """The measured decode at batch 1 over a short context."""
        found = (self.speed.get(("decode", workload)) for workload in SHORT)
        return next(
            (one for one in found if one and one.outcome == "measured" and one.metrics.get("decode_tok_s")), None
        )

    @property
    def title(self) -> str:
        """``a16w4_g128-torchao · eager``, with the workload where that is not the headline's."""
        short = self.short
        name = f"{self.format} · {self.mode}"
        return name if short is None or short.workload == HEADLINE else f"{name} ({short.workload})"

    @property
    def records(self) -> list[Record]:
        return [*self.speed.values(), *([self.quality] if self.quality else [])]

    def value(self, kind: str, workload: str, name: str) -> float | None:
        """A metric of one of the row's speed records; None where it was not measured."""
        record = self.speed.get((kind, workload))
        return record.metrics.get(name) if record else None

    @property
    def decode_tok_s(self) -> float | None:
        return self.value("decode", HEADLINE, "decode_tok_s")

    def memory(self, name: str) -> float | None:
        """A memory metric of the headline, else of the first record that has it."""
        ordered = [self.headline, *self.speed.values(), self.quality]
        return next((record.metrics[name] for record in ordered if record and name in record.metrics), None)

    def quality_value(self, family: str) -> tuple[str, float] | None:
        """``kld`` → ``("kld_embedded_512_8176tok", 0.0312)``: the stored name says protocol and token count."""
        metrics = self.quality.metrics if self.quality else {}
        return next(((name, value) for name, value in metrics.items() if name.startswith(family + "_")), None)

    @property
    def kld(self) -> float | None:
        """Mean KL from this run's own base format: 0 for that itself, None where it was not scored."""
        if self.format in FORMATS and FORMATS[self.format].is_baseline:
            return 0.0
        found = self.quality_value("kld")
        return found[1] if found else None


def join(records: Iterable[Record]) -> list[Row]:
    """Rows sorted by headline decode speed, fastest first; a format that only has quality keeps a row of its own."""
    rows: dict[tuple[str, str | None], Row] = {}
    qualities: dict[str, Record] = {}
    for record in records:
        if record.kind == "quality":
            qualities[record.format] = record
        elif record.workload is not None and record.kind != "eval":
            row = rows.setdefault((record.format, record.mode), Row(record.format, record.mode))
            row.speed[record.kind, record.workload] = record
    with_speed = {row.format for row in rows.values()}
    for name, quality in qualities.items():
        if name not in with_speed:
            rows[name, None] = Row(name, None)
        for row in rows.values():
            if row.format == name:
                row.quality = quality
    return sorted(rows.values(), key=lambda row: (-(row.decode_tok_s or 0.0), row.format, row.mode or ""))


def selection(case: str) -> str:
    """The ``-k`` expression that selects this case and no other: its whole name, brackets included."""
    return case.rpartition("::")[2]


def workloads_of(rows: Iterable[Row], kind: str) -> list[str]:
    """The ids of one kind's workloads that the rows have, in the order of the workload table; unknown ones last."""
    order = list(dict.fromkeys(workload.id for workload in WORKLOADS))
    present = {workload for row in rows for (of_kind, workload) in row.speed if of_kind == kind}
    return sorted(present, key=lambda name: (order.index(name) if name in order else len(order), name))


def memory_metric(rows: Sequence[Row]) -> str:
    """The best memory metric that any row has: all rows show the same one, for they must be comparable."""
    return next((name for name in VRAM_METRICS if any(row.memory(name) is not None for row in rows)), VRAM_METRICS[-1])


def state(row: Row, verdicts: Mapping[str, Sequence[Verdict]], gated: bool) -> str:
    """The row's word: the worst of what its records (and the format's quality) were found to be."""
    outcomes = {record.outcome for record in row.records}
    judged = [verdict for record in row.records for verdict in verdicts.get(record.case, ())]
    if any(verdict.status == "regression" for verdict in judged):
        return "REGRESSED"
    if any(verdict.status == "missing" for verdict in judged):
        return "MISSING"
    for outcome in ("failed", "void"):
        if outcome in outcomes:
            return outcome
    if all(record.outcome == "skipped" for record in row.speed.values()) and row.speed:
        return "skipped"
    if not gated:
        return "measured"
    if any(record.outcome == "measured" and record.case not in verdicts for record in row.records):
        return "new"
    improved = [verdict.metric for verdict in judged if verdict.status == "improvement"]
    if improved:
        return "faster" if any(name in SPEED_METRICS for name in improved) else "better"
    return "ok"
