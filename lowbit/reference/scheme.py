"""Schemes: how a weight is stored, what it stands for, and what an activation becomes before it meets it.

A weight is ``packed`` [N, B] uint8 and ``scale`` (E8M0 bytes, or numbers in the model's type); K goes without saying in
neither, so ``decode`` is given it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.reference import integer, packing
from lowbit.reference.minifloat import E2M3, E3M2, Minifloat, e8m0, mx_round, mx_scale

Encode = Callable[[Tensor, int, torch.dtype], tuple[Tensor, Tensor]]
"""(weight [N, K] fp32, group size, the scale's type) -> packed [N, B] uint8, scale."""

Decode = Callable[[Tensor, Tensor, int], Tensor]
"""(packed, scale, K) -> [N, K] fp32."""

Activations = Callable[[Tensor, int], Tensor]
"""(x [..., K] fp32, group size) -> what is left of it, [..., K] fp32. Scales stay fp32: they are stored nowhere, and
Inductor leaves a rounding to 16 bits and back out."""


@dataclass(frozen=True)
class Scheme:
    """One way to store a weight. ``activations`` is None where they stay as they are. K must be a multiple of
    ``multiple``: the codes that share bytes, or a block."""

    encode: Encode
    decode: Decode
    multiple: int
    activations: Activations | None = None


def _mx(kind: Minifloat, *, activations: bool) -> Scheme:
    """MXFP6 of the OCP specification: a byte of scale for every block along K, 6.25 bits in blocks of 32."""

    def encode(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        blocks = packing.groups_of(weight, group)
        scale = mx_scale(blocks, kind)
        codes = kind.encode(kind.round(blocks / e8m0(scale)))
        return packing.pack6(codes.flatten(-2)), scale.squeeze(-1)

    def decode(packed: Tensor, scale: Tensor, columns: int) -> Tensor:
        blocks = packing.groups_of(kind.decode(packing.unpack6(packed)), columns // scale.shape[-1])
        return (blocks * e8m0(scale)[..., None]).flatten(-2)

    def round_activations(x: Tensor, group: int) -> Tensor:
        return mx_round(x, kind, group)

    return Scheme(encode, decode, 4, round_activations if activations else None)


def _fp6_row(kind: Minifloat) -> Scheme:
    """One scale per output channel, largest magnitude / largest number: FP6-LLM (Xia et al. 2024, arXiv 2401.14112)."""

    def encode(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = (weight.abs().amax(-1, keepdim=True) / kind.max).to(dtype)
        values = torch.where(scale == 0, 0.0, weight / scale.float())
        return packing.pack6(kind.encode(kind.round(values))), scale

    def decode(packed: Tensor, scale: Tensor, columns: int) -> Tensor:
        return kind.decode(packing.unpack6(packed)) * scale.float()

    return Scheme(encode, decode, 4)


def _int4_encode(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scale = integer.int4(packing.groups_of(weight, group), dtype)
    return packing.pack4((codes + 8).to(torch.uint8).flatten(-2)), scale.squeeze(-1).to(dtype)


def _int4_decode(packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    groups = packing.groups_of(packing.unpack4(packed).float() - 8, columns // scale.shape[-1])
    return (groups * scale.float()[..., None]).flatten(-2)


def _int4_activations(x: Tensor, group: int) -> Tensor:
    codes, scale = integer.int4(packing.groups_of(x, group), torch.float32)
    return (codes * scale).flatten(-2)


def _ternary_encode(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scale = integer.ternary(weight, dtype, (-2, -1))
    return packing.pack_trits((codes + 1).to(torch.uint8)), scale.to(dtype)


def _ternary_decode(packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    return (packing.unpack_trits(packed, columns).float() - 1) * scale.float()


def _ternary_activations(x: Tensor, group: int) -> Tensor:
    codes, scale = integer.ternary(x, torch.float32)
    return codes * scale


def _binary_encode(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scale = integer.binary(weight, dtype)
    return packing.pack1((codes > 0).to(torch.uint8)), scale.to(dtype)


def _binary_decode(packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    return (2 * packing.unpack1(packed).float() - 1) * scale.float()


def _binary_activations(x: Tensor, group: int) -> Tensor:
    codes, scale = integer.binary(x, torch.float32)
    return codes * scale


SCHEMES: dict[str, Scheme] = {
    "mxfp6_e3m2": _mx(E3M2, activations=False),
    "mxfp6_e2m3": _mx(E2M3, activations=False),
    "mxfp6_e3m2_dynamic": _mx(E3M2, activations=True),
    "mxfp6_e2m3_dynamic": _mx(E2M3, activations=True),
    "fp6_e3m2_row": _fp6_row(E3M2),
    "fp6_e2m3_row": _fp6_row(E2M3),
    "int4_dynamic": Scheme(_int4_encode, _int4_decode, 2, _int4_activations),
    "ternary_dynamic": Scheme(_ternary_encode, _ternary_decode, 1, _ternary_activations),
    "binary_dynamic": Scheme(_binary_encode, _binary_decode, 8, _binary_activations),
}
