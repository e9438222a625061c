"""NVML against a fake pynvml: finding the card, own and others' memory, hidden pids, and every refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import fake_pynvml
import pytest
from fake_pynvml import CARD, UUID

from lowbit import nvml
from lowbit.device import Device
from lowbit.nvml import Nvml, NvmlUnavailable, Process

ME = os.getpid()
STRANGER = 2**22 + 17  # beyond Linux's largest pid: nobody's parent, nobody's child


@pytest.fixture
def fake(monkeypatch):
    return fake_pynvml.install(monkeypatch)


def test_the_real_package_has_every_call_and_constant_of_the_fake():
    import pynvml

    names = [name for name in dir(fake_pynvml.FakePynvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) > 15
    assert [name for name in names if not hasattr(pynvml, name)] == []
    assert pynvml.NVML_CLOCK_SM == fake_pynvml.FakePynvml.NVML_CLOCK_SM
    assert pynvml.NVML_PERF_POLICY_THERMAL == fake_pynvml.FakePynvml.NVML_PERF_POLICY_THERMAL


def test_throttle_names_stand_at_the_real_packages_bits():
    import pynvml

    bits = {name: bit for bit, name in nvml.THROTTLE_REASONS.items()}
    assert bits["gpu_idle"] == pynvml.nvmlClocksEventReasonGpuIdle
    assert bits["sw_power_cap"] == pynvml.nvmlClocksEventReasonSwPowerCap
    assert bits["hw_slowdown"] == pynvml.nvmlClocksEventReasonHwSlowdown
    assert bits["sw_thermal_slowdown"] == pynvml.nvmlClocksEventReasonSwThermalSlowdown
    assert bits["hw_thermal_slowdown"] == pynvml.nvmlClocksEventReasonHwThermalSlowdown
    assert bits["hw_power_brake_slowdown"] == pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
    assert sum(nvml.THROTTLE_REASONS) == pynvml.nvmlClocksEventReasonAll


# -- opening ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [f"GPU-{UUID}", f"MIG-{UUID}", "0000:3b:00.0"])
def test_the_card_is_found_by_uuid_as_a_mig_slice_or_by_bus(fake, key):
    fake.handles = (key,)
    with Nvml.open(CARD) as card:
        assert card.used_mib() == 600
    assert (fake.starts, fake.stops) == (1, 1)


def test_a_card_that_nvml_does_not_list(fake):
    fake.handles = ("GPU-another",)
    with pytest.raises(NvmlUnavailable, match=rf"no card like NVIDIA H200 \(GPU-{UUID}, MIG-{UUID}, 0000:3b:00.0\)"):
        Nvml.open(CARD)
    assert fake.stops == 1


def test_a_card_with_nothing_to_find_it_by(fake):
    with pytest.raises(NvmlUnavailable, match="nothing to find it by"):
        Nvml.open(replace(CARD, uuid=None, pci=None))


def test_no_driver(fake):
    fake.refused = {"nvmlInit"}
    with pytest.raises(NvmlUnavailable, match="NVML does not start: Not Supported"):
        Nvml.open(CARD)
    assert fake.stops == 0


def test_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlUnavailable, match="nvidia-ml-py is not installed"):
        Nvml.open(CARD)


def test_a_cpu_is_no_card():
    with pytest.raises(NvmlUnavailable, match="AMD EPYC is no NVIDIA GPU"):
        Nvml.open(Device("cpu", 0, "AMD EPYC", "cpu-amd-epyc-2c", None, None, 2, None, None))


def test_a_card_that_does_not_tell_its_memory(fake):
    fake.refused = {"nvmlDeviceGetMemoryInfo"}
    with pytest.raises(NvmlUnavailable, match="does not tell the memory of NVIDIA H200"):
        Nvml.open(CARD)
    assert fake.stops == 1


def test_closing_twice_stops_once(fake):
    card = Nvml.open(CARD)
    card.close()
    card.close()
    assert fake.stops == 1


# -- memory of this process ---------------------------------------------------------------------------------------


def test_memory_of_this_pid(fake):
    card = Nvml.open(CARD)
    fake.processes, fake.used_mib = {ME: 16_500.0, STRANGER: 900.0}, 18_000
    assert card.process_mib() == 16_500
    assert card.method == "process"


@pytest.mark.parametrize("processes", [{}, {STRANGER: 16_500.0}, {ME: None}], ids=["none", "other namespace", "wddm"])
def test_memory_by_the_cards_growth_where_the_pid_is_hidden(fake, processes):
    card = Nvml.open(CARD)
    fake.processes, fake.used_mib = processes, 600 + 16_500
    assert card.process_mib() == 16_500
    assert card.method == "device delta"


def test_memory_by_growth_where_nvml_lists_no_processes_at_all(fake):
    card = Nvml.open(CARD)
    fake.refused, fake.used_mib = {"nvmlDeviceGetComputeRunningProcesses"}, 700
    assert card.process_mib() == 100
    assert card.method == "device delta"


# -- other processes ----------------------------------------------------------------------------------------------


def test_a_stranger_is_another_process(fake):
    card = Nvml.open(CARD)
    fake.processes = {ME: 500.0, STRANGER: 900.0}
    assert card.other_processes() == [Process(STRANGER, 900.0)]
    assert str(card.other_processes()[0]) == f"pid {STRANGER} (900 MiB)"


def test_own_pids_our_ancestors_and_our_children_are_ours(fake):
    card = Nvml.open(CARD)
    inner = "import os; print(os.getpid(), flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        assert grandchild != child.pid
        fake.processes = {ME: 500.0, os.getppid(): 400.0, child.pid: 300.0, grandchild: 200.0, STRANGER: 100.0}
        assert card.other_processes() == [Process(STRANGER, 100.0)]
        assert card.other_processes({STRANGER}) == []
    finally:
        child.communicate("\n")


def test_how_busy_others_were_since(fake):
    card = Nvml.open(CARD)
    fake.processes = {ME: 500.0, STRANGER: 900.0, STRANGER + 1: 100.0}
    fake.samples = [(ME, 2000, 99), (STRANGER, 2000, 41), (STRANGER, 2500, 12), (STRANGER + 1, 1000, 30)]
    assert card.other_processes(since_us=1000) == [Process(STRANGER, 900.0, 41), Process(STRANGER + 1, 100.0)]
    assert [process.busy for process in card.other_processes()] == [None, None]


def test_samples_that_the_driver_never_wrote_are_left_out(fake):
    card = Nvml.open(CARD)
    fake.processes = {ME: 500.0, STRANGER: 900.0}
    fake.samples = [(STRANGER, 2000, 4_294_967_295), (STRANGER, 0, 77), (STRANGER, 2000, 3)]
    assert [process.busy for process in card.other_processes(since_us=1000)] == [3]


@pytest.mark.parametrize("refused", [set(), {"nvmlDeviceGetProcessUtilization"}], ids=["no samples", "a MIG slice"])
def test_where_nvml_does_not_say_who_was_busy(fake, refused):
    card = Nvml.open(CARD)
    fake.processes, fake.refused = {ME: 500.0, STRANGER: 900.0}, refused
    assert card.other_processes(since_us=1000) == [Process(STRANGER, 900.0)]


def test_hidden_pids_are_not_asked_who_was_busy(fake):
    """A number there may be another process's here."""
    card = Nvml.open(CARD)
    fake.processes, fake.used_mib = {STRANGER: 17_000.0, STRANGER + 1: 9000.0}, 600 + 26_000
    fake.samples = [(STRANGER, 2000, 90)]
    assert card.other_processes(explained_mib=16_100, since_us=1000) == [Process(None, 9900.0)]


