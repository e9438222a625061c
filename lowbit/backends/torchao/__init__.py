"""torchao: quantized tensors behind an ordinary nn.Linear, swapped in by ``quantize_``."""

from __future__ import annotations

import torch
from torch import nn

from lowbit.backends import targets
from lowbit.backends.torchao.configs import make
from lowbit.backends.torchao.needs import also_needs, requirement
from lowbit.backends.torchao.static import AMAX, calibrate
from lowbit.backends.torchao.unpacking import dequantize, dequantize_blocks, quantize_activations
from lowbit.formats import Format
from lowbit.quiet import quiet_import

__all__ = [
    "PACKAGES",
    "also_needs",
    "calibrate",
    "dequantize",
    "dequantize_blocks",
    "is_quantized",
    "quantize",
    "quantize_activations",
    "requirement",
]

PACKAGES: tuple[str, ...] = ("torchao",)


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Swap the weights of the target linears inside ``module``, in place, on the device where they are.

    A linear that ``calibrate`` was asked about takes its activations by the scale found there.
    """
    for target in list(targets(module, fmt)):
        config = make(fmt, target.linear)
        quiet_import("torchao.quantization").quantize_(
            target.linear, config, filter_fn=lambda linear, name: isinstance(linear, nn.Linear)
        )
        if hasattr(target.linear, AMAX):
            delattr(target.linear, AMAX)


def is_quantized(module: nn.Module) -> bool:
    """True for a linear whose weight is one of torchao's tensors: it leaves what it can't do as a plain parameter."""
    base = quiet_import("torchao.utils").TorchAOBaseTensor
    nf4 = quiet_import("torchao.quantization").NF4Tensor
    return isinstance(module, nn.Linear) and isinstance(module.weight, base | nf4)
