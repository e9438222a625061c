"""A metric as a row: its limit, its properties, and the decorator that puts a function into METRICS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lowbit.metrics.measurement import Measurement

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Limit:
    """How far a metric may move in its worse direction before it is a regression.

    The limit is ``max(absolute, relative * |baseline|, k * pooled spread)``; ``k`` is regression.py's. A metric with
    neither floor is reported and never gated. ``stderrs`` widens it to so many standard errors of the baseline's value,
    where a metric beside it (``…_stderr``) tells them.
    """

    relative: float = 0.0
    absolute: float = 0.0
    stderrs: float = 0.0


@dataclass(frozen=True)
class Metric:
    """One row of METRICS. ``kinds`` are the tests that have it; ``gated_on`` the device kinds where it can fail."""

    name: str
    unit: str
    better: Better
    limit: Limit | None
    kinds: tuple[str, ...]
    gated_on: tuple[str, ...]
    host_bound_limit: Limit | None
    compute: Callable[[Measurement], float | None]
    description: str


METRICS: dict[str, Metric] = {}

SPEED = ("prefill", "decode")
EVERY = ("prefill", "decode", "quality")


def metric(
    unit: str,
    better: Better,
    limit: Limit | None = None,
    kinds: tuple[str, ...] = SPEED,
    gated_on: tuple[str, ...] = ("cuda", "cpu"),
    host_bound_limit: Limit | None = None,
) -> Callable[[Callable[[Measurement], float | None]], Callable[[Measurement], float | None]]:
    """Register the function below as the metric of its name."""

    def register(compute: Callable[[Measurement], float | None]) -> Callable[[Measurement], float | None]:
        name, text = compute.__name__, (compute.__doc__ or "").strip()
        METRICS[name] = Metric(name, unit, better, limit, kinds, gated_on, host_bound_limit, compute, text)
        return compute

    return register


HOST_BOUND = Limit(relative=0.10)  # eager decode waits for Python, not for the card
