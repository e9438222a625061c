"""``--eval``'s table: a line per format and task, each figure with its standard error."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.metrics import EVALUATED
from lowbit.record import Record
from lowbit.report.layout import Heading, lay_out


def table(records: Sequence[Record]) -> str:
    """Empty where nothing was evaluated."""
    evaluated = [record for record in records if record.kind == "eval" and "eval" in record.info]
    if not evaluated:
        return ""
    headings = [
        Heading("format", right=False),
        Heading("task", right=False),
        Heading("docs"),
        Heading("lm-evaluation-harness", right=False),
    ]
    cells = []
    for record in sorted(evaluated, key=lambda record: (record.workload or "", record.format)):
        info = record.info["eval"]
        cells.append([record.format, str(info["task"]), str(info["docs"]), "; ".join(_figures(info))])
    versions = sorted({str(record.info["eval"]["harness"]) for record in evaluated})
    return "\n".join([*lay_out(headings, cells), f"lm_eval {', '.join(versions)}; ± one standard error"])


def _figures(info: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"{name} {info['values'][name]:.4g}" + (f" ± {info['stderr'][name]:.2g}" if name in info["stderr"] else "")
        for name in EVALUATED
        if name in info["values"]
    ]
