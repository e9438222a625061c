"""The operations on packed weights as custom ops of PyTorch: ``lowbit::linear``, ``::dequantize``, ``::embedding``.

Compilers see one opaque call each, with a schema and a fake. What runs is ``dispatch``'s choice: a registered kernel,
or the reference in ``weights``, which works on any device. The weight's parts travel as tensors because a schema
knows no Packed; ``*parts(packed)`` spells them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import dispatch, weights
from lowbit.kernels.weights import Packed

Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, str, int, int]


def parts(packed: Packed) -> Parts:
    """The arguments after the first that every op here takes."""
    return packed.codes, packed.scale, packed.zero, packed.tensor_scale, packed.format, packed.n, packed.k


def _packed(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, tensor_scale: Tensor | None, format: str, n: int, k: int
) -> Packed:
    return Packed(format, n, k, codes, scale, zero, tensor_scale)


@torch.library.custom_op("lowbit::linear", mutates_args=())
def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    format: str,
    n: int,
    k: int,
) -> Tensor:
    """x [..., k] times the transposed weight -> [..., n] in x's dtype, summed in fp32."""
    if x.shape[-1] != k:
        raise LowbitError(f"lowbit::linear with a weight [{n}, {k}] expects x [..., {k}], got {list(x.shape)}")
    packed = _packed(codes, scale, zero, tensor_scale, format, n, k)
    flat = x.reshape(-1, k)
    asked = dispatch.problem(packed, flat.shape[0], x.dtype)
    out = dispatch.run("linear", asked, flat, packed, lambda: weights.matmul(flat, packed).to(x.dtype))
    return out.reshape(*x.shape[:-1], n)


@linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    format: str,
    n: int,
    k: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


@torch.library.custom_op("lowbit::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    format: str,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [n, k] in ``dtype``, rounded once from fp32."""
    packed = _packed(codes, scale, zero, tensor_scale, format, n, k)
    asked = dispatch.problem(packed, 0, dtype)
    return dispatch.run("dequantize", asked, None, packed, lambda: _dequantized(packed, dtype))


def _dequantized(packed: Packed, dtype: torch.dtype) -> Tensor:
    # piece by piece: a head in fp32 takes gigabytes
    out = torch.empty(packed.n, packed.k, dtype=dtype, device=packed.codes.device)
    for start, stop in weights.row_chunks(packed.n, packed.k):
        out[start:stop] = weights.dequantize(packed.rows(start, stop))
    return out


@dequantize.register_fake
def _(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    format: str,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(n, k, dtype=dtype)


@torch.library.custom_op("lowbit::embedding", mutates_args=())
def embedding(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    format: str,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``ids`` [...] of the packed table [n, k] -> [..., k] in ``dtype``. Ids outside of it are an index error."""
    packed = _packed(codes, scale, zero, tensor_scale, format, n, k)
    flat = ids.reshape(-1)
    asked = dispatch.problem(packed, flat.shape[0], dtype)
    out = dispatch.run("embedding", asked, flat, packed, lambda: weights.embedding(flat, packed).to(dtype))
    return out.reshape(*ids.shape, k)


@embedding.register_fake
def _(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    format: str,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(*ids.shape, k, dtype=dtype)
