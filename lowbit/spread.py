"""How much a device's numbers differ from run to run: σ pooled over its cases, and how many σ a limit must be."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lowbit import metrics
from lowbit.metrics import Limit, Metric
from lowbit.record import Record

K = 4.0
MIN_CASES_TO_TRIM = 5
HOST_BOUND_SHARE = 0.8
"""A compiled case whose ``host_share`` is above this waits for Python as eager does: on an H200 torchao's compiled rows
have 0.87 to 0.997 and gave 99 and 230 tok/s in two runs of an hour; gemlite's have up to 0.56, and agree to 0.3 % where
the same kernels were chosen."""


class Values(NamedTuple):
    """One metric of one baseline row: the median and the value of each fresh process that it was taken over."""

    median: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Iterable[float]) -> Values:
        """The values and their median. Raises ValueError for none."""
        values = tuple(runs)
        return cls(statistics.median(values), values)


@dataclass(frozen=True)
class Row:
    """What a baseline knows of one case. ``case`` is the pytest node id, ``metrics`` are keyed by stored name."""

    case: str
    kind: str
    format: str
    mode: str | None
    workload: str | None
    dtype: str = ""
    metrics: Mapping[str, Values] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


class Spread(NamedTuple):
    """Run-to-run standard deviation in units of ``scale(limit, median)``, and the degrees of freedom it stands on."""

    sigma: float
    degrees_of_freedom: int


NO_SPREAD = Spread(0.0, 0)


@dataclass(frozen=True)
class Spreads:
    """A device's noise: per (metric, host bound) pooled over its cases, and per (metric, case) where one sticks out."""

    pooled: Mapping[tuple[str, bool], Spread] = field(default_factory=dict)
    own: Mapping[tuple[str, str], Spread] = field(default_factory=dict)

    def of(self, name: str, row: Row) -> Spread:
        """The spread that this metric of this case is judged by; ``NO_SPREAD`` (floors only) when nothing is known."""
        return self.own.get((name, row.case)) or self.pooled.get((name, host_bound(row))) or NO_SPREAD


def host_bound(case: Record | Row) -> bool:
    """Whether a prefill or decode waits for Python, so that its noise and limits are the host's: eager ones, and others
    whose measured ``host_share`` (a baseline row's: the median) is over ``HOST_BOUND_SHARE``."""
    if case.kind not in ("prefill", "decode"):
        return False
    share = case.metrics.get("host_share", 0.0)
    return case.mode == "eager" or (share.median if isinstance(share, Values) else share) > HOST_BOUND_SHARE


def floors(metric: Metric, host_bound: bool) -> Limit | None:
    """The metric's floors for this sort of case; None when it is never gated."""
    return metric.host_bound_limit if host_bound and metric.host_bound_limit else metric.limit


def scale(limit: Limit, median: float) -> float:
    """The unit in which a metric's spread is pooled, so that cases of different size can share one.

    Relative metrics: ``|median|``, but no less than where the absolute floor takes over (a kld or compile_s of 0 has
    no relative spread). Absolute metrics: 1.
    """
    return max(abs(median), limit.absolute / limit.relative) if limit.relative else 1.0


def spread_factor(degrees_of_freedom: int, runs: int) -> float:
    """k: how many pooled standard deviations a value may lie from a baseline that is the median of ``runs``.

    With σ known and the median of 5 runs as baseline, 3 of 3 values exceed 2.6 σ by chance once in 20,000 (numerical
    integration); K = 4 leaves room for cases up to 1.5 times as noisy as their pool. What σ's own uncertainty asks
    (7.8 at 4 degrees of freedom, 4.1 at 8, 3.0 at 20) lies below K * (1 + 4 / (ν - 2)) for every ν from 3. Fewer runs
    make the baseline itself less certain: sqrt(1 + 1 / runs), 1.2 being the value of 5 runs. Below 3 degrees of
    freedom the honest factor is 37 and more, a gate that can't fail: it stays at that of 3 and the floors carry it.
    """
    if degrees_of_freedom < 1:
        return 0.0
    return K * (1 + 4 / max(degrees_of_freedom - 2, 1)) * math.sqrt((1 + 1 / max(runs, 1)) / 1.2)


def outlying_variance_ratio(degrees_of_freedom: int) -> float:
    """Variance / median variance that one case in a million of a homogeneous pool exceeds (Wilson-Hilferty)."""
    a = 2 / (9 * degrees_of_freedom)
    return ((1 - a + 4.75 * math.sqrt(a)) / (1 - a)) ** 3


def pool_spread(rows: Iterable[Row]) -> Spreads:
    """σ per metric over all cases of a device; host-bound cases apart, for their noise is another.

    Five runs of one case say too little, so the variances about each case's mean are pooled. A case that scatters far
    more than the pool's median is left out of it and judged by its own σ: one freak run must not blind the gate for
    all the others.
    """
    groups: defaultdict[tuple[str, bool], list[tuple[str, float, int]]] = defaultdict(list)
    for row in rows:
        for name, values in row.metrics.items():
            metric = metrics.find(name)
            floor = floors(metric, host_bound(row)) if metric else None
            if floor is not None and len(values.runs) > 1:
                deviations = [run / scale(floor, values.median) for run in values.runs]
                groups[name, host_bound(row)].append((row.case, statistics.variance(deviations), len(deviations) - 1))
    pooled, own = {}, {}
    for (name, bound), cases in groups.items():
        typical = statistics.median(variance for _, variance, _ in cases)
        kept = []
        for case, variance, freedom in cases:
            if len(cases) >= MIN_CASES_TO_TRIM and variance > outlying_variance_ratio(freedom) * typical:
                own[name, case] = Spread(math.sqrt(variance), freedom)
            else:
                kept.append((variance, freedom))
        freedom = sum(freedom for _, freedom in kept)
        pooled[name, bound] = Spread(math.sqrt(sum(variance * f for variance, f in kept) / freedom), freedom)
    return Spreads(pooled, own)
