"""Energy: joules of the whole card over a window, by NVML's total-energy counter."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch

from lowbit.device import Device
from lowbit.measure import synchronize
from lowbit.nvml import Nvml, NvmlUnavailable


class Energy(NamedTuple):
    """Joules of the whole card over ``repetitions`` of a step, which took ``seconds``."""

    joules: float
    repetitions: int
    seconds: float


COUNTER_PATIENCE_S = 2.0
"""A counter that stands still so long while the card works is none."""


def measure(nvml: Nvml, device: Device, step: Callable[[], object], min_seconds: float = 1.0) -> Energy:
    """Run ``step`` over and over for ``min_seconds`` at least, between two moves of NVML's energy counter.

    The counter moves every 20 to 100 ms (100 ms on an H200), so a window cut anywhere is wrong by up to one such
    interval: 10 % of a second. Cut where the counter has just been seen to move, the error is at most
    min(interval, one step) / window, so make the step a few tokens long (10 to 50 ms), not a whole round.
    Reading the counter takes 4 ms on an H200; the card must not idle meanwhile, which would draw less and last
    longer: one step is always in flight, and between the two cuts nothing is read.
    Raises NvmlUnavailable if the card has no counter or it stands still.
    """
    line = _Pipeline(device, step)
    begin_j = _next_move(nvml, line, nvml.energy_j())
    began, first = perf_counter(), line.finished
    while perf_counter() - began < min_seconds:
        line.run()
    end_j = _next_move(nvml, line, nvml.energy_j())
    read = Energy(end_j - begin_j, line.finished - first, perf_counter() - began)
    synchronize(device)
    return read


class _Pipeline:
    """Runs steps with one in flight: ``run`` launches the next and waits for the one before. A CPU has no flight."""

    def __init__(self, device: Device, step: Callable[[], object]) -> None:
        self._device, self._step = device, step
        self._flying: Any = None
        self.finished = 0

    def run(self) -> None:
        self._step()
        if self._device.kind == "cpu":
            self.finished += 1
            return
        landed, self._flying = self._flying, torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._flying.record()
        if landed is not None:
            landed.synchronize()
            self.finished += 1


def _next_move(nvml: Nvml, line: _Pipeline, before: float) -> float:
    """Run steps until the counter shows another figure than ``before``; that figure."""
    began = perf_counter()
    while True:
        line.run()
        now = nvml.energy_j()
        if now != before:
            return now
        if perf_counter() - began > COUNTER_PATIENCE_S:
            raise NvmlUnavailable(f"the energy counter stood still for {COUNTER_PATIENCE_S:g} s of work")
