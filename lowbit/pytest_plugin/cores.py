"""The host's cores, a share for each worker: one that compiles must not slow down another's timed steps.

Seen on four H200s of one host with 64 cores: four processes compiled and measured side by side, and torchao's int4 lost
a fifth to a half of its speed (docs/findings.md).
"""

from __future__ import annotations

import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")


def shares(count: int, root: Path = TOPOLOGY) -> list[list[int]]:
    """The processors that this process may run on, in ``count`` shares of neighbours; [] where that can't be had.

    Neighbours are hardware threads of one core, then cores of one socket, as the kernel tells them.
    """
    if count < 2 or not hasattr(os, "sched_getaffinity"):
        return []
    mine = sorted(os.sched_getaffinity(0), key=lambda cpu: (*_place(root / f"cpu{cpu}" / "topology"), cpu))
    if len(mine) < count:
        return []
    return [mine[len(mine) * i // count : len(mine) * (i + 1) // count] for i in range(count)]


def _place(folder: Path) -> tuple[int, int]:
    """(socket, core); (0, 0) for all where the kernel does not tell."""
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, 0


def take(share: list[int]) -> None:
    """Run on these processors alone, with every thread and process that comes after."""
    os.sched_setaffinity(0, share)
