"""bitsandbytes: LLM.int8, 4-bit NormalFloat and 4-bit float, as modules of its own that take the linear's place.

Weights are quantized where they lie. The usual way, ``module.to("cuda")`` from the host, took 42 s for an 8B model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.backends import indivisible, minimum_sm, targets
from lowbit.errors import unknown
from lowbit.formats import Format, Unmet
from lowbit.quiet import quiet_import

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("bitsandbytes",)

FOUR_BIT = ("nf4", "fp4")


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """Compute capability by scheme; int8 products on a GPU take K in multiples of 4."""
    if fmt.scheme in FOUR_BIT:
        return minimum_sm(device, (6, 0), "4-bit kernels")
    return minimum_sm(device, (7, 5), "int8 tensor cores") or indivisible(fmt, config, 4, "int8 step")


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Replace the target linears inside ``module``; ``dtype`` is what 4-bit products are computed in.

    Each new module is called once with zeros. Its first call ends the quantization: LLM.int8 moves its weight into a
    state object, and on CPUs with AVX512-BF16 4-bit weights are packed again; later, compiled calls must not.
    """
    bnb = quiet_import("bitsandbytes")
    for target in targets(module, fmt):
        if fmt.scheme in FOUR_BIT:
            new = _four_bit(bnb, target.linear, fmt, dtype)
        elif fmt.scheme == "llm_int8":
            new = _int8(bnb, target.linear, fmt)
        else:
            raise unknown("bitsandbytes scheme", fmt.scheme, (*FOUR_BIT, "llm_int8"))
        new.bias = target.linear.bias
        target.replace(new)
        with torch.no_grad():
            new(torch.zeros(1, target.linear.in_features, dtype=dtype, device=target.linear.weight.device))


def _four_bit(bnb: Any, linear: nn.Linear, fmt: Format, dtype: torch.dtype) -> nn.Module:
    # compute_dtype must be said: its default, fp32, is slow and says so only once
    new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta")
    new.weight = bnb.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        quant_type=fmt.scheme,
        blocksize=fmt.group_size,
        compress_statistics=bool(fmt.options.get("double_quant", False)),
        module=new,
    ).to(linear.weight.device)
    module: nn.Module = new
    return module


def _int8(bnb: Any, linear: nn.Linear, fmt: Format) -> nn.Module:
    threshold = fmt.options.get("threshold", 0.0)
    new = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
    )
    # Int8Params.to() quantizes on the way from the host only: here the weight is on the device already
    weight, scales, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data.to(torch.float16))
    new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)
    module: nn.Module = new
    return module


def is_quantized(module: nn.Module) -> bool:
    """True for a module of bitsandbytes whose weight really is in its low-bit form."""
    bnb = quiet_import("bitsandbytes")
    if isinstance(module, bnb.nn.Linear4bit):
        return bool(module.weight.bnb_quantized) and module.weight.quant_state is not None
    return isinstance(module, bnb.nn.Linear8bitLt) and module.weight.dtype == torch.int8


def dequantize(module: Any) -> Tensor:
    """The weight [out, in] fp32 that the products of ``module`` are taken with."""
    bnb = quiet_import("bitsandbytes")
    if isinstance(module, bnb.nn.Linear8bitLt):
        values, scales = _codes_and_scales(module)
        return values.float() * scales.float().unsqueeze(1) / 127
    data, state = module.weight.data, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return _unpack_for_cpu(data, state)
    weight: Tensor = bnb.functional.dequantize_4bit(data, state)
    return weight.float().view(tuple(state.shape))


def _codes_and_scales(module: Any) -> tuple[Tensor, Tensor]:
    # the first call moves them from the parameter to the state
    state = module.state if module.state.CB is not None else module.weight
    return state.CB, state.SCB


def _unpack_for_cpu(data: Tensor, state: Any) -> Tensor:
    """The 4-bit weight as AVX512-BF16 processors hold it (bitsandbytes 0.50.2, _convert_weight_packed_for_cpu).

    Rows are packed 32 together, [n / 32, k / 2, 32] bytes: of each 64 codes of 32 rows and 2 columns the first 32 are
    the low nibbles, the rest the high ones. Scales are [k / block, n] bf16.
    """
    n, k = state.shape
    packed = data.view(-1, 32)
    codes = torch.cat([packed & 0xF, packed >> 4], dim=1).view(n // 32, k // 2, 32, 2).transpose(1, 2).reshape(n, k)
    scales = state.absmax.T.float().repeat_interleave(state.blocksize, dim=1)
    weight: Tensor = state.code.float()[codes.int()] * scales
    return weight


def quantize_activations(module: Any, x: Tensor) -> Tensor:
    """What LLM.int8 multiplies instead of ``x`` [m, in], fp32: int8 per row, columns with an outlier in 16 bits."""
    bnb = quiet_import("bitsandbytes")
    half = x.to(torch.float16)
    values, scales, outliers = bnb.functional.int8_vectorwise_quant(half.clone(), threshold=module.state.threshold)
    used: Tensor = values.float() * scales.float().unsqueeze(1) / 127
    if outliers is not None and outliers.numel():
        used[:, outliers.long()] = x[:, outliers.long()].float()
    return used
