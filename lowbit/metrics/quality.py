"""Quality against the base model on a text, the kernels against their own weights, the size of a checkpoint."""

from __future__ import annotations

from lowbit.metrics.measurement import Measurement
from lowbit.metrics.row import Limit, metric


@metric("", "lower", Limit(relative=0.001), ("quality",))
def ppl(m: Measurement) -> float | None:
    """Token perplexity in non-overlapping windows; stored as ppl_<protocol>."""
    return m.quality.ppl if m.quality else None


@metric("nat", "lower", Limit(relative=0.05, absolute=1e-6), ("quality",))
def kld(m: Measurement) -> float | None:
    """Mean KL divergence of bf16's next-token distribution from this format's; stored as kld_<protocol>_<n>tok."""
    return m.quality.kld if m.quality else None


@metric("share", "higher", kinds=("quality",))
def top1(m: Measurement) -> float | None:
    """Share of positions where the arg max equals bf16's; stored as top1_<protocol>_<n>tok."""
    return m.quality.top1 if m.quality else None


@metric("nat", "lower", kinds=("quality",))
def ln_ppl_ratio(m: Measurement) -> float | None:
    """Paired ln(PPL / PPL of bf16); stored as ln_ppl_ratio_<protocol>."""
    return m.quality.ln_ppl_ratio if m.quality else None


@metric("MB", "lower", Limit(relative=1e-9), ("quality",))
def checkpoint_mb(m: Measurement) -> float | None:
    """Bytes of the quantized model's state as safetensors would hold them, in 10^6 bytes."""
    return None if m.checkpoint_bytes is None else m.checkpoint_bytes / 1e6


@metric("ratio", "lower", Limit(relative=0.50, absolute=1e-4), ("quality",))
def kernel_rel_error(m: Measurement) -> float | None:
    """Largest relative error of a row of a linear's output against the product with the format's own weights.

    Of one linear of each kind (lowbit/truth.py). Beyond the compute dtype's bound the case fails by itself; the limit
    here tells an upgrade that rounds more often.
    """
    return m.kernel_error


PROTOCOL_METRICS = ("ppl", "kld", "top1", "ln_ppl_ratio")
