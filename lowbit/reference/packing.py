"""Small codes in whole bytes, without gaps: [..., K] of one code per byte to [..., K × bits / 8] uint8 and back.

The first of the codes that share bytes takes the lowest bits, as in the OCP Microscaling and GPTQ layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError

TRITS = 5
"""Ternary digits per byte: 3**5 = 243 of its 256 values, 1.6 bits each."""


def pack6(codes: Tensor) -> Tensor:
    """Four 6-bit codes in three bytes. codes: [..., K] uint8 below 64, K a multiple of 4 -> [..., K * 3 / 4] uint8."""
    a, b, c, d = _grouped(codes, 4, "6-bit codes").unbind(-1)
    return torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), dim=-1).flatten(-2)


def unpack6(packed: Tensor) -> Tensor:
    """The inverse of ``pack6``: [..., B] uint8, B a multiple of 3 -> [..., B * 4 / 3] uint8."""
    low, middle, high = _grouped(packed, 3, "packed 6-bit codes").unbind(-1)
    a, b = low & 63, low >> 6 | (middle & 15) << 2
    c, d = middle >> 4 | (high & 3) << 4, high >> 2
    return torch.stack((a, b, c, d), dim=-1).flatten(-2)


def pack4(codes: Tensor) -> Tensor:
    """Two 4-bit codes in a byte. codes: [..., K] uint8 below 16, K even -> [..., K / 2] uint8."""
    low, high = _grouped(codes, 2, "4-bit codes").unbind(-1)
    return low | high << 4


def unpack4(packed: Tensor) -> Tensor:
    """The inverse of ``pack4``: [..., B] uint8 -> [..., 2 * B] uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack1(codes: Tensor) -> Tensor:
    """Eight 1-bit codes in a byte. codes: [..., K] uint8 of 0 and 1, K a multiple of 8 -> [..., K / 8] uint8."""
    bits = _grouped(codes, 8, "1-bit codes").unbind(-1)
    packed = bits[0]
    for place in range(1, 8):
        packed = packed | bits[place] << place
    return packed


def unpack1(packed: Tensor) -> Tensor:
    """The inverse of ``pack1``: [..., B] uint8 -> [..., 8 * B] uint8."""
    return torch.stack([packed >> place & 1 for place in range(8)], dim=-1).flatten(-2)


def pack_trits(codes: Tensor) -> Tensor:
    """Five ternary digits in a byte, the last ones filled up with 0. codes: [..., K] uint8 of 0, 1 and 2."""
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TRITS))
    packed = torch.zeros_like(filled[..., ::TRITS])
    for place in reversed(range(TRITS)):
        packed = packed * 3 + filled[..., place::TRITS]
    return packed


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """The inverse of ``pack_trits``: [..., ceil(count / 5)] uint8 -> [..., count] uint8."""
    digits = [packed // 3**place % 3 for place in range(TRITS)]
    return torch.stack(digits, dim=-1).flatten(-2)[..., :count]


def groups_of(x: Tensor, size: int) -> Tensor:
    """[..., K] -> [..., K / size, size]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _grouped(codes: Tensor, of: int, what: str) -> Tensor:
    if codes.shape[-1] % of:
        raise LowbitError(f"{what} come in groups of {of}: got a last dimension of {codes.shape[-1]}")
    return groups_of(codes, of)
