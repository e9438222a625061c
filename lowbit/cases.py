"""Case = format × compile mode × workload: which cases a suite has for a model, in the order they run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowbit import workloads
from lowbit.errors import unknown
from lowbit.formats import FORMATS, Format
from lowbit.formats.row import EVERY_MODE
from lowbit.record import Kind, Record
from lowbit.workloads import Workload

SUITE_MODES: dict[str, tuple[str, ...]] = {
    "quick": ("eager", "reduce-overhead", "native"),
    "nightly": EVERY_MODE,
    "full": EVERY_MODE,
}
"""Compile modes by suite, the smallest first: a suite has the formats of those before it. lowbit/compilers.py says what
each mode is."""

ON_REQUEST = ("native",)
"""Modes of rows that name them only: no other library's modules run in lowbit's own kernels."""

KINDS: tuple[Kind, ...] = ("quality", "eval", "prefill", "decode")
"""``eval`` has cases only where --eval names tasks: see ``evaluation_cases``."""


@dataclass(frozen=True)
class Case:
    """One test. ``mode`` and ``workload`` are None for quality, which is computed once per format; ``task`` is that of
    lm-evaluation-harness that an eval case runs."""

    kind: Kind
    format: Format
    mode: str | None = None
    workload: Workload | None = None
    task: str | None = None

    @property
    def id(self) -> str:
        """The part of the test's name in brackets: ``a16w4_g128-torchao-reduce-overhead-b1_c0``."""
        parts = (self.format.id, self.mode, self.workload.id if self.workload else self.task)
        return "-".join(part for part in parts if part)

    @property
    def rows(self) -> int | None:
        """Tokens per timed forward pass: the rows of every product. None for quality."""
        if self.workload is None:
            return None
        return self.workload.batch * (self.workload.prompt_tokens if self.kind == "prefill" else 1)

    @property
    def head_rows(self) -> int | None:
        """Those of them that lm_head sees: of a prompt the last. None for quality."""
        return None if self.workload is None else self.workload.batch

    @property
    def name(self) -> str:
        """The case as messages word it: ``decode[a16w4_g128-torchao-reduce-overhead-b1_c0]``."""
        return f"{self.kind}[{self.id}]"

    def record(self, nodeid: str, model: str, load_format: str) -> Record:
        """This case's record before anything is known of it; ``nodeid`` is its test's."""
        workload = self.workload.id if self.workload else self.task
        return Record(nodeid, self.kind, self.format.id, self.mode, workload, model, load_format)


def enumerate_cases(kind: Kind, suite: str, parameters: int, formats: Iterable[Format] | None = None) -> list[Case]:
    """Every case of one test function for a model of this many parameters. Raises LowbitError on an unknown suite."""
    if suite not in SUITE_MODES:
        raise unknown("suite", suite, SUITE_MODES)
    suites = list(SUITE_MODES)
    held = suites[: suites.index(suite) + 1]
    rows = [row for row in (FORMATS.values() if formats is None else formats) if row.suite in held]
    if kind == "quality":
        return [Case("quality", row) for row in rows]
    if kind == "eval":
        return []
    return [
        Case(kind, row, mode, workload)
        for row in rows
        for mode in SUITE_MODES[suite]
        if (mode in row.modes if row.modes else mode not in ON_REQUEST)
        for workload in workloads.select(kind, suite, parameters)
    ]


def evaluation_cases(suite: str, tasks: Iterable[str]) -> list[Case]:
    """A case per format of the suite and task of lm-evaluation-harness."""
    tasks = list(tasks)
    return [Case("eval", case.format, task=task) for case in enumerate_cases("quality", suite, 0) for task in tasks]


def run_order(case: Case) -> tuple[int, int, int]:
    """Sort key: one format is alive at a time; its quality first, then mode after mode."""
    formats = list(FORMATS)
    modes = list(SUITE_MODES["full"])
    position = formats.index(case.format.id) if case.format.id in FORMATS else len(formats)
    return position, -1 if case.mode is None else modes.index(case.mode), KINDS.index(case.kind)
