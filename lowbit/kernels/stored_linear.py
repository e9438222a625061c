"""A packed linear of a published checkpoint whose columns lie in another order, or whose inputs are quantized too.

Inputs as compressed_tensors 0.20 quantizes them (quantization/utils/helpers.py, lifecycle/forward.py), in fp32: a
symmetric scale is max|x| / 127.5 or, of e4m3, / 448; an asymmetric one (max - min) / 255; codes are clamped, then
rounded to even. Where torch has a product of 8-bit operands it runs, else the definition in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.formats.layouts import Inputs
from lowbit.kernels import weights
from lowbit.kernels.bits import split
from lowbit.kernels.modules import NativeLinear
from lowbit.kernels.weights import E4M3_MAX, Packed

INT_HALF = 127.5
"""Half of the range of int8."""

MIN_ROWS = 32
"""Rows that torch._int_mm is given on a GPU at least: it asks for more than 16."""

SCALED, INTEGER, DEFINITION = "torch._scaled_mm", "torch._int_mm", "PyTorch reference"


@cache
def cpu_multiplies_fp8() -> bool:
    """Whether this torch multiplies e4m3 with a scale per row of both operands on this CPU, and rightly.

    torch 2.13 does; with 2.11 on an H200's host the tests of it failed.
    """
    left, right = (torch.arange(16 * 32).view(16, 32) % n - n // 2 for n in (7, 5))
    scales = torch.arange(1, 17) / 16
    want = (left @ right.T) * scales.view(-1, 1) * scales
    try:
        found = torch._scaled_mm(
            left.to(torch.float8_e4m3fn),
            right.to(torch.float8_e4m3fn).T,
            scale_a=scales.view(-1, 1),
            scale_b=scales.view(1, -1),
            out_dtype=torch.bfloat16,
        )
    except RuntimeError:
        return False
    return bool(((found.float() - want).abs() <= 2**-8 * want.abs()).all())


class Quantized(NamedTuple):
    """Inputs [m, groups, columns] as whole codes in fp32; ``scale`` and ``zero`` [m, groups, 1] or [1, 1, 1]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def values(self) -> Tensor:
        """What the codes stand for, [m, k] fp32."""
        codes = self.codes if self.zero is None else self.codes - self.zero
        return (codes * self.scale).flatten(1)


class StoredLinear(NativeLinear):
    """``order`` [k] int32: which column of the model lies at each place of the packed matrix. ``input_scale`` and
    ``input_zero`` [1] fp32: those of static inputs."""

    order: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        *,
        order: Tensor | None = None,
        inputs: Inputs | None = None,
        input_scale: Tensor | None = None,
        input_zero: Tensor | None = None,
    ) -> None:
        super().__init__(packed, bias)
        self.inputs = inputs
        self.multiplies_fp8: bool | None = None
        for name, tensor in (("order", order), ("input_scale", input_scale), ("input_zero", input_zero)):
            self.register_buffer(name, tensor)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What is stored, as [n, k] in ``dtype``, columns as the model's."""
        return self._unordered(super().dequantize(dtype))

    def defined(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The same in fp32 by the definition, by no kernel; rows ``start`` up to ``stop`` of it."""
        return self._unordered(weights.dequantize(self.rows(start, self.n if stop is None else stop)))

    def _unordered(self, whole: Tensor) -> Tensor:
        if self.order is None:
            return whole
        columns = torch.empty_like(whole)
        columns[:, self.order.long()] = whole
        return columns

    def quantize_inputs(self, x: Tensor) -> Quantized:
        """x [m, k] of any float dtype, quantized."""
        how = self.inputs
        assert how is not None
        wide = split(x.float(), how.group_size or self.k)
        scale, zero = self._found(wide, how) if how.dynamic else self._stored()
        scaled = wide / scale if zero is None else wide / scale + zero
        if how.kind == "float":
            codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        else:
            codes = scaled.clamp(-128, 127).round()
        return Quantized(codes, scale, zero)

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        assert self.input_scale is not None
        return self.input_scale.view(1, 1, 1), None if self.input_zero is None else self.input_zero.view(1, 1, 1)

    def _found(self, wide: Tensor, how: Inputs) -> tuple[Tensor, Tensor | None]:
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        half = E4M3_MAX if how.kind == "float" else INT_HALF
        scale = torch.maximum(-low, high) / half if how.symmetric else (high - low) / (2 * half)
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
        return scale, None if how.symmetric else (-128 - low / scale).clamp(-128, 127).round()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.inputs is None:
            return super().forward(x)
        flat = self.quantize_inputs(x.reshape(-1, self.k))
        kernel = self.kernel(x.dtype)
        if kernel == SCALED:
            y = self._scaled(flat)
        elif kernel == INTEGER:
            y = self._integer(flat)
        else:
            y = weights.matmul(flat.values(), self.packed)
        y = y.to(x.dtype).view(*x.shape[:-1], self.n)
        return y if self.bias is None else y + self.bias

    def kernel(self, dtype: torch.dtype) -> str:
        """What multiplies quantized inputs of this dtype here: one scale per token and per row, or the definition."""
        how = self.inputs
        assert how is not None
        if self.n % 16 or self.k % 16 or how.group_size or self.packed.row.group_size:
            return DEFINITION
        if (self.format, how.kind, dtype) == ("fp8_e4m3", "float", torch.bfloat16):
            if self.multiplies_fp8 is None:
                self.settle()
            return SCALED if self.multiplies_fp8 else DEFINITION
        return INTEGER if (self.format, how.kind, how.symmetric) == ("int8", "int", True) else DEFINITION

    def settle(self) -> None:
        """Ask the device once what it can do: a compiler's graph can't."""
        where = self.codes.device
        on_gpu = where.type == "cuda"
        self.multiplies_fp8 = torch.cuda.get_device_capability(where) >= (8, 9) if on_gpu else cpu_multiplies_fp8()

    def _scaled(self, flat: Quantized) -> Tensor:
        assert self.scale is not None
        codes = flat.codes.flatten(1).to(torch.float8_e4m3fn)
        product: Tensor = torch._scaled_mm(
            codes,
            self.codes.view(torch.float8_e4m3fn).T,
            scale_a=flat.scale.flatten(1).expand(codes.shape[0], 1).contiguous(),
            scale_b=self.scale.view(1, -1),
            out_dtype=torch.bfloat16,
        )
        return product

    def _integer(self, flat: Quantized) -> Tensor:
        assert self.scale is not None
        codes = flat.codes.flatten(1).to(torch.int8)
        count = codes.shape[0]
        if codes.is_cuda and count < MIN_ROWS:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, MIN_ROWS - count))
        signed = self.codes.bitwise_xor(0x80).view(torch.int8)  # a code is stored as the byte of code + 128
        found: Tensor = torch._int_mm(codes, signed.T)[:count].float()
        return found * flat.scale.flatten(1) * self.scale.view(1, -1)
