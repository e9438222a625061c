"""The state of the card around a measurement, and whether it voids what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lowbit.device import MIB
from lowbit.nvml import Nvml, Process

DISTURBING = frozenset({"hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"})
"""Reasons that void a measurement. Not idling, nor ``sw_power_cap``: an H200 runs at its power limit by design."""
CLOCK_DROP = 0.10
"""Share by which the SM clock may be lower after than before without an explanation."""


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
    def read(cls, nvml: Nvml | None, own_pids: Iterable[int] = ()) -> CardState:
        """Read it now, while the card is still warm from the work: an idle card shows idle clocks."""
        if nvml is None:
            return cls()
        state = nvml.state()
        reserved = sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count())) / MIB
        others = tuple(nvml.other_processes(own_pids, explained_mib=reserved))
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

    Another process came; thermal or hardware throttling, seen at either end or by NVML's violation counter in
    between; the SM clock fell by more than ``clock_drop`` with neither idling nor the power cap to explain it. A
    process that was there before and stays is recorded but does not void: on a desktop there always is one.
    """
    known = {process.pid for process in before.others}
    came = [str(process) for process in after.others if process.pid not in known]
    if came:
        return f"another process came to the card: {', '.join(came)}"
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
