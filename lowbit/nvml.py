"""NVIDIA's management library, for one card: memory of this process, other processes, energy, clocks, throttling."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypedDict

from lowbit.errors import LowbitError

MIB = 1024 * 1024

THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h, nvmlClocksEventReasons)."""

UNEXPLAINED_MIB = 2048.0
"""Where pids are hidden: memory beyond this, that neither torch nor a CUDA context explains, is another process's.

A context with its libraries takes 0.4 to 1 GiB on an H200; a process that computes on the card rarely takes less.
"""


class NvmlUnavailable(LowbitError):
    """NVML can't tell this here. Its text is the reason, to stand beside the missing figure."""


class Card(Protocol):
    """What NVML needs of a ``device.Device`` to find the same card."""

    @property
    def kind(self) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def uuid(self) -> str | None: ...
    @property
    def pci(self) -> str | None: ...


class State(TypedDict):
    """The card at one moment; None where it does not say (a MIG slice says little)."""

    sm_mhz: int | None
    mem_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttle: list[str]
    thermal_violation_ns: int | None


class Process(NamedTuple):
    """A compute process on the card that is none of ours. ``pid`` is None where a container hides it.

    ``busy`` is the share of time in percent in which kernels of it ran, where that was asked for and NVML says so.
    """

    pid: int | None
    mib: float | None
    busy: int | None = None

    @property
    def name(self) -> str:
        return "a process hidden by the container" if self.pid is None else f"pid {self.pid}"

    def __str__(self) -> str:
        known = [] if self.mib is None else [f"{self.mib:,.0f} MiB"]
        known += [] if self.busy is None else [f"busy {self.busy} %"]
        return f"{self.name} ({', '.join(known)})" if known else self.name