def test_hidden_pids_raise_no_false_alarm(fake):
    card = Nvml.open(CARD)
    # our own 16 GiB under the host's pid, and a context's worth that torch does not know of
    fake.processes, fake.used_mib = {STRANGER: 17_000.0}, 600 + 17_000
    assert card.other_processes(explained_mib=16_100) == []


def test_hidden_pids_show_another_process_by_memory_that_nobody_explains(fake):
    card = Nvml.open(CARD)
    fake.processes, fake.used_mib = {STRANGER: 17_000.0, STRANGER + 1: 9000.0}, 600 + 26_000
    (other,) = card.other_processes(explained_mib=16_100)
    assert other == Process(None, 9900.0)
    assert str(other) == "a process hidden by the container (9,900 MiB)"


def test_hidden_pids_and_nothing_to_explain_with_say_nothing(fake):
    card = Nvml.open(CARD)
    fake.processes, fake.used_mib = {STRANGER: 90_000.0}, 90_600
    assert card.other_processes() == []


def test_parent_of_reads_proc(tmp_path):
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "status").write_text("Name:\tpython3\nPid:\t42\nPPid:\t7\n")
    assert nvml.parent_of(42, tmp_path) == 7
    assert nvml.parent_of(43, tmp_path) == 0


# -- energy and state ---------------------------------------------------------------------------------------------


def test_energy_in_joules(fake):
    assert Nvml.open(CARD).energy_j() == 5000


def test_no_energy_counter(fake):
    card = Nvml.open(CARD)
    fake.refused = {"nvmlDeviceGetTotalEnergyConsumption"}
    with pytest.raises(NvmlUnavailable, match="no energy counter: Not Supported"):
        card.energy_j()


def test_state(fake):
    fake.reasons, fake.violation_ns = 0x4 | 0x40, 7
    assert Nvml.open(CARD).state() == {
        "sm_mhz": 1980,
        "mem_mhz": 3201,
        "temperature_c": 45,
        "power_w": 481.5,
        "throttle": ["sw_power_cap", "hw_thermal_slowdown"],
        "thermal_violation_ns": 7,
    }


def test_state_of_a_card_that_says_nothing(fake):
    calls = ("ClockInfo", "Temperature", "PowerUsage", "ViolationStatus", "CurrentClocksEventReasons")
    fake.refused = {f"nvmlDeviceGet{call}" for call in (*calls, "CurrentClocksThrottleReasons")}
    state = Nvml.open(CARD).state()
    assert state.pop("throttle") == []
    assert set(state.values()) == {None}


def test_an_older_driver_knows_the_reasons_by_another_name(fake):
    fake.reasons, fake.refused = 0x8, {"nvmlDeviceGetCurrentClocksEventReasons"}
    assert Nvml.open(CARD).state()["throttle"] == ["hw_slowdown"]


def test_an_unknown_reason_is_shown_not_dropped(fake):
    fake.reasons = 0x1 | 0x8000
    assert Nvml.open(CARD).state()["throttle"] == ["gpu_idle", "bits_0x8000"]
