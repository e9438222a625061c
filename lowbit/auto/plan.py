"""Which format each group of linears gets: the fastest combination within a limit on KL. Pure arithmetic.

Every group takes one of its options. KL divergences of groups that are quantized one at a time add up, about: the
errors are small and independent. Seconds add up exactly, as decode is one product after the other. So this is a
multiple-choice knapsack (Sinha and Zoltners 1979); its whole Pareto front is small enough to be had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar


class Option(NamedTuple):
    """One format for one group: KL divergence in nats with this group alone quantized, seconds per decoded token."""

    format: str
    kld: float
    seconds: float


class Plan(NamedTuple):
    """A format for every group, with the sums of their options."""

    kld: float
    seconds: float
    formats: Mapping[str, str]


def front(options: Mapping[str, Sequence[Option]]) -> list[Plan]:
    """Every combination that none beats in both sums, the fastest first. ``options`` by group, none of them empty."""
    plans = [Plan(0.0, 0.0, {})]
    for group, choices in options.items():
        plans = _undominated(
            Plan(plan.kld + kld, plan.seconds + seconds, {**plan.formats, group: name})
            for plan in plans
            for name, kld, seconds in _undominated(choices)
        )
    return plans


T = TypeVar("T", Option, Plan)


def _undominated(items: Iterable[T]) -> list[T]:
    kept: list[T] = []
    for item in sorted(items, key=lambda item: (item.seconds, item.kld)):
        if not kept or item.kld < kept[-1].kld:
            kept.append(item)
    return kept


def fastest(plans: Iterable[Plan], max_kld: float) -> Plan | None:
    """The fastest plan within ``max_kld``, as a plan without loss is always; None where there is none."""
    return min((plan for plan in plans if plan.kld <= max_kld), key=lambda plan: plan.seconds, default=None)


STEP = 0.9
"""Of the sum that turned out to be too much: how far one step back goes at least."""


def step_back(plans: Iterable[Plan], tried: Plan, measured_kld: float, max_kld: float) -> Plan | None:
    """The plan to try after ``tried``, whose KL was measured to be ``measured_kld`` > ``max_kld``.

    The sums are taken to be wrong by the same factor everywhere; each step goes back by a tenth at least, so that the
    steps end: at the plan without loss, or None where every plan has some.
    """
    limit = tried.kld * min(max_kld / measured_kld, STEP)
    return fastest(plans, limit)
