"""The unquantized rows: plain casts. The model is built in the row's dtype, so there is nothing left to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.backends import kv_requirement, targets
from lowbit.errors import LowbitError
from lowbit.formats import Format, Unmet

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("torch",)


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """What its KV cache asks for."""
    return kv_requirement(fmt, device, config)


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Check that the linears are plain and in the row's dtype. Raises LowbitError if one is not."""
    for target in targets(module, fmt):
        if target.linear.weight.dtype != dtype:
            raise LowbitError(f"{fmt.id} expects {target.name} in {dtype}, got {target.linear.weight.dtype}")


def is_quantized(module: nn.Module) -> bool:
    """True for an untouched linear: what "quantized" means for a row that only casts."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.is_floating_point()


def dequantize(module: nn.Module) -> torch.Tensor:
    """The weights, [n, k] fp32: nothing was quantized."""
    return module.get_parameter("weight").detach().float()


def dequantize_blocks(module: nn.Module, size: int) -> Iterator[torch.Tensor]:
    """The same, some rows of about ``size`` weights after the other."""
    weight = module.get_parameter("weight").detach()
    for part in torch.split(weight, max(1, size // weight.shape[1])):
        yield part.float()
