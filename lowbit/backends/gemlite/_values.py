"""What gemlite's packed modules and quantized activations stand for, in fp32 (gemlite 0.6.0.post2, core.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.backends import NoTruth
from lowbit.quiet import quiet_import

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 16 values of e2m1 by code (OCP MX specification 1.0, table 5)."""

BLOCK = 128
"""triton_kernels/config.py, BLOCK_QUANT_SIZE: weights in blocks of 128 × 128, activations of 128 along K."""


def weight_of(module: Any) -> Tensor:
    """[out, in] fp32. ``W_q`` is stored [in / codes per word, out]; scales [groups, out], of microscaled ones [out,
    groups]."""
    if module.input_dtype.name.startswith(("MX", "NV")):
        return _microscaled(module)
    codes = unpack(module.W_q.data, module.W_nbits, module.elements_per_sample)  # [in, out]
    weight = _grouped(codes, module).float()
    scales: Tensor = module.scales.data.float()
    if module.channel_scale_mode in (1, 3):
        weight = weight * scales.view(1, -1)
    elif module.channel_scale_mode == 5:
        weight = weight * _spread(_spread(scales, 0, BLOCK), 1, BLOCK)[: weight.shape[0], : weight.shape[1]]
    return weight.T.contiguous()


def unpack(packed: Tensor, bits: int, per_word: int) -> Tensor:
    """[k / per_word, n] words -> [k, n] codes, the first in the lowest bits. Not packed: as it is."""
    if per_word == 1:
        return packed
    shifts = (torch.arange(per_word, device=packed.device) * bits).view(1, -1, 1)
    codes: Tensor = (packed.long().unsqueeze(1) >> shifts) & (2**bits - 1)
    return codes.flatten(0, 1)


def _grouped(codes: Tensor, module: Any) -> Tensor:
    """Scale and zero point of each group applied in the kernel's own order and dtype (utils.py, dequantize)."""
    scales: Tensor = module.scales.data
    zeros: Tensor = module.zeros.data
    mode = module.W_group_mode
    if mode == 0:
        return codes
    if mode == 1:
        return codes.to(scales.dtype) - _points(zeros, codes.shape[0])
    scale = _spread(scales, 0, codes.shape[0] // scales.shape[0])
    if mode == 2:
        return codes.to(scales.dtype) * scale
    if mode == 3 and zeros.numel() == 1:
        return (codes - zeros).to(scales.dtype) * scale
    if mode == 3:
        return (codes.to(scales.dtype) - _points(zeros, codes.shape[0])) * scale
    if mode == 4:  # fused: rounded once
        return (codes.float() * scale.float() + _points(zeros, codes.shape[0]).float()).to(scales.dtype)
    raise NoTruth(f"gemlite's W_group_mode {mode} is unknown")


def _points(zeros: Tensor, k: int) -> Tensor:
    return zeros if zeros.numel() == 1 else _spread(zeros, 0, k // zeros.shape[0])


def _spread(tensor: Tensor, dim: int, times: int) -> Tensor:
    return tensor.repeat_interleave(times, dim=dim)


def _microscaled(module: Any) -> Tensor:
    scales = module.scales.data
    if scales.dim() != 2:
        raise NoTruth(f"gemlite's scales are shuffled for TMA: {list(scales.shape)}")
    codes = unpack(module.W_q.data, module.W_nbits, module.elements_per_sample).T  # [out, in]
    values = fp4(codes) if module.W_nbits == 4 else codes.float()
    weight = values * _spread(scale_values(scales), 1, values.shape[1] // scales.shape[1])
    if module.input_dtype.name != "NVFP4":
        return weight
    # weight-only keeps the factor of the tensor, the other its inverse (helper.py, A16W4_NVFP and A4W4_NVFP_dynamic)
    factor: Tensor = module.meta_scale.data.float()
    return weight / factor if module.scaled_activations else weight * factor


def fp4(codes: Tensor) -> Tensor:
    """e2m1 codes 0 to 15 -> fp32."""
    return torch.tensor(FP4, device=codes.device)[codes.long()]


def scale_values(scales: Tensor) -> Tensor:
    """e8m0, which gemlite holds as uint8, or e4m3 -> fp32."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def activations_of(module: Any, x: Tensor) -> Tensor:
    """[m, in] fp32: quantized as ``forward_functional`` does by input dtype and scale mode, and back."""
    if not module.scaled_activations:
        return x.float()
    quantizers = quiet_import("gemlite.quant_utils")
    kind, mode = module.input_dtype.name, module.channel_scale_mode
    if kind in ("MXFP4", "NVFP4"):
        found = getattr(quantizers, f"scale_activations_{kind.lower()}")(x)
        four = fp4(_nibbles(found[0]))
        four = four * _rows(scale_values(found[1]), four)
        return four / found[2].float() if kind == "NVFP4" else four
    if kind == "MXFP8" and mode == 4:
        by = quantizers.scale_activations_mxfp8
    else:
        by = quantizers.scale_activations_per_block if mode == 5 else quantizers.scale_activations_per_token
    found = by(x, w_dtype=module.compute_dtype)
    values: Tensor = found[0].float()
    return values * _rows(scale_values(found[1]), values)


def _nibbles(packed: Tensor) -> Tensor:
    """[m, k / 2] -> [m, k], low nibble first."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)


def _rows(scales: Tensor, values: Tensor) -> Tensor:
    """Scales [m or more, groups] spread over the values [m, k]."""
    width = -(-values.shape[1] // scales.shape[1])
    return _spread(scales[: values.shape[0]], 1, width)[:, : values.shape[1]]
