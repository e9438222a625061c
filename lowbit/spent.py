"""What a run itself took: its wall time by purpose, which with lowbit's own adds up, and its host memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Spent:
    """Seconds by purpose. Whatever a run takes beyond them is lowbit's own.

    ``imports``: libraries that a case is the first to need (torchao, bitsandbytes, Dynamo, Inductor). ``load``: weights
    into host memory. ``quantize``: from there to the quantized model on the device, and the proof that it is one.
    ``compile``: the first calls of a compiled case until it only replays. ``warmup``: first calls that nothing is
    compiled in, kernels' own tuning among them, and the look for NaN before every case. ``measure``: timed rounds,
    their yardsticks, the energy window, the card's ceilings. ``quality``: reference logits and scoring. ``confirm``:
    fresh processes that measure a suspicion again.
    """

    imports: float = 0.0
    load: float = 0.0
    quantize: float = 0.0
    compile: float = 0.0
    warmup: float = 0.0
    measure: float = 0.0
    quality: float = 0.0
    confirm: float = 0.0

    def total(self) -> float:
        return float(sum(vars(self).values()))

    @contextmanager
    def on(self, purpose: str) -> Iterator[Callable[[], float]]:
        """Count what happens inside under ``purpose``; yields a reader of its seconds, to be called afterwards.

        Purposes nest: what an inner one counts, the outer one doesn't.
        """
        started, before = time.perf_counter(), self.total()
        elapsed = 0.0
        try:
            yield lambda: elapsed
        finally:
            elapsed = time.perf_counter() - started - (self.total() - before)
            setattr(self, purpose, getattr(self, purpose) + elapsed)


def host_peak_mib() -> float:
    """Peak resident host memory of this process in MiB (Linux: ru_maxrss is in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
