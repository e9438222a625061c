"""LOWBIT_VRAM_MIB: measure as on a card of that much memory, to see what would run there and how.

What does not fit is skipped or streamed as it would be there, and torch's allocator refuses what goes beyond. On a CPU
the figure stands for the host's memory wherever cases are asked whether they fit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch

from lowbit.errors import LowbitError

VARIABLE = "LOWBIT_VRAM_MIB"
MIB = 1024 * 1024


def read(environ: Mapping[str, str] = os.environ) -> float | None:
    """The limit in MiB, or None where none is set. Raises LowbitError for what is no size."""
    given = environ.get(VARIABLE, "")
    if not given:
        return None
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise LowbitError(f"{VARIABLE}: expected a size in MiB, a number above 0, got {given!r}; correct or unset it")
    return limit


def enforce(device: torch.device, limit_mib: float | None) -> None:
    """Let torch's allocator hold no more than the limit on this GPU: beyond it is out of memory, as on such a card.

    What lies outside the allocator (the CUDA context, loaded kernels; 0.7 GiB on an H200) comes on top.
    """
    if limit_mib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_mib * MIB / total), device)


def free_bytes(device: torch.device, limit_mib: float | None) -> int:
    """What can still be had on this GPU beside torch's unused cache: by the driver, and within the limit."""
    free: int = torch.cuda.mem_get_info(device)[0]
    if limit_mib is None:
        return free
    return min(free, max(0, int(limit_mib * MIB) - torch.cuda.memory_reserved(device)))
