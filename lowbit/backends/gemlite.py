"""gemlite: Triton kernels for packed weights, one module per linear. CUDA only: its import asks for the GPU.

Its kernels tune themselves at the first call for each (tokens, N, K): what is called before a measurement or a graph
capture must have the same number of tokens. It ships tuned configurations for some GPUs by name (no H200 among them);
``compilers.configure_caches`` has Triton keep what is found here on disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.backends import indivisible, minimum_sm, missing_package, targets
from lowbit.errors import LowbitError, unknown
from lowbit.formats import Format, Unmet
from lowbit.quiet import quiet_import

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("gemlite", "triton")

MIN_SIZE = 32  # GemLiteLinearTriton.MIN_SIZE: K must be a multiple


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """hqq for its rows, SM89 for fp8, K in multiples of 32."""
    if "HQQ" in fmt.scheme and (reason := missing_package(("hqq",))):
        return reason
    if "FP8" in fmt.scheme and (reason := minimum_sm(device, (8, 9), "fp8")):
        return reason
    return minimum_sm(device, (7, 5), "Triton") or indivisible(fmt, config, MIN_SIZE, "gemlite's step")


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Replace the target linears inside ``module`` by gemlite's, packed on the device where they are.

    ``Format.scheme`` is the name of a processor in gemlite.helper. Those with HQQ in it take hqq's own quantized
    linear (axis 1, ``group_size``); the others take the linear and drop its weight.
    """
    found = list(targets(module, fmt))
    if not found:
        return
    helper = quiet_import("gemlite.helper")
    if not hasattr(helper, fmt.scheme):
        raise unknown("gemlite processor", fmt.scheme, [name for name in dir(helper) if name.startswith("A")])
    for target in found:
        weight = target.linear.weight
        if weight.dtype != dtype:
            raise LowbitError(f"{fmt.id} expects {target.name} in {dtype}, got {weight.dtype}")
        processor = getattr(helper, fmt.scheme)(device=str(weight.device), dtype=dtype)
        if hasattr(processor, "from_hqqlinear"):
            new = processor.from_hqqlinear(_hqq(target.linear, fmt, dtype))
        else:
            new = processor.from_linear(target.linear, del_orig=True)
        target.replace(new)


def _hqq(linear: nn.Linear, fmt: Format, dtype: torch.dtype) -> Any:
    hqq = quiet_import("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=int(fmt.weight_bits), group_size=fmt.group_size, axis=1)
    return hqq.HQQLinear(linear, quant_config=config, compute_dtype=dtype, device=str(linear.weight.device))


def is_quantized(module: nn.Module) -> bool:
    """True for gemlite's linear with packed weights in it. By name: importing gemlite fails without a GPU."""
    if type(module).__name__ != "GemLiteLinearTriton":
        return False
    packed = getattr(module, "W_q", None)
    return packed is not None and packed.numel() > 0
