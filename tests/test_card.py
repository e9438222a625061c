"""What voids a measurement and what does not."""

from __future__ import annotations

import os
from dataclasses import replace

import fake_pynvml
import pytest
from fake_pynvml import CARD

from lowbit.card import CardState, disturbed
from lowbit.nvml import Nvml, Process

CALM = CardState(sm_mhz=1980, mem_mhz=3201, temperature_c=45, power_w=480.0, thermal_violation_ns=5)
OTHER = Process(4711, 900.0)


def test_a_calm_card_is_not_disturbed():
    assert disturbed(CALM, replace(CALM, temperature_c=70, power_w=690.0, sm_mhz=1900)) is None


def test_nothing_is_known_without_nvml():
    assert CardState.read(None) == CardState()
    assert disturbed(CardState(), CardState()) is None


def test_a_process_that_comes():
    reason = disturbed(CALM, replace(CALM, others=(OTHER,)))
    assert reason == "another process came to the card: pid 4711 (900 MiB)"


def test_a_process_that_was_there_and_stays_or_goes():
    busy = replace(CALM, others=(OTHER,))
    assert disturbed(busy, replace(CALM, others=(Process(4711, 950.0),))) is None
    assert disturbed(busy, CALM) is None


@pytest.mark.parametrize(
    "reason", ["hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"]
)
@pytest.mark.parametrize("end", ["before", "after"])
def test_throttling_at_either_end(reason, end):
    throttled = replace(CALM, throttle=("sw_power_cap", reason))
    before, after = (throttled, CALM) if end == "before" else (CALM, throttled)
    assert disturbed(before, after) == f"the card was throttled: {reason} (at 45 °C)"


@pytest.mark.parametrize("reason", ["gpu_idle", "sw_power_cap", "applications_clocks_setting", "sync_boost"])
def test_idling_and_the_power_cap_are_no_disturbance(reason):
    assert disturbed(CALM, replace(CALM, throttle=(reason,))) is None


def test_thermal_throttling_between_the_two_looks():
    reason = disturbed(CALM, replace(CALM, thermal_violation_ns=5 + 12_000_000))
    assert reason == "thermal throttling for 12.0 ms in between (now 45 °C)"


def test_the_clock_falls():
    slow = replace(CALM, sm_mhz=1700)
    assert disturbed(CALM, slow) == "the SM clock fell from 1980 to 1700 MHz (more than 10 %)"
    assert disturbed(CALM, slow, clock_drop=0.2) is None
    assert disturbed(slow, CALM) is None  # it rose: the card was idle before


@pytest.mark.parametrize("reason", ["gpu_idle", "sw_power_cap"])
def test_a_fall_that_idling_or_the_power_cap_explains(reason):
    assert disturbed(CALM, replace(CALM, sm_mhz=345, throttle=(reason,))) is None


def test_read_and_to_dict(monkeypatch):
    fake = fake_pynvml.install(monkeypatch, reasons=0x4, processes={os.getpid(): 500.0, 2**22 + 1: 900.0})
    with Nvml.open(CARD) as card:
        state = CardState.read(card)
        own = CardState.read(card, own_pids={2**22 + 1})
    assert state.others == (Process(2**22 + 1, 900.0),)
    assert own.others == ()
    assert state.to_dict() == {
        "others": [f"pid {2**22 + 1} (900 MiB)"],
        "sm_mhz": fake.sm_mhz,
        "mem_mhz": 3201,
        "temperature_c": 45,
        "power_w": 481.5,
        "throttle": ["sw_power_cap"],
        "thermal_violation_ns": 0,
    }
