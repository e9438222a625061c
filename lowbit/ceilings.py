"""What this device really reaches: read bandwidth, copy bandwidth, matrix rate. mbu and mfu are held against these."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import vram_limit
from lowbit.device import Device
from lowbit.errors import LowbitError


@dataclass(frozen=True)
class Ceilings:
    """What this device reached here and now: bandwidths in 10^9 bytes/s, the product in 10^12 FLOP/s.

    ``copy_gb_s`` counts bytes read and written. ``read_method`` and ``matmul_method`` say what was run.
    """

    read_gb_s: float
    copy_gb_s: float
    matmul_tflop_s: float
    read_method: str = ""
    matmul_method: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For a record's info."""
        return asdict(self)


READ_BYTES = 16 << 30
"""Read per pass: so much that a kernel's start and tail (14 µs on an H200, 1.5 % of 4 GiB, 0.4 % of 16) hardly show."""


def measure_ceilings(device: Device) -> Ceilings:
    """Read bandwidth, copy bandwidth and matrix rate, each the median of a few passes; about a second; nothing is kept.

    CUDA: a sum over 16 GiB (a quarter of what is free, if less) by a Triton kernel and by ``torch.sum``, the faster of
    the two; a copy of half that; an 8192³ product of random numbers in bf16 (fp16 below SM80; zeros would be faster,
    they draw less power). CPU, one thread as in the benches: 256 MB; 1024³ in bf16 and in fp32, the faster of the two.
    Raises LowbitError if a sum is wrong: then the figure would be too.
    """
    if device.kind == "cuda":
        try:
            with torch.cuda.device(device.torch):
                return _ceilings(
                    device, _cuda_read_bytes(device), 8192, ("bf16",) if device.has_dtype("bf16") else ("fp16",)
                )
        finally:
            torch.cuda.empty_cache()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _ceilings(device, 256_000_000, 1024, ("bf16", "fp32"))
    finally:
        torch.set_num_threads(threads)


def _cuda_read_bytes(device: Device) -> int:
    free = vram_limit.free_bytes(device.torch, device.limit_mib)
    return min(READ_BYTES, free // 4 // CHUNK_BYTES * CHUNK_BYTES)


def _ceilings(device: Device, read_bytes: int, side: int, dtypes: tuple[str, ...]) -> Ceilings:
    read_gb_s, copy_gb_s, method = _bandwidths(device, read_bytes)
    if device.kind == "cuda":
        torch.cuda.empty_cache()  # else cuBLAS puts its workspace into the gigabytes just freed, and keeps them all
    flop_s, dtype = max((2 * side**3 / _matmul_seconds(device, side, dtype), dtype) for dtype in dtypes)
    return Ceilings(
        read_gb_s=read_gb_s,
        copy_gb_s=copy_gb_s,
        matmul_tflop_s=flop_s / 1e12,
        read_method=f"{method} over {read_bytes / (1 << 30):.2f} GiB",
        matmul_method=f"{dtype} {side}x{side}x{side}",
    )


def _bandwidths(device: Device, read_bytes: int) -> tuple[float, float, str]:
    source = torch.ones(read_bytes // 4, dtype=torch.float32, device=device.torch)
    read_s, method = min(_read_seconds(device, source, name, sum_of) for name, sum_of in _sums(device))
    half = source.numel() // 2
    copy_s = _median_seconds(device, lambda: source[:half].copy_(source[-half:]))
    return read_bytes / read_s / 1e9, 2 * 4 * half / copy_s / 1e9, method


def _read_seconds(device: Device, source: Tensor, name: str, sum_of: Callable[[Tensor], Tensor]) -> tuple[float, str]:
    total = float(sum_of(source).sum(dtype=torch.float64))
    if abs(total / source.numel() - 1) > 1e-3:
        raise LowbitError(f"{name} on {device.name}: expected the sum {source.numel()}, got {total:.0f}")
    return _median_seconds(device, lambda: sum_of(source)), name


def _matmul_seconds(device: Device, side: int, dtype: str) -> float:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    generator = torch.Generator(device.torch).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device.torch).to(torch_dtype) for _ in range(2))
    return _median_seconds(device, lambda: left @ right)


def _median_seconds(device: Device, call: Callable[[], object], passes: int = 10, budget_s: float = 0.3) -> float:
    """Median seconds of up to ``passes`` calls (3 at least) after a warm-up; stops early when the budget is spent."""
    times: list[float] = []
    call()
    for _ in range(passes):
        if len(times) >= 3 and sum(times) > budget_s:
            break
        times.append(event_seconds(call) if device.kind == "cuda" else wall_seconds(call))
    return statistics.median(times)


def wall_seconds(call: Callable[[], object]) -> float:
    """Of one call, by the host's clock."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def event_seconds(call: Callable[[], object]) -> float:
    """Of one call's work on the GPU, waited for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


CHUNK_BYTES = 64 << 10
"""What one program of the Triton sum reads."""


def _sums(device: Device) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """The sums to try: torch's own stops short of what an H200's memory gives, a plain Triton kernel does not."""
    sums: list[tuple[str, Callable[[Tensor], Tensor]]] = [("torch.sum", torch.sum)]
    if device.kind == "cuda":
        try:
            sums.append(("triton sum kernel", _triton_sum()))
        except ImportError:
            return sums  # Ceilings.read_method tells
    return sums


def _triton_sum() -> Callable[[Tensor], Tensor]:
    """Sum of [n] float32, n a multiple of CHUNK_BYTES / 4, to one partial sum per chunk."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def sum_chunks(source, partial, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        start = tl.program_id(0).to(tl.int64) * CHUNK
        total = tl.zeros([BLOCK], tl.float32)
        for offset in range(0, CHUNK, BLOCK):
            total += tl.load(source + start + offset + tl.arange(0, BLOCK))
        tl.store(partial + tl.program_id(0), tl.sum(total))

    def run(source: Tensor) -> Tensor:
        chunks = source.numel() * 4 // CHUNK_BYTES
        partial = torch.empty(chunks, dtype=torch.float32, device=source.device)
        sum_chunks[(chunks,)](source, partial, CHUNK=CHUNK_BYTES // 4, BLOCK=4096, num_warps=16)
        return partial

    return run
