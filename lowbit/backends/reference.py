"""lowbit's own formats in plain PyTorch (``lowbit.reference``): right on every device, fast on none.

6-bit floats have no other home since torchao dropped FPx, and int4, ternary and binary products of low-bit
activations have no kernel in any library here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.backends import indivisible, targets
from lowbit.errors import LowbitError, unknown
from lowbit.formats import Format, Unmet
from lowbit.reference.linear import ReferenceLinear
from lowbit.reference.scheme import SCHEMES, Scheme

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("torch",)


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """Whole bytes: K in multiples of the codes that share some."""
    return indivisible(fmt, config, _scheme(fmt).multiple, "whole bytes of codes:")


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Replace the target linears inside ``module``, in the dtype and on the device where they are.

    Raises LowbitError for weights that hold NaN or Inf, or are of another type.
    """
    _scheme(fmt)
    for target in targets(module, fmt):
        if target.linear.weight.dtype != dtype:
            raise LowbitError(f"{fmt.id} expects {target.name} in {dtype}, got {target.linear.weight.dtype}")
        target.replace(ReferenceLinear(target.linear, fmt.scheme, fmt.group_size))


def is_quantized(module: nn.Module) -> bool:
    """True for a module of this backend; it can't be made without its packed weight."""
    return isinstance(module, ReferenceLinear)


def dequantize(module: nn.Module) -> Tensor:
    """What the stored weight of a linear of this backend stands for: [N, K] fp32."""
    return _own(module).dequantize()


def quantize_activations(module: nn.Module, x: Tensor) -> Tensor:
    """What of x [..., K] enters the product, in x's type."""
    return _own(module).quantize_activations(x)


def _scheme(fmt: Format) -> Scheme:
    if fmt.scheme not in SCHEMES:
        raise unknown("reference scheme", fmt.scheme, SCHEMES)
    return SCHEMES[fmt.scheme]


def _own(module: nn.Module) -> ReferenceLinear:
    if not isinstance(module, ReferenceLinear):
        raise LowbitError(f"expected a linear of the reference backend, got a {type(module).__name__}")
    return module
