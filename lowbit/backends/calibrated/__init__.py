"""Formats whose weights are fitted to a text: GPTQ, stored and multiplied as lowbit's own formats, and torchao's AWQ.

``calibrate`` does the work, layer by layer, and leaves the finished module with each linear; ``quantize`` puts it in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.backends import get, targets
from lowbit.backends.calibrated import awq, gptq_linears
from lowbit.backends.calibrated.layers import Walk
from lowbit.errors import LowbitError, unknown
from lowbit.formats import Format, Unmet
from lowbit.kernels.modules import NativeLinear

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("torch",)

FINISHED = "calibrated_module"
"""The attribute of a linear under which its successor waits."""

METHODS = {"gptq": gptq_linears.finish, "awq": awq.finish}
"""Scheme -> (layer's targets, walk, layer, row) -> what takes each target's place, in their order."""


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """What the library that stores and multiplies the weights needs."""
    stored = replace(fmt, scheme=fmt.options["stored_as"])
    return get("lowbit" if fmt.scheme == "gptq" else "torchao").requirement(stored, device, config)


@torch.no_grad()
def calibrate(model: Any, fmt: Format, tokens: Tensor) -> None:
    """Fit every layer to ``tokens`` [windows, window], the first one first; 16-bit weights are freed on the way."""
    if fmt.scheme not in METHODS:
        raise unknown("calibrated scheme", fmt.scheme, METHODS)
    walk = Walk(model, tokens)
    for layer in model.model.layers:
        found = list(targets(layer, fmt))
        finished = METHODS[fmt.scheme](found, walk, layer, fmt)
        for target, module in zip(found, finished, strict=True):
            target.replace(module)
        walk.advance(layer)
        for target, module in zip(found, finished, strict=True):
            weight = target.linear.weight
            target.linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
            target.linear.register_module(FINISHED, module)
            target.replace(target.linear)


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Put in what ``calibrate`` has made. Raises LowbitError for linears that it has not seen."""
    for target in list(targets(module, fmt)):
        finished = target.linear._modules.get(FINISHED)
        if finished is None:
            raise LowbitError(f"{fmt.id}: {target.name} was not calibrated: give build() tokens")
        target.replace(finished)


def is_quantized(module: nn.Module) -> bool:
    """True for a packed linear of lowbit's, or one with a tensor of torchao's."""
    return isinstance(module, NativeLinear) or get("torchao").is_quantized(module)


def dequantize(module: nn.Module) -> Tensor:
    """What the stored weight stands for, [n, k] fp32; AWQ's scale of each input is part of it."""
    if isinstance(module, NativeLinear):
        return module.dequantize()
    return awq.dequantize(module)
