"""What voids a measurement and what does not."""

from __future__ import annotations

import os
from dataclasses import replace

import fake_pynvml
import pytest
from fake_pynvml import CARD

from lowbit.card import BUSY_PERCENT, FREE_CARD, MOVED_MIB, CardState, disturbed
from lowbit.nvml import UNEXPLAINED_MIB, Nvml, Process

CALM = CardState(sm_mhz=1980, mem_mhz=3201, temperature_c=45, power_w=480.0, thermal_violation_ns=5)
OTHER = Process(4711, 900.0)


def test_a_calm_card_is_not_disturbed():
    assert disturbed(CALM, replace(CALM, temperature_c=70, power_w=690.0, sm_mhz=1900)) is None


def test_nothing_is_known_without_nvml():
    assert CardState.read(None) == CardState()
    assert disturbed(CardState(), CardState()) is None


def test_a_process_that_comes():
    reason = disturbed(CALM, replace(CALM, others=(OTHER,)))
    assert reason == f"another process came to the card: pid 4711 (900 MiB) (expected none beside ours); {FREE_CARD}"
    desktop = replace(CALM, others=(Process(900, 80.0),))
    reason = disturbed(desktop, replace(CALM, others=(Process(900, 80.0), OTHER)))
    assert reason is not None
    assert "came to the card: pid 4711 (900 MiB) (expected none but pid 900 (80 MiB));" in reason


@pytest.mark.parametrize("mib", [900.0, 900 + MOVED_MIB, 900 - MOVED_MIB, None])
@pytest.mark.parametrize("busy", [None, 0, BUSY_PERCENT - 1])
def test_a_process_that_was_there_and_stays_idle_or_goes(mib, busy):
    there = replace(CALM, others=(OTHER,))
    assert disturbed(there, replace(CALM, others=(Process(4711, mib, busy),))) is None
    assert disturbed(there, CALM) is None


def test_a_process_that_was_there_and_takes_memory_is_at_work():
    """The two states of 22 November, when bf16 under reduce-overhead gave 89.5 tok/s instead of 180.3."""
    before = replace(CALM, others=(Process(900, 80.0), Process(2146, 1012.0)))
    after = replace(CALM, others=(Process(900, 110.0), Process(2146, 8884.0)))
    assert disturbed(before, after) == (
        "another process worked on the card: pid 2146 held 1,012 MiB before and 8,884 MiB after (expected a change of "
        "at most 128 MiB); measure when the card is free, or choose a free one with CUDA_VISIBLE_DEVICES"
    )
    assert "held 8,884 MiB before and 1,012 MiB after" in str(disturbed(after, before))


def test_a_process_that_runs_kernels_in_memory_it_held_before_is_at_work():
    """A server that took its KV cache at its start: it moves by nothing."""
    before = replace(CALM, others=(Process(2146, 70_000.0),))
    assert disturbed(before, replace(CALM, others=(Process(2146, 70_000.0, 47),))) == (
        f"another process worked on the card: pid 2146 ran kernels for 47 % of the time (expected less than 5 %); "
        f"{FREE_CARD}"
    )


def test_a_process_of_unknown_memory_shows_by_its_kernels_alone():
    before = replace(CALM, others=(Process(2146, None),))
    assert disturbed(before, replace(CALM, others=(Process(2146, 9000.0),))) is None
    assert "ran kernels for 5 %" in str(disturbed(before, replace(CALM, others=(Process(2146, None, 5),))))


def test_hidden_pids_give_a_remainder_in_which_our_own_libraries_move():
    before = replace(CALM, others=(Process(None, 3000.0),))
    assert disturbed(before, replace(CALM, others=(Process(None, 3000 + UNEXPLAINED_MIB),))) is None
    assert "a process hidden by the container held 3,000 MiB before and 11,000 MiB after (expected a change of at " in (
        str(disturbed(before, replace(CALM, others=(Process(None, 11_000.0),))))
    )


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


def test_a_server_at_work_is_seen_and_recorded_and_our_child_is_not(monkeypatch):
    server, child = 2**22 + 1, 2**22 + 2
    fake = fake_pynvml.install(monkeypatch, processes={os.getpid(): 500.0, server: 70_000.0, child: 900.0})
    with Nvml.open(CARD) as card:
        before = CardState.read(card, {child})
        fake.processes[child] = 20_000.0
        fake.samples = [(child, 2000, 90), (server, 2000, 47)]
        after = CardState.read(card, {child}, since_us=1000)
        fake.samples = [(child, 2000, 90)]
        idle = CardState.read(card, {child}, since_us=1000)
    assert after.to_dict()["others"] == [f"pid {server} (70,000 MiB, busy 47 %)"]
    assert "ran kernels for 47 % of the time" in str(disturbed(before, after))
    assert disturbed(before, idle) is None


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
