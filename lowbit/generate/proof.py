"""What a decoder proves before it is timed: finite logits; native kernels whose logits are those of the modules."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.runner import NativeStep

NATIVE_BOUNDS = {torch.float16: 2.0**-5, torch.bfloat16: 2.0**-3}
"""||difference|| / ||logits|| between native and eager, whose residual stream is in 16 bits: 7e-3 and 5e-2 were seen in
a step on 8B's shape with dummy weights."""


def prove(native: NativeStep, expected: Tensor, source: str, what: str) -> None:
    """LowbitError unless the last native logits are ``expected`` [B · V] fp64, the modules', as far as the
    dtype explains, for every sequence.

    ``source`` is the case, ``what`` was run: a step or a prefill.
    """
    of_each = expected.view(-1, native.logits.shape[-1])
    difference = native.logits.double().view_as(of_each) - of_each
    error = float((difference.norm(dim=-1) / of_each.norm(dim=-1)).max())
    bound = NATIVE_BOUNDS[native.shape.dtype]
    if not error <= bound:
        raise LowbitError(
            f"{source}: the native {what}'s logits should be those of the eager {what} within {bound:g}, they differ "
            f"by {error:.2e} (||difference|| / ||logits||): its kernels are wrong on this device; use mode eager "
            "and report it"
        )


def check_finite(values: Tensor, source: str) -> None:
    """Raise LowbitError unless all ``values`` (logits, or what follows from them) are finite. Waits for the device."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise LowbitError(
            f"NaN/Inf logits from {source}: expected finite values, got {bad} of {values.numel()} that are not; "
            "the format overflows in this dtype or its kernel is broken here: leave it out with -k, or try another "
            "base dtype or library version; where every format fails, the checkpoint itself holds NaN or Inf"
        )
