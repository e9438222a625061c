"""Simulates nightly series: how often a change is found, and how often one is named that is none.

``python -m lowbit.changepoint_simulation`` prints the figures of docs/trend.md. Each try is a history of ``NIGHTS``
nights at level 100 with normal noise; what happens in it ends on its last night, which is when the user looks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lowbit.changepoint import MIN_NIGHTS, Change, find_changes

Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], Floats]

NIGHTS = 200
TOLERANCE = 5  # nights that the named first night may lie from the true one


def gaussian(rng: np.random.Generator, n: int) -> Floats:
    """[n] standard normal."""
    return rng.standard_normal(n)


def heavy_tailed(rng: np.random.Generator, n: int) -> Floats:
    """[n] standard normal of which 2 % of the nights are 5 σ lower: what a busy host does to a run."""
    return rng.standard_normal(n) - 5.0 * (rng.random(n) < 0.02)


def autocorrelated(rng: np.random.Generator, n: int) -> Floats:
    """[n] of variance 1 in which a night inherits 0.3 of the night before: a room that stays warm."""
    values = rng.standard_normal(n)
    for i in range(1, n):
        values[i] = 0.3 * values[i - 1] + (1 - 0.3**2) ** 0.5 * values[i]
    return values


def history(rng: np.random.Generator, sigma: float, noise: Noise = gaussian, missing: float = 0.0) -> Floats:
    """[NIGHTS] unchanged values with relative noise ``sigma``; a share ``missing`` of the nights is NaN."""
    values: Floats = 100 * (1 + sigma * noise(rng, NIGHTS))
    values[rng.random(NIGHTS) < missing] = np.nan
    return values


def with_step(values: Floats, nights: int, size: float = -0.02) -> Floats:
    """The last ``nights`` moved by ``size``."""
    changed = values.copy()
    changed[len(values) - nights :] *= 1 + size
    return changed


def with_drift(values: Floats, nights: int, slope: float = -0.002) -> Floats:
    """The last ``nights`` moving by ``slope`` more each."""
    changed = values.copy()
    changed[len(values) - nights :] *= 1 + slope * np.arange(1, nights + 1)
    return changed


def with_outlier(values: Floats, index: int, size: float = -0.10) -> Floats:
    """One night moved by ``size``."""
    changed = values.copy()
    changed[index] *= 1 + size
    return changed


def finds(changes: list[Change], index: int, tolerance: int = TOLERANCE) -> bool:
    """True when a change for the worse is named whose first night is ``index``, give or take ``tolerance``."""
    return any(change.size < 0 and abs(change.index - index) <= tolerance for change in changes)


def share(tries: int, seed: int, found: Callable[[np.random.Generator], bool]) -> float:
    """Of ``tries`` histories, the share in which ``found``."""
    rng = np.random.default_rng(seed)
    return sum(found(rng) for _ in range(tries)) / tries


def false_changes(tries: int, sigma: float, noise: Noise = gaussian, missing: float = 0.0, seed: int = 3) -> float:
    """Changes named per unchanged history, looked at once."""
    rng = np.random.default_rng(seed)
    return statistics.mean(len(find_changes(history(rng, sigma, noise, missing))) for _ in range(tries))


def false_histories(tries: int, sigma: float, noise: Noise = gaussian, seed: int = 4) -> float:
    """The share of unchanged histories in which any of the looks, one after every night, names a change."""
    rng = np.random.default_rng(seed)

    def cries_wolf(values: Floats) -> bool:
        return any(find_changes(values[:night]) for night in range(MIN_NIGHTS, NIGHTS + 1))

    return sum(cries_wolf(history(rng, sigma, noise)) for _ in range(tries)) / tries


def detection(tries: int, sigma: float, missing: float = 0.0) -> list[tuple[str, float]]:
    """(what happened, share of the tries in which it was named) for each situation at this noise."""

    def noticed(make: Callable[[Floats, int], Floats], nights: int) -> float:
        def found(rng: np.random.Generator) -> bool:
            return finds(find_changes(make(history(rng, sigma, missing=missing), nights)), NIGHTS - nights)

        return share(tries, nights, found)

    def fooled(index: int) -> float:
        return share(
            tries, index, lambda rng: bool(find_changes(with_outlier(history(rng, sigma, missing=missing), index)))
        )

    return [
        *((f"step of -2 %, after {n} nights", noticed(with_step, n)) for n in (3, 5, 10)),
        *((f"drift of -0.2 % a night, after {n} nights", noticed(with_drift, n)) for n in (5, 10, 15, 20)),
        ("outlier of -10 %, middle night: named", fooled(NIGHTS // 2)),
        ("outlier of -10 %, last night: named", fooled(NIGHTS - 1)),
    ]


def seconds(series: int = 500) -> float:
    """CPU seconds for that many unchanged histories."""
    rng = np.random.default_rng(5)
    values = [history(rng, 0.004) for _ in range(series)]
    started = time.process_time()
    for one in values:
        find_changes(one)
    return time.process_time() - started


def main() -> None:
    """Print every figure of docs/trend.md."""
    parser = argparse.ArgumentParser(prog="python -m lowbit.changepoint_simulation", description=main.__doc__)
    parser.add_argument("--tries", type=int, default=1000, help="histories per line (default 1000)")
    tries: int = parser.parse_args().tries
    sigmas = (0.003, 0.004, 0.01)
    columns = [*(detection(tries, sigma) for sigma in sigmas), detection(tries, 0.004, missing=0.2)]
    print(f"{'noise, night to night':42}{'0.3 %':>8}{'0.4 %':>8}{'1 %':>8}{'0.4 %, a fifth missing':>24}")
    for rows in zip(*columns, strict=True):
        print(f"{rows[0][0]:42}" + "".join(f"{row[1]:>{w}.1%}" for row, w in zip(rows, (8, 8, 8, 24), strict=True)))
    print(f"\n{'unchanged histories, noise 0.4 %':42}{'false changes, one look':>26}{'looked at every night':>24}")
    for label, noise in (
        ("normal", gaussian),
        ("normal, 2 % of the nights 5 σ lower", heavy_tailed),
        ("each night inherits 0.3 of the last", autocorrelated),
    ):
        once, every = false_changes(tries, 0.004, noise), false_histories(max(tries // 5, 20), 0.004, noise)
        print(f"{label:42}{20 * once:>17.2f} in 20{20 * every:>15.2f} in 20")
    print(f"\n500 series of {NIGHTS} nights: {seconds():.2f} s of one core")


if __name__ == "__main__":
    main()
