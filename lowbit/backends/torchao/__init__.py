"""torchao: quantized tensors behind an ordinary nn.Linear, swapped in by ``quantize_``."""

from __future__ import annotations

from typing import Any

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

WITHOUT_EXPAND = ("mx_dynamic", "nvfp4_weight_only", "nvfp4_dynamic")
"""Schemes whose tensors have no ``aten.expand``; torch.matmul asks for it where it can't fold x into a matrix."""


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
        if fmt.scheme in WITHOUT_EXPAND and target.name == "lm_head":
            target.linear.register_forward_pre_hook(_with_strides_of_its_own)


def _with_strides_of_its_own(linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A prompt's last row as lm_head gets it, [B, 1, K] with the strides of [B, tokens, K], as a tensor to be folded.
    ``contiguous()`` leaves it as it is for B = 1, where no stride but the last says anything."""
    return args[0].clone(memory_format=torch.contiguous_format), *args[1:]


def is_quantized(module: nn.Module) -> bool:
    """True for a linear whose weight is one of torchao's tensors: it leaves what it can't do as a plain parameter."""
    base = quiet_import("torchao.utils").TorchAOBaseTensor
    nf4 = quiet_import("torchao.quantization").NF4Tensor
    return isinstance(module, nn.Linear) and isinstance(module.weight, base | nf4)
