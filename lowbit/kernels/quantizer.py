"""Weights into their packed form: a scale per row or group, then the nearest code. No Python loop over rows.

Integer formats with a group start from the group's range. Below 8 bits the range that loses least is narrower than
the extremes, so a few narrower ones are tried and the least squared error is taken, group by group; then scale and
zero are fitted once more to the codes by least squares. Codes are always chosen against scales as they are stored.
On the embedded model (linears and head, 8,192 tokens) the search lowers KL from 0.0050 to 0.0037 at int4_g128, 0.0071
to 0.0051 at int4_sym_g128, 0.032 to 0.018 at int3_g128, 0.210 to 0.091 at int2_g128, 0.0033 to 0.0029 at nvfp4;
tests/test_native_quality.py measures it again on fewer tokens.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.bits import pack, split
from lowbit.kernels.weights import (
    E2M1,
    E2M1_MAX,
    E4M3_MAX,
    Packed,
    WeightFormat,
    e2m1_table,
    find,
    row_chunks,
    specs,
)

FP16_MAX = 65504.0

CUDA_CHUNK = 1 << 24
"""Weights that are worked on at once on a GPU: 64 MiB in fp32, and at most six times that while a range is searched.

A chunk costs some 130 launches of a few µs each, whatever its size. With 2^22 weights, 1,914 chunks of Llama-3.1-8B,
an H200 waited for the host most of the time; 2^24 make it a fourth of them.
"""

Quantized = tuple[Tensor, Tensor | None, Tensor | None]
"""Codes, one per uint8; scale; zero."""


@torch.no_grad()
def quantize(weight: Tensor, name: str, *, search: bool = True) -> Packed:
    """A matrix [n, k] of any float dtype, on the device where it is, in the weight format ``name``.

    ``search=False`` keeps the plain range of each group. Raises LowbitError on a shape the format can't store, on
    NaN or Inf, and on weights beyond what the format's scales can hold.
    """
    row = find(name)
    if weight.dim() != 2:
        raise LowbitError(f"{name} stores matrices: expected a weight [n, k], got shape {list(weight.shape)}")
    n, k = weight.shape
    row.check(n, k)
    largest = _check_range(weight, row)
    parts = {
        key: torch.empty(shape, dtype=dtype, device=weight.device) for key, (shape, dtype) in specs(name, n, k).items()
    }
    if "tensor_scale" in parts:
        parts["tensor_scale"].fill_(largest / (E4M3_MAX * E2M1_MAX))
    for start, stop in row_chunks(n, k, CUDA_CHUNK if weight.is_cuda else None):
        codes, scale, zero = _rows(weight[start:stop].float(), row, parts.get("tensor_scale"), search)
        parts["codes"][start:stop] = codes
        for key, found in (("scale", scale), ("zero", zero)):
            if found is not None:
                parts[key][start:stop] = found
    return Packed(name, n, k, **parts)


def _check_range(weight: Tensor, row: WeightFormat) -> float:
    """The largest magnitude. One wait for the device per matrix."""
    largest = float(_largest(weight, None))
    limit = FP16_MAX if row.scale == torch.float16 else float("inf")
    if not largest < float("inf") or largest > limit:
        raise LowbitError(
            f"{row.name} expects finite weights up to {limit:g}, got a magnitude of {largest:g}; "
            "check the checkpoint, or leave this matrix in bf16"
        )
    return largest


def _rows(weight: Tensor, row: WeightFormat, tensor_scale: Tensor | None, search: bool) -> Quantized:
    """Some rows, fp32 [r, k] -> codes [r, row bytes], scale [r, groups], zero [r, groups]."""
    if row.rule == "cast":
        return weight.to(torch.bfloat16).view(torch.uint8), None, None
    grouped = split(weight, row.group_size or weight.shape[-1])  # [r, groups, G]
    zero = None
    if row.rule == "range":
        codes, scale, zero = _asymmetric(grouped, row.levels, search)
    elif row.rule == "absmean":
        codes, scale = _by_mean(grouped, row)
    elif row.rule == "mx":
        codes, scale = _mx(grouped)
    elif row.rule == "nv":
        assert tensor_scale is not None
        codes, scale = _nv(grouped, tensor_scale, search)
    elif row.kind == "e4m3":
        codes, scale = _e4m3(grouped)
    else:
        codes, scale = _symmetric(grouped, row, search)
    flat = codes.flatten(-2)
    packed = flat if row.bits == 8 else pack(flat, row.bits)
    return packed, scale.flatten(-2), None if zero is None else zero.flatten(-2)


def _largest(weight: Tensor, dim: int | None = -1) -> Tensor:
    """The largest magnitude along ``dim``, which stays as 1; of all without it. One pass, no copy of the weight."""
    low, high = torch.aminmax(weight, dim=dim, keepdim=dim is not None)
    return torch.maximum(low.abs(), high.abs())


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0: such a group's codes are then those of zero."""
    return torch.where(scale > 0, scale.reciprocal(), 0)