class Nvml:
    """One card, open until ``close`` (or the end of ``with``).

    Open it before the first use of CUDA: where a container hides pids, memory is the growth of the card's since then.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle
        self._used_at_open_mib = self.used_mib()
        self.method = "not asked yet"

    @classmethod
    def open(cls, card: Card) -> Nvml:
        """The card by its UUID, else by its PCI bus id: NVML's own index ignores CUDA_VISIBLE_DEVICES.

        Raises NvmlUnavailable with the reason: no GPU, no package, no driver, no such card.
        """
        if card.kind != "cuda":
            raise NvmlUnavailable(f"{card.name} is no NVIDIA GPU")
        try:
            import pynvml
        except ImportError:
            raise NvmlUnavailable("the package nvidia-ml-py is not installed") from None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlUnavailable(f"NVML does not start: {error}") from None
        try:
            return cls(pynvml, _find(pynvml, card))
        except BaseException as error:
            pynvml.nvmlShutdown()
            if isinstance(error, pynvml.NVMLError):
                raise NvmlUnavailable(f"NVML does not tell the memory of {card.name}: {error}") from None
            raise

    def close(self) -> None:
        """Give NVML back. Safe to call twice."""
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library = None

    def __enter__(self) -> Nvml:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def used_mib(self) -> float:
        """Memory in use on the whole card, everybody's, in MiB."""
        return float(self._library.nvmlDeviceGetMemoryInfo(self._handle).used) / MIB

    def process_mib(self) -> float:
        """Memory of this process on the card in MiB, CUDA context and libraries included.

        By pid where NVML lists this process; ``method`` then says ``process``. Where it does not (a container with
        its own pid namespace, Windows' WDDM) the card's memory in use less that at ``open``: ``device delta``. Then
        whatever another process takes meanwhile counts as ours. Before the first use of CUDA no process is listed,
        so the delta is given, which is then about 0.
        """
        own = [process.mib for process in self._listed() if process.pid == os.getpid()]
        if own and own[0] is not None:
            self.method = "process"
            return own[0]
        self.method = "device delta"
        return self.used_mib() - self._used_at_open_mib

    def other_processes(
        self, own_pids: Iterable[int] = (), explained_mib: float | None = None, since_us: int | None = None
    ) -> list[Process]:
        """Compute processes on the card that are none of ours, in order of pid.

        Ours are this process, ``own_pids``, our descendants (a confirming child) and our ancestors (the parent of a
        confirming child, an xdist controller). Graphics-only clients (a desktop) do not count. With ``since_us``
        (microseconds of the Unix epoch) each says how busy it was from then on.

        Where this process is not listed although the card is in use, the pids are another namespace's: 4711 there is
        not 4711 here, and every entry might be ours. Then only memory can tell: the card's growth since ``open`` less
        ``explained_mib`` (what this process knows it took: torch's reserved bytes) beyond ``UNEXPLAINED_MIB`` is one
        process without a pid. A process that was there before ``open`` and does not grow goes unseen, and without
        ``explained_mib`` there is none: better a miss than every case void.
        """
        listed = self._listed()
        if any(process.pid == os.getpid() for process in listed):
            family = _family(own_pids)
            others = sorted(process for process in listed if process.pid not in family and not _descends(process.pid))
            busy = self._busy(since_us) if others and since_us is not None else {}
            return [process._replace(busy=busy.get(process.pid)) for process in others]
        if explained_mib is None:
            return []
        unexplained = self.used_mib() - self._used_at_open_mib - explained_mib
        return [Process(None, unexplained)] if unexplained > UNEXPLAINED_MIB else []

    def energy_j(self) -> float:
        """Joules of the whole card since its driver was loaded. Raises NvmlUnavailable where it has no counter.

        The counter moves in jumps, every 20 to 100 ms by card and driver: see lowbit/energy.py.
        """
        try:
            return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._library.NVMLError as error:
            raise NvmlUnavailable(f"no energy counter: {error}") from None

    def state(self) -> State:
        """Clocks, temperature, power and what holds the clocks back, right now."""
        library = self._library
        power_mw = self._ask("nvmlDeviceGetPowerUsage")
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # drivers before 535 know it by its older name
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        violation = self._ask("nvmlDeviceGetViolationStatus", library.NVML_PERF_POLICY_THERMAL)
        return State(
            sm_mhz=self._ask("nvmlDeviceGetClockInfo", library.NVML_CLOCK_SM),
            mem_mhz=self._ask("nvmlDeviceGetClockInfo", library.NVML_CLOCK_MEM),
            temperature_c=self._ask("nvmlDeviceGetTemperature", library.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1e3,
            throttle=_reasons(reasons or 0),
            thermal_violation_ns=None if violation is None else int(violation.violationTime),
        )

    def _ask(self, function: str, *arguments: Any) -> Any:
        """The answer of one NVML call; None where this card or driver has none."""
        try:
            return getattr(self._library, function)(self._handle, *arguments)
        except self._library.NVMLError:
            return None

    def _busy(self, since_us: int) -> dict[int | None, int]:
        """By pid, percent of the time since then in which its kernels ran. {} where NVML does not say: a MIG slice,
        no permission, nobody busy (nvml.h, nvmlDeviceGetProcessUtilization).

        Some drivers fill up with entries that were never written, of any time and beyond 100 %: those are left out.
        """
        samples = self._ask("nvmlDeviceGetProcessUtilization", since_us) or []
        valid = [one for one in samples if one.timeStamp > since_us and one.smUtil <= 100]
        return {int(one.pid): int(one.smUtil) for one in sorted(valid, key=lambda one: int(one.smUtil))}

    def _listed(self) -> list[Process]:
        listed = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        return [
            Process(int(entry.pid), None if entry.usedGpuMemory is None else entry.usedGpuMemory / MIB)
            for entry in listed
        ]


def _find(library: Any, card: Card) -> Any:
    """NVML's handle of the card. CUDA gives the bare UUID; NVML's begins with GPU-, or MIG- for a slice of a card."""
    tries = [("nvmlDeviceGetHandleByUUID", f"{prefix}{card.uuid}") for prefix in ("GPU-", "MIG-") if card.uuid]
    if card.pci:
        tries.append(("nvmlDeviceGetHandleByPciBusId", card.pci))
    for function, key in tries:
        try:
            return getattr(library, function)(key)
        except library.NVMLError:
            continue  # the next key may fit; the error below names them all
    asked = ", ".join(key for _, key in tries) or "nothing to find it by"
    raise NvmlUnavailable(f"NVML lists no card like {card.name} ({asked})")


def _reasons(bits: int) -> list[str]:
    known = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    rest = bits & ~sum(THROTTLE_REASONS)
    return [*known, f"bits_{rest:#x}"] if rest else known


def _family(own_pids: Iterable[int]) -> set[int]:
    """This process, the given ones, and the ancestors of this one."""
    family = {os.getpid(), *own_pids}
    ancestor = os.getppid()
    while ancestor > 1 and ancestor not in family:
        family.add(ancestor)
        ancestor = parent_of(ancestor)
    return family


def _descends(pid: int | None) -> bool:
    """Whether this process is an ancestor of ``pid``."""
    while pid is not None and pid > 1:
        pid = parent_of(pid)
        if pid == os.getpid():
            return True
    return False


def parent_of(pid: int, proc: Path = Path("/proc")) -> int:
    """The parent's pid, from /proc; 0 where there is none, or no such process any more, or no /proc."""
    try:
        status = (proc / str(pid) / "status").read_text()
    except OSError:
        return 0
    found = re.search(r"^PPid:\s*(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0
