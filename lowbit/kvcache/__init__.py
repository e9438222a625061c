"""KV caches that hold int8, fp8 or int4 codes with scales per head and token, behind transformers' static cache.

A layer's ``update`` quantizes the new keys and values, writes them in place and hands out everything that the cache
holds, dequantized: attention itself works in 16 bits. That is the reference path. It saves memory, not time: a step
reads the codes, writes them out in 16 bits and reads those, unless a compiler fuses the first two. Shapes and addresses
are static, so the step can be compiled and replayed as one CUDA graph.

Per head and token, over its head_dim numbers x:

    int8   code = round(x / s) in -127..127, s = max|x| / 127                 Jacob et al. 2018 (arXiv 1712.05877)
    fp8    code = e4m3(x / s), s = max|x| / 448                               e4m3: OCP 8-bit Floating Point, rev 1.0
    fp8_attn  as fp8; attention multiplies the codes themselves (lowbit/attention.py)
    int4   code = round((x - z) / s) in 0..15, s = (max - min) / 15, z = min  asymmetric, as in KIVI (arXiv 2402.02750)

with s and z in fp16; codes are taken for the s that was stored, so its rounding costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import unknown
from lowbit.formats.row import KV_FORMATS

SMALLEST = 2.0**-24
"""The smallest fp16 above zero: the scale of a row of zeros."""
E4M3_MAX = 448.0


def encode(name: str, x: Tensor) -> tuple[Tensor, ...]:
    """x [..., D] -> codes [..., D] (int4: [..., D/2], two in a byte), scale [..., 1] fp16, int4 also zero [..., 1]."""
    x = x.float()
    match name:
        case "int8":
            scale = _half(x.abs().amax(-1, keepdim=True) / 127)
            return (x / scale.float()).round().clamp(-127, 127).to(torch.int8), scale
        case "fp8" | "fp8_attn":
            scale = _half(x.abs().amax(-1, keepdim=True) / E4M3_MAX)
            codes = (x / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8), scale  # index_copy_ knows no fp8
        case "int4":
            low = x.amin(-1, keepdim=True).half()
            scale = _half((x.amax(-1, keepdim=True) - low.float()) / 15)
            codes = ((x - low.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
            first, second = codes.chunk(2, dim=-1)
            return first | second << 4, scale, low
    raise unknown("KV cache format", name, KV_FORMATS)


def decode(name: str, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """What ``encode`` made of x, as numbers again: [..., D] in ``dtype``, computed in fp32."""
    codes, scale = parts[0], parts[1].float()
    match name:
        case "int8":
            return (codes.float() * scale).to(dtype)
        case "fp8" | "fp8_attn":
            return (codes.view(torch.float8_e4m3fn).float() * scale).to(dtype)
        case "int4":
            wide = torch.cat([codes & 15, codes >> 4], dim=-1).float()
            return (wide * scale + parts[2].float()).to(dtype)
    raise unknown("KV cache format", name, KV_FORMATS)


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(min=SMALLEST).half()


def pack(cache: Any, name: str) -> None:
    """Replace the layers of a static cache that has no memory yet. Raises LowbitError on an unknown format."""
    if name not in KV_FORMATS:
        raise unknown("KV cache format", name, KV_FORMATS)
    from lowbit.kvcache.layer import PackedLayer  # imports transformers

    cache.layers = [PackedLayer(name, layer.max_cache_len) for layer in cache.layers]


def bytes_per_token(cache: Any) -> float:
    """What one position of one sequence takes in all layers, with its scales: counted from the cache's tensors."""
    total = 0.0
    for layer in cache.layers:
        held = [tensor for tensor in vars(layer).values() if isinstance(tensor, Tensor) and tensor.dim() == 4]
        total += sum(tensor.nbytes / (tensor.shape[0] * tensor.shape[2]) for tensor in held)
    return total
