"""What a case costs beside its time: energy, the share of the card that it uses, loading, quantizing, compiling."""

from __future__ import annotations

from lowbit.metrics.measurement import Measurement
from lowbit.metrics.row import EVERY, HOST_BOUND, Limit, metric


@metric("J/tok", "lower", Limit(relative=0.05), ("decode",), host_bound_limit=HOST_BOUND)
def energy_j_per_tok(m: Measurement) -> float | None:
    """Joules of the whole card (NVML's total-energy counter) per decoded token, over the energy window."""
    return m.energy_j / m.energy_tokens if m.energy_j is not None and m.energy_tokens else None


@metric("share", "higher", kinds=("decode",))
def mbu(m: Measurement) -> float | None:
    """Model bandwidth utilisation: (weight + KV bytes read per step) * steps/s / measured read bandwidth."""
    if not (m.streamed_bytes_per_step and m.decode and m.read_gb_s):
        return None
    return m.streamed_bytes_per_step * m.new_tokens / m.decode / (m.read_gb_s * 1e9)


@metric("share", "higher", kinds=("prefill",))
def mfu(m: Measurement) -> float | None:
    """Model FLOP utilisation: FLOP of the prefill / time / measured bf16 matrix rate."""
    if not (m.prefill_flop and m.prefill and m.matmul_tflop_s):
        return None
    return m.prefill_flop / m.prefill / (m.matmul_tflop_s * 1e12)


@metric("s", "lower", kinds=EVERY)
def load_s(m: Measurement) -> float | None:
    """Reading the weights into host memory, once a session."""
    return m.load_s


@metric("s", "lower", kinds=EVERY)
def quantize_s(m: Measurement) -> float | None:
    """From the master in host memory to the quantized model on the device, copies included."""
    return m.quantize_s


@metric("s", "lower", Limit(relative=0.50, absolute=5.0), gated_on=("cuda",))
def compile_s(m: Measurement) -> float | None:
    """First compiled call less a later one: Dynamo, Inductor, autotune and graph capture (0 in eager mode)."""
    return m.compile_s


@metric("count", "lower", Limit(absolute=0.5))
def graph_breaks(m: Measurement) -> float | None:
    """Graph breaks that Dynamo counted."""
    return None if m.graph_breaks is None else float(m.graph_breaks)


@metric("count", "lower", Limit(absolute=0.5))
def recompiles(m: Measurement) -> float | None:
    """Recompilations after the first compile of the case."""
    return None if m.recompiles is None else float(m.recompiles)


@metric("count", "neither")
def compiled_anew(m: Measurement) -> float | None:
    """Graphs that Inductor compiled, and did not take from its cache on disk: 0 in a process after the first."""
    return None if m.compiled_anew is None else float(m.compiled_anew)
