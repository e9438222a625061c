"""A stand-in for the package pynvml: one card whose memory, processes, energy and state a test sets."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from lowbit.device import Device

MIB = 1024 * 1024
UUID = "3e0f7c1a-0000-1111-2222-333344445555"

CARD = Device(
    kind="cuda",
    index=0,
    name="NVIDIA H200",
    slug="nvidia-h200",
    capability=(9, 0),
    total_mib=143_771.0,
    multiprocessors=132,
    driver="580.159.04",
    cuda="13.0",
    uuid=UUID,
    pci="0000:3b:00.0",
)


class NVMLError(Exception):
    """As pynvml's: every call may raise it."""


@dataclass
class FakePynvml:
    """``processes`` maps a pid to MiB, or to None where NVML does not tell; ``samples`` are (pid, µs, percent of the
    SMs' time). ``refused`` names calls that raise."""

    handles: tuple[str, ...] = (f"GPU-{UUID}",)
    used_mib: float = 600.0
    processes: dict[int, float | None] = field(default_factory=dict)
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    millijoules: int = 5_000_000
    reasons: int = 0
    sm_mhz: int = 1980
    temperature: int = 45
    violation_ns: int = 0
    refused: set[str] = field(default_factory=set)
    starts: int = 0
    stops: int = 0

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    NVML_PERF_POLICY_THERMAL = 1

    def _check(self, call):
        if call in self.refused:
            raise NVMLError(f"Not Supported: {call}")

    def nvmlInit(self):
        self._check("nvmlInit")
        self.starts += 1

    def nvmlShutdown(self):
        self.stops += 1

    def _handle(self, key):
        if key not in self.handles:
            raise NVMLError(f"Not Found: {key}")
        return key

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._handle(uuid)

    def nvmlDeviceGetHandleByPciBusId(self, pci):
        return self._handle(pci)

    def nvmlSystemGetDriverVersion(self):
        return "580.159.04"

    def nvmlDeviceGetMemoryInfo(self, handle):
        self._check("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(used=self.used_mib * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        self._check("nvmlDeviceGetComputeRunningProcesses")
        sizes = {pid: None if mib is None else int(mib * MIB) for pid, mib in self.processes.items()}
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in sizes.items()]

    def nvmlDeviceGetProcessUtilization(self, handle, timeStamp):
        """As the real one: an error where there is nothing newer."""
        self._check("nvmlDeviceGetProcessUtilization")
        if not any(when > timeStamp for _, when, _ in self.samples):
            raise NVMLError("Not Found: nvmlDeviceGetProcessUtilization")
        return [SimpleNamespace(pid=pid, timeStamp=when, smUtil=percent) for pid, when, percent in self.samples]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self._check("nvmlDeviceGetTotalEnergyConsumption")
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle):
        self._check("nvmlDeviceGetPowerUsage")
        return 481_500

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        self._check("nvmlDeviceGetCurrentClocksEventReasons")
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        self._check("nvmlDeviceGetCurrentClocksThrottleReasons")
        return self.reasons

    def nvmlDeviceGetViolationStatus(self, handle, policy):
        self._check("nvmlDeviceGetViolationStatus")
        assert policy == self.NVML_PERF_POLICY_THERMAL
        return SimpleNamespace(referenceTime=1, violationTime=self.violation_ns)

    def nvmlDeviceGetClockInfo(self, handle, clock):
        self._check("nvmlDeviceGetClockInfo")
        return {self.NVML_CLOCK_SM: self.sm_mhz, self.NVML_CLOCK_MEM: 3201}[clock]

    def nvmlDeviceGetTemperature(self, handle, sensor):
        self._check("nvmlDeviceGetTemperature")
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self.temperature


def install(monkeypatch: pytest.MonkeyPatch, **fields) -> FakePynvml:
    """Put a fake where ``import pynvml`` finds it."""
    fake = FakePynvml(**fields)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake
