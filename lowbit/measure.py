"""Instruments: clocks, memory of the card, and the host's yardstick. lowbit/energy.py has the card's joules."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from lowbit import vram_limit
from lowbit.device import MIB, Device
from lowbit.formats import Unmet
from lowbit.graphs import recording
from lowbit.nvml import Nvml

NVML_METRICS = ("vram_peak_mib", "vram_start_mib", "vram_end_mib", "energy_j_per_tok")
"""Absent without NVML."""
GPU_METRICS = (*NVML_METRICS, "host_share", "vram_alloc_peak_mib", "vram_quantize_peak_mib")
"""Absent without a GPU: a CPU's resident size says nothing, glibc keeps pages (count storages: weights_mib)."""

SETTLING_GRAPHS = 8
"""CUDA graphs recorded before a case's rounds; four were enough on an H200, driver 580."""
SETTLING_KERNELS = 500
"""Kernels on a second stream then, and before each round: some hundred had the same effect there."""


# -- clocks -----------------------------------------------------------------------------------------------------------


def synchronize(device: Device) -> None:
    """Wait until the device has done all that it was given. Nothing to wait for on a CPU."""
    if device.kind == "cuda":
        torch.cuda.synchronize(device.torch)


@functools.cache
def timer(device: Device) -> Callable[[], float]:
    """A clock in seconds that first waits for the device; the same function for the same device.

    Fit for ``benchmark.pedantic``'s ``timer``, which knows a timer by its identity and its ``__name__``.
    """
    if device.kind == "cpu":
        return perf_counter

    def synchronized_perf_counter() -> float:
        torch.cuda.synchronize(device.torch)
        return perf_counter()

    return synchronized_perf_counter


class StepClock:
    """Times of single steps without waiting between them: CUDA events in the stream, ``perf_counter`` on a CPU.

    ``start``, then ``mark`` after each step, then ``seconds``. Events are kept and used again, so a second round
    creates none in its timed region.
    """

    def __init__(self, device: Device) -> None:
        self._cuda = device.kind == "cuda"
        self._marks: list[float] = []
        self._events: list[Any] = []
        self._used = 0

    def start(self) -> None:
        """Begin a round; what an earlier one marked is forgotten."""
        self._marks, self._used = [], 0
        self.mark()

    def mark(self) -> None:
        """The step that was just launched ends here."""
        if not self._cuda:
            self._marks.append(perf_counter())
            return
        if self._used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._events[self._used].record()
        self._used += 1

    def seconds(self) -> list[float]:
        """One entry per mark since ``start``. Waits for the last one."""
        if not self._cuda:
            return [end - begin for begin, end in pairwise(self._marks)]
        events = self._events[: self._used]
        if events:
            events[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]


# -- memory -----------------------------------------------------------------------------------------------------------


class VramMeter:
    """Memory of this process on its card, in MiB; None for every figure on a CPU, or without NVML for NVML's.

    NVML is read, never sampled in the background (a sampling thread disturbs what it measures). That is enough for a
    peak: torch's caching allocator gives nothing back by itself, so what NVML shows after the rounds is their peak,
    unless something in them called ``torch.cuda.empty_cache`` or ran out of memory and retried.

    A process grows as it goes: the CUDA context, cuBLAS, and every kernel once it has run stay loaded. Raw readings
    of a case alone and of the same case after ten others would differ by all that. ``case_peak_mib`` takes it out:
    what lies outside torch's allocator when the case starts, beyond what lay there in the freshly warmed-up process.
    """

    def __init__(self, device: Device, nvml: Nvml | None) -> None:
        self._device = device
        self._nvml = nvml if device.kind == "cuda" else None
        self._cuda = device.kind == "cuda"
        self._outside_at_warm_up: float | None = None
        self._drift = 0.0

    def release(self) -> None:
        """Give everything unreferenced back to the card. Twice: the first pass frees what only cycles held."""
        gc.collect()
        gc.collect()
        if self._cuda:
            synchronize(self._device)
            torch._C._cuda_clearCublasWorkspaces()  # each would keep the whole segment that it was cut from
            with torch.cuda.device(self._device.torch):
                torch.cuda.empty_cache()
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

    def trim(self) -> None:
        """Give torch's unused blocks back: scratch of compiling and tuning is no part of a case's peak."""
        if self._cuda:
            synchronize(self._device)
            torch.cuda.empty_cache()

    def warm_up(self) -> float | None:
        """Load what a case loads (context, cuBLAS, attention, graphs), release, and return the process's size then.

        Once a session, before the first model: the zero that ``case_peak_mib`` counts from. None without NVML.
        """
        if self._cuda:
            dtypes = [torch.float16, torch.float32] + [torch.bfloat16] * self._device.has_dtype("bf16")
            for dtype in dtypes:
                _use_libraries(self._device.torch, dtype)
            settle(self._device)
        self.release()
        self._outside_at_warm_up = self._outside_mib()
        return self.process_mib()

    def process_mib(self) -> float | None:
        """This process by NVML now."""
        return None if self._nvml is None else self._nvml.process_mib()

    def _outside_mib(self) -> float | None:
        """What this process holds outside torch's allocator: context, libraries, loaded kernels."""
        process = self.process_mib()
        return None if process is None else process - torch.cuda.memory_reserved(self._device.torch) / MIB

    def start_case(self) -> None:
        """Call after ``release``, the format loaded, before the case compiles or runs anything."""
        outside = self._outside_mib()
        if outside is not None and self._outside_at_warm_up is not None:
            self._drift = outside - self._outside_at_warm_up

    def case_peak_mib(self) -> float | None:
        """Peak of the case begun by ``start_case``, to be read right after its rounds, less what came before it.

        So a case agrees with itself whether it ran alone or last. Kernels that an earlier case happens to have loaded
        for it differ: some MiB.
        """
        now = self.process_mib()
        return None if now is None else now - self._drift

    def reset_peak(self) -> None:
        """Begin a new peak of torch's allocator."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device.torch)

    def alloc_peak_mib(self) -> float | None:
        """Peak of torch's allocator since ``reset_peak``: tensors alone, no context, no rounding to blocks."""
        return torch.cuda.max_memory_allocated(self._device.torch) / MIB if self._cuda else None