def _errors(weight: Tensor, scales: Tensor, zeros: Tensor | None, low: int, high: int) -> Tensor:
    """Squared error of each group under each candidate: [candidates, r, groups, 1] of scales and zeros -> the same.

    One candidate at a time, in one buffer: a head's chunk stays as large as it is. The product of a code and an fp16
    scale is exact, so ``addcmul`` rounds as a product and a sum do.
    """
    errors, inverses, found = torch.empty_like(scales), _inverse(scales), torch.empty_like(weight)
    for index, scale in enumerate(scales):
        shifted = weight if zeros is None else torch.sub(weight, zeros[index], out=found)
        torch.mul(shifted, inverses[index], out=found).round_().clamp_(low, high)
        if zeros is None:
            found.mul_(scale)
        else:
            torch.addcmul(zeros[index], found, scale, out=found)
        torch.sum(found.sub_(weight).square_(), -1, keepdim=True, out=errors[index])
    return errors


def _least(errors: Tensor, *candidates: Tensor) -> tuple[Tensor, ...]:
    """Of each group the candidate of least error, the first of equals: [candidates, r, groups, 1] -> [r, groups, 1]."""
    if len(errors) == 1:
        return errors[0], *(values[0] for values in candidates)
    best = errors.argmin(0, keepdim=True)
    return tuple(values.gather(0, best)[0] for values in (errors, *candidates))


# -- integers ----------------------------------------------------------------------------------------------------------

NARROWER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Parts of a group's range that are tried."""
REFITS = 1
"""Least-squares fits after them; a second and fourth gave no lower KL at 4, 3 and 2 bits alike."""


@lru_cache(maxsize=16)
def _parts(search: bool, divisor: int, device: torch.device) -> Tensor:
    """What a group's range is multiplied with, per candidate: [candidates, 1, 1, 1] fp32."""
    parts = [part / divisor for part in (NARROWER if search else NARROWER[:1])]
    return torch.tensor(parts, device=device).view(-1, 1, 1, 1)


