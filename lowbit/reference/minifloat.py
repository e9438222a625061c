"""The 6-bit floats and the E8M0 block scale of the OCP Microscaling Formats (MX) Specification v1.0 (2023).

Section 5.3.2 has FP6 E2M3 and E3M2: sign, exponent, mantissa, subnormals, neither Inf nor NaN. Section 5.4 has E8M0,
a power of two 2**(byte - 127) whose byte 255 is NaN. Section 6.3 converts a block of k = 32 numbers: the scale is
2**(floor(log2(largest magnitude)) - emax of the element type), each number divided by it is rounded to the nearest
element, ties to even, and what lies above the largest element becomes that one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.reference.packing import groups_of

MX_BLOCK = 32
"""Numbers that share a scale (section 5.2, table 1)."""

E8M0_BIAS, E8M0_NAN = 127, 255
_FP32_MANTISSA, _FP32_BIAS = 23, 127


@dataclass(frozen=True)
class Minifloat:
    """A 6-bit float: one sign bit, the rest exponent and mantissa. All arithmetic is exact."""

    name: str
    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        return int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def emax(self) -> int:
        """Exponent of the largest number: no exponent is set aside for Inf and NaN."""
        return int(2**self.exponent_bits) - 1 - self.bias

    @property
    def max(self) -> float:
        """28.0 for E3M2, 7.5 for E2M3."""
        return float(2.0**self.emax * (2 - 2.0**-self.mantissa_bits))

    def round(self, x: Tensor) -> Tensor:
        """Each number's nearest number of this type, ties to even, saturated; NaN stays NaN. x: fp32 -> fp32."""
        exponent = _exponent(x).clamp(1 - self.bias, self.emax)
        step = _power_of_two(exponent - self.mantissa_bits)
        # Dividing and multiplying by a power of two changes no digit, so the only rounding is torch.round's, to even.
        return (torch.round(x / step) * step).clamp(-self.max, self.max)

    def encode(self, values: Tensor) -> Tensor:
        """Codes of numbers of this type. values: fp32, as ``round`` gives them -> uint8 below 64.

        A number is its significand, with the leading 1 of a normal one, times 2**(exponent - mantissa bits). Added to
        the exponent field of the binade below, that 1 makes the field of its own.
        """
        exponent = _exponent(values).clamp(1 - self.bias, self.emax)
        significand = (values.abs() / _power_of_two(exponent - self.mantissa_bits)).to(torch.int32)
        magnitude = (exponent + self.bias - 1 << self.mantissa_bits) + significand
        return (magnitude | torch.signbit(values).to(torch.int32) << 5).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The inverse of ``encode``: uint8 below 64 -> fp32."""
        magnitude = (codes & 31).to(torch.int32)
        exponent = (magnitude >> self.mantissa_bits).clamp(min=1)
        significand = magnitude - (exponent - 1 << self.mantissa_bits)
        sign = 1.0 - 2.0 * (codes >> 5).float()
        return sign * significand.float() * _power_of_two(exponent - self.bias - self.mantissa_bits)


E3M2 = Minifloat("e3m2", 3, 2)
E2M3 = Minifloat("e2m3", 2, 3)


def mx_scale(x: Tensor, kind: Minifloat) -> Tensor:
    """E8M0 bytes of blocks. x: [..., block] fp32 -> [..., 1] uint8.

    A block of zeros gets 2**0. Scales below 2**-126 are not made (smaller blocks become zeros: fp32 itself has only
    subnormals there). A block with NaN or Inf in it gets the NaN scale, as the specification lets one do for both.
    """
    largest = x.abs().amax(-1, keepdim=True)
    shared = (_exponent(largest) - kind.emax).clamp(1 - E8M0_BIAS, E8M0_BIAS)
    shared = torch.where(largest == 0, 0, shared)
    return torch.where(torch.isfinite(largest), shared + E8M0_BIAS, E8M0_NAN).to(torch.uint8)


def e8m0(scale: Tensor) -> Tensor:
    """The powers of two of E8M0 bytes: uint8 -> fp32."""
    values = _power_of_two(scale.to(torch.int32) - E8M0_BIAS)
    values = torch.where(scale == 0, 2.0**-127, values)
    return torch.where(scale == E8M0_NAN, float("nan"), values)


def mx_round(x: Tensor, kind: Minifloat, block: int = MX_BLOCK) -> Tensor:
    """What is left of x in an MX format. x: [..., K] fp32, K a multiple of ``block`` -> fp32."""
    blocks = groups_of(x, block)
    scale = e8m0(mx_scale(blocks, kind))
    return (kind.round(blocks / scale) * scale).flatten(-2)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2(abs(x))) from the bits of fp32, int32; -127 for zeros and subnormals, 128 for Inf and NaN."""
    return (x.view(torch.int32) >> _FP32_MANTISSA & 255) - _FP32_BIAS


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent exactly, for int32 exponents from -126 to 127."""
    return (exponent + _FP32_BIAS << _FP32_MANTISSA).view(torch.float32)
