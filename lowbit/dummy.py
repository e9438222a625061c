"""Weights of the true shape without a download: N(0, 0.02), the same bits in every process, platform and version.

No library's random stream is used, since those may change with a release. Value ``p`` of an endless sequence is lane
``p % 4`` of splitmix64(p // 4) (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014),
a 16-bit number that a table turns into that quantile of the normal distribution, rounded to bf16. A tensor is the
stretch of that sequence, taken modulo ``PERIOD``, that starts at a hash of its name.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

STANDARD_DEVIATION = 0.02
"""``initializer_range`` of every Llama config."""

SEED = 0x10B1_7000

PERIOD = 2**26 + 15
"""Values before the sequence starts again: prime, so the rows of a tensor longer than this never line up with
themselves, and longer than the largest matrix of a Llama-3.1-8B layer (gate_proj, 58.7 million)."""

CHUNK = 2**19
"""Values made at a time: every intermediate array stays in the cache."""

ONE, ZERO = 0x3F80, 0x0000  # bf16

Bits = NDArray[np.uint16]


@lru_cache(maxsize=1)
def _quantiles() -> Bits:
    """[65536] bf16 bits: the middle of each of 65,536 equally likely slices of N(0, 0.02), symmetric to the bit."""
    normal = NormalDist(0.0, STANDARD_DEVIATION)
    lower = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(32768)], dtype=np.float32)
    single = np.concatenate([lower, -lower[::-1]]).view(np.uint32)
    nearest_even = single + np.uint32(0x7FFF) + ((single >> np.uint32(16)) & np.uint32(1))
    return (nearest_even >> np.uint32(16)).astype(np.uint16)


def _splitmix64(index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (index + np.uint64(SEED)) * np.uint64(0x9E3779B97F4A7C15)  # wraps: arithmetic modulo 2^64 is meant
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _make(out: Bits, start: int) -> None:
    """Write values start .. start + len(out) of the sequence, bf16 bits."""
    for low in range(0, len(out), CHUNK):
        piece = out[low : low + CHUNK]
        first, lane = divmod(start + low, 4)
        index = np.arange(first, first + -(-(lane + len(piece)) // 4), dtype=np.uint64)
        lanes = _splitmix64(index).astype("<u8").view("<u2")[lane : lane + len(piece)]
        # "clip" never clips a 16-bit index; it only spares the copy that the default mode makes of ``out``
        np.take(_quantiles(), lanes, out=piece, mode="clip")


def offset(name: str) -> int:
    """Where in the sequence the tensor of this name starts."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % PERIOD


class Source:
    """Fills tensors by name. With ``total`` values beyond one period, makes that period once and copies from it."""

    def __init__(self, total: int, workers: Executor) -> None:
        _quantiles()
        self._period: Bits | None = None
        if total > PERIOD:
            self._period = np.empty(PERIOD, dtype=np.uint16)
            step = 8 * CHUNK
            pieces = [self._period[low : low + step] for low in range(0, PERIOD, step)]
            list(workers.map(_make, pieces, range(0, PERIOD, step)))

    def fill(self, out: Bits, name: str, start: int = 0) -> None:
        """Write values start .. start + len(out) of the tensor ``name`` (flat, bf16 bits) into ``out``.

        Norm weights are ones and biases zeros, as in a model that was just initialised.
        """
        if name.endswith("norm.weight") or name.endswith(".bias"):
            out[:] = ZERO if name.endswith(".bias") else ONE
            return
        position, done = (offset(name) + start) % PERIOD, 0
        while done < len(out):
            piece = out[done : done + PERIOD - position]
            if self._period is None:
                _make(piece, position)
            else:
                np.copyto(piece, self._period[position : position + len(piece)])
            position, done = 0, done + len(piece)
