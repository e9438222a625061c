"""Arenas of host memory that weights lie in for a whole session: page-aligned, pinned for the GPU when there is one."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PAGE = 4096
ALIGNMENT = 256
"""Bytes; every tensor starts at a multiple, as CUDA's own allocations do."""

Bytes = NDArray[np.uint8]


class Spec(NamedTuple):
    """What a tensor is, before it has memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class PinningFailed(Exception):
    """The driver refused to page-lock an arena. Its text is the driver's reason."""


class Arena:
    """One allocation for several tensors. ``tensors`` are its contents by name; ``data[name]`` are their bytes, flat.

    The memory is numpy's, which asks the kernel for huge pages (torch doesn't): fewer faults while it is filled.
    """

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        starts, size = {}, 0
        for name, spec in specs.items():
            starts[name] = size
            size += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        # Whole pages of its own: what is page-locked here never shares a page with another arena.
        self.nbytes = -(-size // PAGE) * PAGE
        raw = np.empty(self.nbytes + PAGE, dtype=np.uint8)
        skip = -raw.ctypes.data % PAGE
        self._memory = raw[skip : skip + self.nbytes]
        self.data: dict[str, Bytes] = {
            name: self._memory[starts[name] : starts[name] + spec.nbytes] for name, spec in specs.items()
        }
        self.tensors: dict[str, Tensor] = {
            name: torch.from_numpy(self.data[name]).view(spec.dtype).view(spec.shape) for name, spec in specs.items()
        }
        self.pinned = False

    def pin(self, device: torch.device) -> None:
        """Page-lock the arena for DMA by the GPU. Raises PinningFailed.

        Call it on a worker thread: CUDA keeps a refusal as the calling thread's last error, and torch would raise it
        at that thread's next kernel launch.
        """
        if self.pinned:
            return
        torch.cuda.set_device(device)  # the calling thread's own
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = self._memory.ctypes.data
        code = int(runtime.cudaHostRegister(address, self.nbytes, 0))
        if code != 0:
            raise PinningFailed(f"cudaHostRegister of {self.nbytes / 2**20:.0f} MiB returned CUDA error {code}")
        self.pinned = True
        release = weakref.finalize(self, runtime.cudaHostUnregister, address)
        release.atexit = False  # the end of the process unlocks everything at once


def worker_count() -> int:
    """Threads that fill or copy host memory: the processors of this process, at most 16 (they saturate the memory)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(16, len(affinity(0)) if affinity else os.cpu_count() or 1)


def available_bytes() -> int | None:
    """Host memory that can be had without swapping, or None where the system doesn't say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
