"""KV caches that hold int8, fp8 or int4 codes with scales per head and token, behind transformers' static cache.

A layer's ``update`` quantizes the new keys and values, writes them in place and hands out everything that the cache
holds, dequantized: attention itself works in 16 bits. That is the reference path. It saves memory, not time: a step
reads the codes, writes them out in 16 bits and reads those, unless a compiler fuses the first two. Shapes and addresses
are static, so the step can be compiled and replayed as one CUDA graph.

Per head and token, over its head_dim numbers x:

    int8   code = round(x / s) in -127..127, s = max|x| / 127                 Jacob et al. 2018 (arXiv 1712.05877)
    fp8    code = e4m3(x / s), s = max|x| / 448                               e4m3: OCP 8-bit Floating Point, rev 1.0
    int4   code = round((x - z) / s) in 0..15, s = (max - min) / 15, z = min  asymmetric, as in KIVI (arXiv 2402.02750)

with s and z in fp16; codes are taken for the s that was stored, so its rounding costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import unknown
from lowbit.formats.row import KV_FORMATS
from lowbit.quiet import quiet_import

cache_utils: Any = quiet_import("transformers.cache_utils")

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
        case "fp8":
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
        case "fp8":
            return (codes.view(torch.float8_e4m3fn).float() * scale).to(dtype)
        case "int4":
            wide = torch.cat([codes & 15, codes >> 4], dim=-1).float()
            return (wide * scale + parts[2].float()).to(dtype)
    raise unknown("KV cache format", name, KV_FORMATS)


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(min=SMALLEST).half()


class PackedLayer(cache_utils.StaticLayer):  # type: ignore[misc]  # transformers is untyped to us
    """One layer's static cache. Each part of ``encode`` is a tensor [batch, kv_heads, max_cache_len, …] of its own."""

    def __init__(self, name: str, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.name = name
        self.cumulative_length: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states like these: [batch, kv_heads, any, head_dim]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.cumulative_length = self.cumulative_length.to(self.device)
        for side, states in (("key", key_states), ("value", value_states)):
            like = encode(self.name, states.new_zeros(1, 1, 1, states.shape[-1]))
            for part, tensor in zip(_part_names(side), like, strict=False):
                shape = (self.batch_size, self.num_heads, self.max_cache_len, tensor.shape[-1])
                setattr(self, part, torch.zeros(shape, dtype=tensor.dtype, device=self.device))
        if not torch.compiler.is_compiling():
            for tensor in [*_stored(self, "key"), *_stored(self, "value"), self.cumulative_length]:
                torch._dynamo.mark_static_address(tensor)  # else no CUDA graph: they are written in place
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in the states of S more tokens, [B, H, S, D] -> all keys and values, [B, H, max_cache_len, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        positions = torch.arange(tokens, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(tokens)
        found = []
        for side, states in (("key", key_states), ("value", value_states)):
            stored = _stored(self, side)
            for tensor, new in zip(stored, encode(self.name, states), strict=True):
                tensor.index_copy_(2, positions, new)
            found.append(decode(self.name, stored, self.dtype))
        return found[0], found[1]


def _part_names(side: str) -> tuple[str, str, str]:
    return f"{side}s", f"{side}_scale", f"{side}_zero"  # ``keys`` and ``values`` are the codes: others look there


def _stored(layer: Any, side: str) -> tuple[Tensor, ...]:
    return tuple(getattr(layer, name) for name in _part_names(side) if hasattr(layer, name))


def pack(cache: Any, name: str) -> None:
    """Replace the layers of a static cache that has no memory yet. Raises LowbitError on an unknown format."""
    if name not in KV_FORMATS:
        raise unknown("KV cache format", name, KV_FORMATS)
    cache.layers = [PackedLayer(name, layer.max_cache_len) for layer in cache.layers]


def bytes_per_token(cache: Any) -> float:
    """What one position of one sequence takes in all layers, with its scales: counted from the cache's tensors."""
    total = 0.0
    for layer in cache.layers:
        held = [tensor for tensor in vars(layer).values() if isinstance(tensor, Tensor) and tensor.dim() == 4]
        total += sum(tensor.nbytes / (tensor.shape[0] * tensor.shape[2]) for tensor in held)
    return total
