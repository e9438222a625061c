"""The unquantized rows: plain casts. The model is built in the row's dtype, so there is nothing left to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.backends import minimum_sm, targets
from lowbit.errors import LowbitError
from lowbit.formats import Format, Unmet

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("torch",)

NO_FP8_ATTENTION = (
    "needs fp8 attention over a static KV cache, which torch does not have: its quantized SDPA "
    "(torch.nn.attention.experimental, 2.13) needs Flash Attention 3 (flash_attn_interface, no wheel on PyPI) and "
    "takes neither a mask nor key lengths; flex_attention gives its output in the inputs' fp8, without a scale"
)


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """SM89 for fp8; nothing that torch has for attention in fp8 (see NO_FP8_ATTENTION)."""
    if fmt.kv == "fp8":
        return minimum_sm(device, (8, 9), "fp8 e4m3 in Triton")
    if fmt.options.get("attention") == "fp8":
        return minimum_sm(device, (9, 0), "fp8 attention") or Unmet("capability", NO_FP8_ATTENTION)
    return None


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
    weight: torch.Tensor = module.get_parameter("weight")
    return weight.detach().float()