def _asymmetric(weight: Tensor, levels: int, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[r, groups, G] -> codes 0 .. levels, fp16 scale and zero: w = code · scale + zero."""
    low, high = torch.aminmax(weight, dim=-1, keepdim=True)
    scales = _stored((high - low) * _parts(search, levels, weight.device))
    zeros = _stored(low * _parts(search, 1, weight.device))
    error, scale, zero = _least(_errors(weight, scales, zeros, 0, levels), scales, zeros)
    for _ in range(REFITS if search else 0):
        codes = _codes(weight, scale, zero, 0, levels)
        mean, centre = codes.mean(-1, keepdim=True), weight.mean(-1, keepdim=True)
        spread = codes.sub_(mean)
        slope = (spread * weight).sum(-1, keepdim=True) * _inverse(spread.square_().sum(-1, keepdim=True))
        fitted, offset = _stored(slope), _stored(centre - slope * mean)
        fit = _errors(weight, fitted.unsqueeze(0), offset.unsqueeze(0), 0, levels)[0]
        better = fit < error
        error = torch.where(better, fit, error)
        scale, zero = torch.where(better, fitted, scale), torch.where(better, offset, zero)
    return _codes(weight, scale, zero, 0, levels).to(torch.uint8), scale.half(), zero.half()


def _stored(values: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """fp32 as it is after it was stored."""
    return values.to(dtype).float()


def _codes(weight: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    inverse = _inverse(scale)
    scaled = weight * inverse if zero is None else (weight - zero).mul_(inverse)
    return scaled.round_().clamp_(low, high)


def _symmetric(weight: Tensor, row: WeightFormat, search: bool) -> tuple[Tensor, Tensor]:
    """[r, groups, G] -> codes of the integers from ``offset`` (8 bits: one more) to ``-offset - 1``, and the scale."""
    high = -row.offset - 1
    low = -high if row.bits == 8 else row.offset
    assert row.scale is not None
    scales = _stored(_largest(weight) * _parts(search and row.bits < 8, high, weight.device), row.scale)
    scale = scales[0]
    if len(scales) > 1:
        _, scale = _least(_errors(weight, scales, None, low, high), scales)
    return _codes(weight, scale, None, low, high).sub_(row.offset).to(torch.uint8), scale.to(row.scale)


def _by_mean(weight: Tensor, row: WeightFormat) -> tuple[Tensor, Tensor]:
    """Ternary: the absmean rule of BitNet b1.58 (arXiv 2402.17764, section 2), a scale per row. Binary: sign and the
    mean magnitude, which is the least squares scale (XNOR-Net, arXiv 1603.05279, section 3.1)."""
    scale = weight.abs().mean(-1, keepdim=True)
    if row.bits == 1:
        return (weight >= 0).to(torch.uint8), scale
    return (_codes(weight, scale, None, -1, 1) + 1).to(torch.uint8), scale


# -- floats ------------------------------------------------------------------------------------------------------------


def _e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = _largest(weight) / E4M3_MAX
    scaled = (weight * _inverse(scale)).clamp_(-E4M3_MAX, E4M3_MAX)  # beyond it, the cast gives NaN
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


@lru_cache(maxsize=8)
def _e2m1_edges(device: torch.device) -> Tensor:
    """Where a magnitude passes to the next code: midpoints; a tie goes to the even code, so some are a hair lower."""
    edges = [(low + high) / 2 for low, high in itertools.pairwise(E2M1)]
    return torch.tensor([edge * (1 - 2.0**-24) if i % 2 else edge for i, edge in enumerate(edges)], device=device)


def e2m1_codes(values: Tensor) -> Tensor:
    """The nearest e2m1 code of each fp32 value, ties to even, saturating at 6; uint8 with the sign in bit 3."""
    magnitude = torch.bucketize(values.abs(), _e2m1_edges(values.device), out_int32=True)
    return (magnitude + 8 * (values < 0).int()).to(torch.uint8)


def _mx(weight: Tensor) -> tuple[Tensor, Tensor]:
    """OCP MX v1.0, section 6.3: the shared scale is 2^(floor(log2(largest)) - 2), 2 being e2m1's largest exponent.

    What is then above 6 saturates. The next power of two, where it has the lower squared error, gave the same KL on
    the embedded model (0.0044), so nothing is searched.
    """
    largest = _largest(weight)
    _, exponent = torch.frexp(largest)  # largest = m · 2^exponent, m in [0.5, 1)
    shared = torch.where(largest > 0, exponent - 3, -127).clamp_(-127, 127)
    scale = torch.ldexp(torch.ones_like(largest), shared)
    return e2m1_codes(weight * _inverse(scale)), scale.to(torch.float8_e8m0fnu).view(torch.uint8)


def _nv(weight: Tensor, tensor_scale: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """NVFP4: an e4m3 scale per group under one fp32 scale, so that the largest weight is 6 · 448 · tensor_scale.

    ``search`` also tries the group's largest weight at 4 instead of 6: e2m1 has no value between them.
    """
    largest = _largest(weight)
    tops = (E2M1_MAX, 4.0) if search else (E2M1_MAX,)
    wanted = [(largest / top * _inverse(tensor_scale)).clamp_(max=E4M3_MAX) for top in tops]
    candidates = torch.stack([_stored(scale, torch.float8_e4m3fn) for scale in wanted])
    errors = [_e2m1_error(weight, stored * tensor_scale) for stored in candidates]
    _, stored = _least(torch.stack(errors), candidates)
    return e2m1_codes(weight * _inverse(stored * tensor_scale)), stored.to(torch.float8_e4m3fn).view(torch.uint8)


def _e2m1_error(weight: Tensor, scale: Tensor) -> Tensor:
    found = e2m1_table(weight.device)[e2m1_codes(weight * _inverse(scale)).int()].mul_(scale)
    return found.sub_(weight).square_().sum(-1, keepdim=True)
