"""Every metric of the suite, one decorated function each: its name, unit, better direction and limit stand together.

A metric is a function from a ``Measurement`` (the raw quantities of one case) to a float. Returning ``None`` means
that the case does not have it (a prefill has no tpot). A new metric is one function in its subject's file here and
nothing else.
"""

from __future__ import annotations

from dataclasses import replace

# METRICS lists them in this order.
# isort: off
from lowbit.metrics import speed, memory, cost, quality, evaluation

# isort: on
from lowbit.metrics.evaluation import EVALUATED
from lowbit.metrics.measurement import MIB, Evaluation, Measurement, Quality
from lowbit.metrics.quality import PROTOCOL_METRICS
from lowbit.metrics.row import METRICS, Better, Limit, Metric, metric

__all__ = [
    "EVALUATED",
    "METRICS",
    "MIB",
    "PROTOCOL_METRICS",
    "Better",
    "Evaluation",
    "Limit",
    "Measurement",
    "Metric",
    "Quality",
    "derive",
    "find",
    "metric",
    "stderr_of",
]

SUBJECTS = (speed, memory, cost, quality, evaluation)
"""In the order in which their metrics are listed."""


def derive(measurement: Measurement) -> dict[str, float]:
    """All metrics that this measurement has, under their stored names."""
    values: dict[str, float] = {}
    for row in METRICS.values():
        if measurement.kind not in row.kinds:
            continue
        value = row.compute(measurement)
        if value is not None:
            values[_stored_name(row.name, measurement)] = float(value)
    for further in measurement.further_quality:  # behind the first, by which formats are compared
        shown = replace(measurement, quality=further)
        scored = {name: METRICS[name].compute(shown) for name in PROTOCOL_METRICS}
        values |= {_stored_name(name, shown): float(value) for name, value in scored.items() if value is not None}
    return values


def _stored_name(name: str, m: Measurement) -> str:
    if m.evaluation is not None and name.startswith("eval_"):
        return f"{name}_{m.evaluation.task}_{m.evaluation.docs}docs"
    if name not in PROTOCOL_METRICS or m.quality is None:
        return name
    suffix = f"_{m.quality.kld_tokens}tok" if name in ("kld", "top1") else ""
    return f"{name}_{m.quality.protocol}{suffix}"


def find(stored_name: str) -> Metric | None:
    """The row behind a stored name, ``ppl_wikitext2_2048`` → ``ppl``; None for a name of another version."""
    if stored_name in METRICS:
        return METRICS[stored_name]
    families = [*PROTOCOL_METRICS, *(name for name in METRICS if name.startswith("eval_"))]
    found = [name for name in families if stored_name.startswith(name + "_")]
    return METRICS[max(found, key=len)] if found else None


def stderr_of(stored_name: str) -> str | None:
    """Under which stored name a metric's standard error stands; None for one without."""
    metric = find(stored_name)
    if metric is None or metric.limit is None or not metric.limit.stderrs:
        return None
    return f"{metric.name}_stderr{stored_name.removeprefix(metric.name)}"
