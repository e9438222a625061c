"""Joules between two moves of a counter, on a made-up card of constant power."""

from __future__ import annotations

import fake_cuda
import fake_pynvml
import numpy as np
import pytest
from fake_pynvml import CARD

from lowbit import energy
from lowbit.device import Device
from lowbit.nvml import Nvml, NvmlUnavailable

CPU = Device("cpu", 0, "AMD EPYC", "cpu-amd-epyc-2c", None, 24_000.0, 2, None, None)


@pytest.fixture
def cuda(monkeypatch):
    return fake_cuda.install(monkeypatch)


class Meter:
    """A card of constant power whose counter moves every ``interval`` seconds; ``step`` lets ``step_s`` pass."""

    def __init__(self, monkeypatch, step_s, interval=0.1, watts=500.0, offset=0.037):
        self.now, self.step_s, self.interval, self.watts = offset, step_s, interval, watts
        self.steps, self.reads = 0, 0
        monkeypatch.setattr(energy, "perf_counter", lambda: self.now)

    def step(self):
        self.now += self.step_s
        self.steps += 1

    def energy_j(self):
        self.reads += 1
        return self.watts * self.interval * (self.now // self.interval)


@pytest.mark.parametrize("step_s", [0.001, 0.0043, 0.03, 0.09])
def test_energy_between_two_moves_of_the_counter(monkeypatch, step_s):
    for offset in np.linspace(0, 0.1, 7):
        meter = Meter(monkeypatch, step_s, offset=float(offset))
        read = energy.measure(meter, CPU, meter.step, min_seconds=1.0)
        assert read.seconds >= 1.0
        assert read.seconds == pytest.approx(read.repetitions * step_s)
        assert read.joules == pytest.approx(meter.watts * read.seconds, rel=step_s / read.seconds + 1e-9)


def test_energy_of_steps_longer_than_the_interval_is_wrong_by_an_interval_at_most(monkeypatch):
    for step_s in (0.13, 0.5, 0.77):
        meter = Meter(monkeypatch, step_s)
        read = energy.measure(meter, CPU, meter.step, min_seconds=1.0)
        assert abs(read.joules - meter.watts * read.seconds) <= meter.watts * meter.interval * (1 + 1e-9)


def test_a_counter_that_never_moves(monkeypatch):
    meter = Meter(monkeypatch, 0.1, watts=0.0)
    with pytest.raises(NvmlUnavailable, match="stood still for 2 s"):
        energy.measure(meter, CPU, meter.step)


def test_a_counter_that_stops(monkeypatch):
    meter = Meter(monkeypatch, 0.05)
    moving = meter.energy_j
    monkeypatch.setattr(meter, "energy_j", lambda: min(moving(), 100.0))
    with pytest.raises(NvmlUnavailable, match="stood still for 2 s"):
        energy.measure(meter, CPU, meter.step)


def test_a_card_without_a_counter_gives_the_reason(monkeypatch, cuda):
    fake_pynvml.install(monkeypatch, refused={"nvmlDeviceGetTotalEnergyConsumption"})
    with Nvml.open(CARD) as card, pytest.raises(NvmlUnavailable, match="no energy counter: Not Supported"):
        energy.measure(card, CARD, lambda: None)


def test_the_counter_is_read_at_the_cuts_only(monkeypatch):
    meter = Meter(monkeypatch, 0.001)
    read = energy.measure(meter, CPU, meter.step)
    assert read.repetitions >= 1000
    assert meter.reads < 250  # two waits for a move, 100 ms of 1 ms steps each


def test_one_step_is_in_flight_while_the_counter_is_read(monkeypatch, cuda):
    meter = Meter(monkeypatch, 0.03)
    read = energy.measure(meter, CARD, meter.step)
    waits = [call for call in cuda.calls if call == "event.synchronize"]
    assert len(waits) == meter.steps - 1
    assert cuda.calls[-1] == "synchronize"
    assert cuda.calls.count("synchronize") == 1
    assert read.joules == pytest.approx(meter.watts * read.seconds, rel=0.03 / read.seconds + 1e-9)
    assert read.repetitions * meter.step_s == pytest.approx(read.seconds)
