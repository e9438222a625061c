"""Launching compiled kernels on torch's current stream: programmatic dependent launch, inside graph capture too."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from lowbit.kernels.nvrtc import Binary, checked

MAX_SHARED_BYTES = 227 * 1024
"""Of one block on SM90 (CUDA C++ Programming Guide, table of compute capabilities)."""


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(result: tuple[Any, ...], doing: str) -> Any:
    return checked(result, doing, "CUDA driver")


class Module:
    """A cubin loaded into the current CUDA context. Load it before a graph is captured."""

    def __init__(self, binary: Binary) -> None:
        torch.empty(1, device="cuda")  # makes the primary context current in this thread
        self._driver = _driver()
        self._module = _checked(self._driver.cuModuleLoadData(binary.cubin), "loading lowbit's kernels")
        self._names = binary.names
        self._functions: dict[str, Any] = {}

    def function(self, kernel: str) -> Any:
        """The kernel of this C++ name, allowed all of a block's dynamic shared memory.

        All ask for the largest carve-out: a multiprocessor must be empty to change it, and then no two would overlap.
        """
        if kernel not in self._functions:
            found = _checked(
                self._driver.cuModuleGetFunction(self._module, self._names[kernel].encode()), f"finding {kernel}"
            )
            kinds = self._driver.CUfunction_attribute
            settings = {kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: 100}  # percent
            if not kernel.startswith(("embed", "unpack")):
                settings[kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES] = MAX_SHARED_BYTES
            for attribute, value in settings.items():
                _checked(self._driver.cuFuncSetAttribute(found, attribute, value), f"preparing {kernel}")
            self._functions[kernel] = found
        return self._functions[kernel]

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        argument: ctypes.Structure,
        *,
        shared_bytes: int = 0,
        overlap: bool = False,
    ) -> None:
        """Launch with one struct as its argument. ``overlap``: it may start before the kernel before it has ended."""
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid[0], grid[1], 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        _checked(
            driver.cuLaunchKernelEx(config, self.function(kernel), ctypes.addressof(pointers), 0), f"launching {kernel}"
        )
