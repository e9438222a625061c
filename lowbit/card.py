"""The state of the card around a measurement, and whether it voids what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lowbit.device import MIB
from lowbit.nvml import UNEXPLAINED_MIB, Nvml, Process

DISTURBING = frozenset({"hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"})
"""Reasons that void a measurement. Not idling, nor ``sw_power_cap``: an H200 runs at its power limit by design."""
CLOCK_DROP = 0.10
"""Share by which the SM clock may be lower after than before without an explanation."""
MOVED_MIB = 128.0
"""Change of a process's memory by which it was at work, or began to be.

A desktop's compositor moves when windows open: one of 3840 × 2160 × 4 bytes, kept three times, is 95 MiB. A process
that begins to compute takes more: a CUDA context alone 0.4 to 1 GiB. One that computes within memory it holds already
moves by nothing; only ``BUSY_PERCENT`` shows it.
"""
BUSY_PERCENT = 5
"""Share of the measurement's time in which kernels of another process ran, from which on it disturbs.

A desktop's compositor takes 1 to 3 %: that must not void every case there, although 3 % could pass decode's limit of
2 %. Beyond 5 % a suspicion is explained, whatever its cause.
"""
FREE_CARD = "measure when the card is free, or choose a free one with CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class CardState:
    """The card at one moment: other processes on it, clocks, temperature, power, what holds the clocks back.

    All empty without NVML: nothing is known then, and nothing is called disturbed.
    """

    others: tuple[Process, ...] = ()
    sm_mhz: int | None = None
    mem_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    throttle: tuple[str, ...] = ()
    thermal_violation_ns: int | None = None

    @classmethod
    def read(cls, nvml: Nvml | None, own_pids: Iterable[int] = (), since_us: int | None = None) -> CardState:
        """Read it now, while the card is still warm from the work: an idle card shows idle clocks.

        With ``since_us`` (``time.time_ns() // 1000`` of the beginning) the others say how busy they were since.
        """
        if nvml is None:
            return cls()
        state = nvml.state()
        reserved = sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count())) / MIB
        others = tuple(nvml.other_processes(own_pids, explained_mib=reserved, since_us=since_us))
        return cls(
            others=others,
            sm_mhz=state["sm_mhz"],
            mem_mhz=state["mem_mhz"],
            temperature_c=state["temperature_c"],
            power_w=state["power_w"],
            throttle=tuple(state["throttle"]),
            thermal_violation_ns=state["thermal_violation_ns"],
        )

    def to_dict(self) -> dict[str, Any]:
        """For a record's info."""
        return {**asdict(self), "others": [str(process) for process in self.others], "throttle": list(self.throttle)}


def disturbed(before: CardState, after: CardState, clock_drop: float = CLOCK_DROP) -> str | None:
    """Why what was measured between the two is void; None if nothing is known against it.

    Another process came, or one that was there was at work (``MOVED_MIB``, ``BUSY_PERCENT``); thermal or hardware
    throttling, seen at either end or by NVML's violation counter in between; the SM clock fell by more than
    ``clock_drop`` with neither idling nor the power cap to explain it. A process that stays idle is recorded but does
    not void: on a desktop there always is one. Nor does one that left: what it slowed down is found out by confirming.
    """
    known = {process.pid: process for process in before.others}
    came = [str(process) for process in after.others if process.pid not in known]
    if came:
        expected = f"none but {', '.join(map(str, before.others))}" if before.others else "none beside ours"
        return f"another process came to the card: {', '.join(came)} (expected {expected}); {FREE_CARD}"
    worked = [words for process in after.others if (words := _work(known[process.pid], process))]
    if worked:
        return f"another process worked on the card: {', '.join(worked)}; {FREE_CARD}"
    throttled = sorted(DISTURBING & {*before.throttle, *after.throttle})
    if throttled:
        return f"the card was throttled: {', '.join(throttled)} (at {after.temperature_c} °C)"
    if before.thermal_violation_ns is not None and after.thermal_violation_ns is not None:
        held_ns = after.thermal_violation_ns - before.thermal_violation_ns
        if held_ns > 0:
            return f"thermal throttling for {held_ns / 1e6:.1f} ms in between (now {after.temperature_c} °C)"
    explained = {"gpu_idle", "sw_power_cap"} & {*after.throttle}
    if before.sm_mhz and after.sm_mhz and after.sm_mhz < before.sm_mhz * (1 - clock_drop) and not explained:
        return f"the SM clock fell from {before.sm_mhz} to {after.sm_mhz} MHz (more than {100 * clock_drop:g} %)"
    return None


def _work(before: Process, after: Process) -> str | None:
    """What shows that a process which was there and stays was at work; None if nothing does.

    Where pids are hidden its memory is a remainder, with our own libraries in it: the bound is what those may take.
    """
    if after.busy is not None and after.busy >= BUSY_PERCENT:
        return f"{after.name} ran kernels for {after.busy} % of the time (expected less than {BUSY_PERCENT} %)"
    if before.mib is None or after.mib is None:
        return None
    bound = UNEXPLAINED_MIB if after.pid is None else MOVED_MIB
    if abs(after.mib - before.mib) <= bound:
        return None
    held = f"held {before.mib:,.0f} MiB before and {after.mib:,.0f} MiB after"
    return f"{after.name} {held} (expected a change of at most {bound:,.0f} MiB)"
