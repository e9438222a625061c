"""Launching compiled kernels on torch's current stream: programmatic dependent launch, inside graph capture too."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.kernels import nvrtc
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
        cluster: int = 1,
    ) -> None:
        """Launch with one struct as its argument. ``overlap``: it may start before the kernel before it has ended.

        ``cluster``: blocks along the grid's y that run at once and see each other's shared memory.
        """
        config = self._config(grid, threads, shared_bytes, cluster, overlap)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        _checked(
            self._driver.cuLaunchKernelEx(config, self.function(kernel), ctypes.addressof(pointers), 0),
            f"launching {kernel}",
        )

    def _config(self, grid: tuple[int, int], threads: int, shared_bytes: int, cluster: int, overlap: bool) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid[0], grid[1], 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        attributes = []
        if cluster > 1:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attributes[-1].value.clusterDim
            size.x, size.y, size.z = 1, cluster, 1
        if overlap:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        if attributes:  # set once: reading it gives views into memory that the next setting frees
            config.attrs, config.numAttrs = attributes, len(attributes)
        return config


@dataclass(eq=False)
class Launch:
    """A kernel with all that it is launched with."""

    module: Module
    kernel: str
    grid: tuple[int, int]
    threads: int
    argument: ctypes.Structure
    shared_bytes: int = 0
    overlap: bool = True
    cluster: int = 1

    def launch(self) -> None:
        self.module.launch(
            self.kernel,
            self.grid,
            self.threads,
            self.argument,
            shared_bytes=self.shared_bytes,
            overlap=self.overlap,
            cluster=self.cluster,
        )


def compile_module(
    sources: Sequence[str],
    kernels: Sequence[str],
    macros: Mapping[str, object],
    device: int,
    progress: Callable[[str], None] | None = None,
) -> Module:
    """``kernels`` of these files of cuda/, compiled for this device or from the cache, and loaded there."""
    major, minor = torch.cuda.get_device_capability(device)
    source, arch, folder = nvrtc.read_sources(*sources), f"sm_{major}{minor}a", nvrtc.cache_folder()
    with torch.cuda.device(device):
        return Module(nvrtc.compile_source(source, kernels, macros, arch, folder=folder, progress=progress))
