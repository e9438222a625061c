"""Codes of 1 to 8 bits in bytes, little-endian: value 0 in the lowest bits of byte 0; 3 bits may straddle two bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _block(bits: int) -> tuple[int, int, torch.dtype]:
    """Values and bytes of the smallest whole number of bytes, and an integer type that holds them."""
    size = math.lcm(bits, 8) // 8
    return 8 * size // bits, size, torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64


def split(tensor: Tensor, size: int) -> Tensor:
    """[..., m] -> [..., m / size, size]."""
    return tensor.reshape(*tensor.shape[:-1], tensor.shape[-1] // size, size)


def pack(values: Tensor, bits: int) -> Tensor:
    """Codes of 1 to 8 bits, one per uint8, [..., k] -> [..., k·bits/8] uint8, little-endian."""
    if bits == 8:
        return values.contiguous()
    count, size, dtype = _block(bits)
    blocks = split(values, count)
    word = blocks[..., 0].to(dtype)
    for index in range(1, count):
        word = word | (blocks[..., index].to(dtype) << (bits * index))
    if size == 1:
        return word
    return torch.stack([((word >> (8 * index)) & 255).to(torch.uint8) for index in range(size)], -1).flatten(-2)


def unpack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack``: [..., k·bits/8] uint8 -> [..., k] uint8."""
    if bits == 8:
        return codes
    count, size, dtype = _block(bits)
    word = codes
    if size > 1:
        parts = split(codes, size)
        word = parts[..., 0].to(dtype)
        for index in range(1, size):
            word = word | (parts[..., index].to(dtype) << (8 * index))
    mask = (1 << bits) - 1
    return torch.stack([((word >> (bits * index)) & mask).to(torch.uint8) for index in range(count)], -1).flatten(-2)