def _use_libraries(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(1, 8, 128, 128, device=device).to(dtype)
    attended = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    row = attended.flatten(0, 2)[:1]
    (torch.nn.functional.silu(row @ x[0, 0]) + row).float().softmax(-1).argmax().item()


def settle(device: Device) -> None:
    """Record some CUDA graphs and use a second stream, so that every case finds the process as later ones do.

    On an H200 (driver 580) the kernels of a process's first three graphs follow each other 0.2 to 0.4 µs sooner than
    those of any later moment: the fourth graph recorded, or hundreds of kernels on one more stream, ends it for all
    of them at once (docs/findings.md). A process that serves is past that; a step of 800 kernels would be 6 % faster as
    the first case than as the fifth. Some cases were seen to be fast again, so this comes before the rounds of each.
    The first graph also takes 72 MiB outside torch's allocator, whatever is in it. Nothing to do on a CPU.
    """
    if device.kind != "cuda":
        return
    x = torch.zeros(8, device=device.torch)
    with torch.cuda.device(device.torch):
        for _ in range(SETTLING_GRAPHS):
            graph = torch.cuda.CUDAGraph()
            with recording(graph):
                x.add_(1)
            graph.replay()
    use_second_stream(device)


def use_second_stream(device: Device) -> None:
    """Hundreds of kernels on one more stream: what ends the fast state by itself, in a few ms and without a graph.

    Before each round, for two of nineteen cases on an H200 came back to the fast state between two rounds, within 2 s
    of another process's end and the next one's start on the host's other card.
    """
    if device.kind != "cuda":
        return
    x = torch.zeros(8, device=device.torch)
    synchronize(device)
    with torch.cuda.device(device.torch), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for _ in range(SETTLING_KERNELS):
            x.add_(1)
    synchronize(device)


def memory_fits(device: Device, needed_mib: float, held_mib: float = 0.0) -> Unmet | None:
    """None if ``needed_mib`` are free now (torch's unused cache counts as free), else the exact figures.

    ``held_mib`` are in use by tensors that the caller will free first.
    """
    total = device.total_mib
    if device.kind == "cpu":
        free = _host_available_mib()
    else:
        cached = torch.cuda.memory_reserved(device.torch) - torch.cuda.memory_allocated(device.torch)
        free = (vram_limit.free_bytes(device.torch, device.limit_mib) + cached) / MIB
    if free is None:
        return None
    room = free + held_mib if total is None else min(free + held_mib, total)
    if needed_mib <= room:
        return None
    of_total = "" if total is None else f" of {total:,.0f}"
    return Unmet("memory", f"needs {needed_mib:,.0f} MiB, {room:,.0f}{of_total} MiB are free on {device.name}")


def _host_available_mib(meminfo: Path = Path("/proc/meminfo")) -> float | None:
    """What the kernel says could be had without swapping; None on a system that does not say."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(found[1]) / 1024 if found else None


# -- the host ---------------------------------------------------------------------------------------------------------


@contextmanager
def cpu_threads(device: Device, threads: int = 1) -> Iterator[None]:
    """One thread for a CPU's benches, the former number afterwards; nothing on a GPU.

    With two threads and one foreign busy process, OpenMP's barriers cost a factor of 10 to 15 (seen on 2 cores).
    """
    if device.kind != "cpu":
        yield
        return
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(former)


@functools.cache
def _yardstick_operands() -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.float32]]]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((1024, 1024), np.float32), generator.standard_normal(1024, np.float32)


def yardstick() -> float:
    """Seconds of a fixed piece of host work, about 10 ms: by it a CPU's drifting clock is divided.

    Half Python, half matrix × vector over 4 MB, as eager decode is; by numpy's einsum, which calls no BLAS and so is
    never threaded. Nothing of torch: a torch that gets slower must not lengthen the yardstick with it.
    """
    matrix, vector = _yardstick_operands()
    started = perf_counter()
    total = 0
    for i in range(150_000):
        total += i % 7
    for _ in range(32):
        np.einsum("ij,j->i", matrix, vector)
    return perf_counter() - started


def yardsticks(device: Device) -> list[float]:
    """What to take just before a timed round: one yardstick on a CPU; on a GPU nothing, whose clock does not drift."""
    return [yardstick()] if device.kind == "cpu" else []
