"""Simulates the gate: how often it cries wolf, and how often it misses. ``python -m lowbit.simulation`` prints it.

Each trial makes a device's baseline from scratch (cases x runs of noise σ around 1), pools the spread, then puts each
case through first run, suspicion and confirmation. Vectorised over trials; tests/test_regression.py proves that it
decides as ``spread.pool_spread``, ``regression.judge`` and ``confirm`` do, number for number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowbit.regression import REPEATS
from lowbit.spread import MIN_CASES_TO_TRIM, outlying_variance_ratio, spread_factor

Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator, tuple[int, ...]], Floats]

FALSE_ALARMS_ALLOWED = 1 / 20_000
CATCH_REQUIRED = 0.99


def gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Standard normal noise."""
    return rng.standard_normal(shape)


def heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Standard normal noise of which 2 % of the runs are 5 σ slower: what a busy host does to a run."""
    return rng.standard_normal(shape) + 5.0 * (rng.random(shape) < 0.02)


def uneven(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Normal noise whose σ differs from case to case: 0.5 to 1.5 times the nominal. ``shape`` is [trials, cases, n]."""
    return rng.standard_normal(shape) * np.linspace(0.5, 1.5, shape[1])[:, None]


class Outcome(NamedTuple):
    """``verdicts`` simulated; the shares of them that failed with nothing changed, and with the shift planted."""

    verdicts: int
    false_alarms: float
    caught: float


def limits(baseline: Floats, floor: float) -> Floats:
    """[trials, cases, runs] relative values → [trials, cases] limits relative to each case's median."""
    _, cases, runs = baseline.shape
    freedom = runs - 1
    variance = (baseline / np.median(baseline, axis=2, keepdims=True)).var(axis=2, ddof=1)
    kept = np.ones_like(variance, dtype=bool)
    if cases >= MIN_CASES_TO_TRIM:
        kept = variance <= outlying_variance_ratio(freedom) * np.median(variance, axis=1, keepdims=True)
    count = kept.sum(axis=1)
    pooled = np.sqrt((variance * kept).sum(axis=1) / count)
    factor = np.array([spread_factor(int(n) * freedom, runs) for n in range(cases + 1)])
    noise = np.where(kept, (factor[count] * pooled)[:, None], spread_factor(freedom, runs) * np.sqrt(variance))
    limit: Floats = np.maximum(floor, noise)
    return limit


def fails(baseline: Floats, now: Floats, floor: float) -> NDArray[np.bool_]:
    """Whether each case fails: baseline [trials, cases, runs], now [trials, cases, 1 + REPEATS], lower is better."""
    median: Floats = np.median(baseline, axis=2)
    beyond: NDArray[np.bool_] = now - median[..., None] > (limits(baseline, floor) * median)[..., None]
    failing: NDArray[np.bool_] = np.all(beyond, axis=2)
    return failing


def simulate(
    cases: int,
    runs: int,
    trials: int,
    *,
    sigma: float = 0.004,
    floor: float = 0.0,
    noise: Noise = gaussian,
    seed: int = 0,
) -> Outcome:
    """``trials`` devices of ``cases`` x ``runs`` with relative noise ``sigma``; the shift is max(8 σ, 2 x limit)."""
    rng = np.random.default_rng(seed)
    alarms = caught = 0
    chunk = max(1, 400_000 // (cases * runs))
    for start in range(0, trials, chunk):
        size = min(chunk, trials - start)
        baseline = 1 + sigma * noise(rng, (size, cases, runs))
        now = 1 + sigma * noise(rng, (size, cases, 1 + REPEATS))
        alarms += int(fails(baseline, now, floor).sum())
        shift = np.maximum(8 * sigma, 2 * limits(baseline, floor))
        caught += int(fails(baseline, now + shift[..., None], floor).sum())
    verdicts = cases * trials
    return Outcome(verdicts, alarms / verdicts, caught / verdicts)


def main() -> None:
    """Print both figures for each situation that docs/gate.md speaks of."""
    situations: list[tuple[str, int, int, float, Noise]] = [
        ("20 cases x 5 runs", 20, 5, 0.0, gaussian),
        ("3 cases x 5 runs", 3, 5, 0.0, gaussian),
        ("1 case x 5 runs", 1, 5, 0.0, gaussian),
        ("20 cases x 2 runs", 20, 2, 0.0, gaussian),
        ("20 cases x 5 runs, 2 % of the runs +5 σ", 20, 5, 0.0, heavy_tailed),
        ("20 cases x 5 runs, their σ 0.5 to 1.5", 20, 5, 0.0, uneven),
        ("1 case x 3 runs, no floor", 1, 3, 0.0, gaussian),
        ("1 case x 3 runs, floor 5 σ", 1, 3, 0.02, gaussian),
        ("1 case x 2 runs, no floor", 1, 2, 0.0, gaussian),
        ("1 case x 2 runs, floor 5 σ", 1, 2, 0.02, gaussian),
    ]
    print(f"{'baseline':42}{'verdicts':>12}{'false alarms':>16}{'caught':>12}")
    for label, cases, runs, floor, noise in situations:
        result = simulate(cases, runs, 4_000_000 // cases, floor=floor, noise=noise)
        alarms = f"{result.false_alarms * 20_000:.3f} / 20,000"
        print(f"{label:42}{result.verdicts:>12,}{alarms:>16}{result.caught:>12.4%}")


if __name__ == "__main__":
    main()
