"""Memory: weights and KV cache counted from their storages, the process by NVML and by torch."""

from __future__ import annotations

from lowbit.metrics.measurement import MIB, Measurement
from lowbit.metrics.row import EVERY, Limit, metric


@metric("MiB", "lower", Limit(relative=1e-9), EVERY)
def weights_mib(m: Measurement) -> float | None:
    """Bytes of all parameters and buffers resident on the device, counted from their storages: deterministic."""
    return None if m.weights_bytes is None else m.weights_bytes / MIB


@metric("bit", "lower", Limit(relative=1e-9), EVERY)
def bits_per_weight(m: Measurement) -> float | None:
    """Bits stored per weight of the quantized linears, scales and zeros included, counted from their storages."""
    return m.bits_per_weight


@metric("B/tok", "lower", Limit(relative=1e-9), ("decode",))
def kv_bytes_per_tok(m: Measurement) -> float | None:
    """Bytes of KV cache per position and sequence in all layers, scales included, counted from the cache's tensors."""
    return m.kv_bytes_per_token


@metric("MiB", "lower", kinds=("decode",))
def kv_cache_mib(m: Measurement) -> float | None:
    """The KV cache of this case at its full context: bytes per token * batch * (prompt + new tokens)."""
    if m.kv_bytes_per_token is None:
        return None
    return m.kv_bytes_per_token * m.batch * (m.prompt_tokens + m.new_tokens) / MIB


@metric("MiB", "lower", Limit(absolute=64))
def vram_peak_mib(m: Measurement) -> float | None:
    """Peak of this process in the measured rounds by NVML, less what earlier cases left loaded in the process."""
    return m.vram_peak_mib


@metric("MiB", "lower")
def vram_alloc_peak_mib(m: Measurement) -> float | None:
    """Peak of torch's allocator in the measured rounds."""
    return m.vram_alloc_peak_mib


@metric("MiB", "lower")
def vram_quantize_peak_mib(m: Measurement) -> float | None:
    """Peak of torch's allocator while the format was being made."""
    return m.vram_quantize_peak_mib


@metric("MiB", "lower")
def vram_start_mib(m: Measurement) -> float | None:
    """This process by NVML before the format was made."""
    return m.vram_start_mib


@metric("MiB", "lower")
def vram_end_mib(m: Measurement) -> float | None:
    """This process by NVML after the case, its caches released: a leak shows as growth over the run."""
    return m.vram_end_mib
