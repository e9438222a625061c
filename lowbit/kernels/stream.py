"""Weights in the order in which the decode kernels (cuda/product.cu) read them: one contiguous stream per thread block.

A matrix [rows, k] becomes [rows / 16][k / ku] stages. A stage is 16 rows x ku columns of codes, then, in the grouped
formats, an fp16 scale and zero per row and group of 128. Inside, 128-bit words are laid out by lane: lane l of a warp
gets rows l // 4 and l // 4 + 8 and, of every 64 columns, the 16 from (l % 4)·16 on (bf16: of every 32, 8), as mma wants
operand A. 8 bits: a word per row; 4 bits: a byte holds the same column of both rows; 2 bits: of both rows, the same
column of two blocks of 64. Bits as stored: nothing is added to a weight's size but padding of a head's rows to a
multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import weights
from lowbit.kernels.bits import pack, unpack
from lowbit.kernels.weights import Packed

TILE, GROUP = 16, 128
CHUNK_WEIGHTS = 1 << 26
"""Weights that are re-ordered at once: a head of 525 million must not take gigabytes beside it."""


@dataclass(frozen=True)
class Layout:
    """How a weight format is streamed. ``code`` is FORMAT in cuda/common.cu, ``widest`` the most columns of a stage,
    ``warps`` the consumer warps that were fastest on an H200 (docs/kernels.md)."""

    code: int
    bits: int
    widest: int
    warps: int = 11

    @property
    def grouped(self) -> bool:
        return self.code in (2, 3)

    @property
    def integer(self) -> bool:
        """Multiplied as integers, x in two digits (cuda/common.cu)."""
        return self.code in (1, 2, 3, 4)

    @property
    def signed(self) -> bool:
        """Bytes of the stream are two's complement; canonical codes are q + 128."""
        return self.code == 1

    def stage_bytes(self, ku: int) -> int:
        """Bytes of 16 rows x ku columns with their scales."""
        return TILE * ku * self.bits // 8 + (ku // GROUP * 64 if self.grouped else 0)


LAYOUTS: dict[str, Layout] = {
    "bf16": Layout(0, 16, 256),
    "int8": Layout(1, 8, 256, warps=14),
    "int4_g128": Layout(2, 4, 512, warps=14),
    "int4_sym_g128": Layout(2, 4, 512, warps=14),
    "int2_g128": Layout(3, 2, 1024, warps=16),
    "ternary": Layout(4, 2, 1024, warps=16),
    "fp8_e4m3": Layout(5, 8, 512),
}
"""Weight formats that the decode kernels read; the others run as their reference."""


def stage_columns(format: str, k: int) -> int:
    """Columns of a stage of a matrix with k columns: the largest power of two up to ``widest`` that divides k.

    cuda/common.cu says the same. Raises LowbitError for a format without a layout, and if k is no multiple of 256.
    """
    if format not in LAYOUTS:
        raise LowbitError(f"no decode kernel streams {format}; there are ones for {', '.join(LAYOUTS)}")
    if k % (2 * GROUP):
        raise LowbitError(f"the decode kernels cut K into stages of {2 * GROUP} columns or more; K={k} can't be")
    ku = LAYOUTS[format].widest
    while k % ku:
        ku //= 2
    return ku


def streamable(format: str, k: int) -> bool:
    """Whether a matrix with k columns can be streamed."""
    return format in LAYOUTS and k % (2 * GROUP) == 0


@dataclass(frozen=True, eq=False)
class Stream:
    """A matrix, or several that are multiplied with the same x, ready for the decode kernels.

    ``data`` [tiles, k / ku, stage bytes] uint8; ``row_scale`` [rows] fp32 or None. ``rows`` without padding.
    """

    format: str
    rows: int
    k: int
    data: Tensor
    row_scale: Tensor | None

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.format]

    @property
    def ku(self) -> int:
        """Columns of a stage."""
        return stage_columns(self.format, self.k)

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE)


def _ordered(values: Tensor, layout: Layout, ku: int) -> Tensor:
    """Codes one per element [R, k] (R in whole tiles) -> [tiles, k / ku, bytes] uint8 in a warp's order."""
    tiles, chunks = values.shape[0] // TILE, values.shape[1] // ku
    v = values.view(tiles, 2, 8, -1)  # tile, high, g, k
    if layout.bits == 16:  # k = chunk, block of 32, lane's quarter, half of it, pair, element
        v = v.view(tiles, 2, 8, chunks, ku // 32, 4, 2, 2, 2).permute(0, 3, 4, 6, 2, 5, 7, 1, 8)
        return v.contiguous().view(tiles, chunks, -1).view(torch.uint8)
    if layout.bits == 8:  # k = chunk, block, quarter, byte
        v = v.view(tiles, 2, 8, chunks, ku // 64, 4, 16).permute(0, 3, 4, 1, 2, 5, 6)
        return (v ^ 128 if layout.signed else v).contiguous().view(tiles, chunks, -1)
    if layout.bits == 4:  # k = chunk, block, quarter, byte; nibble = high
        v = v.view(tiles, 2, 8, chunks, ku // 64, 4, 16).permute(0, 3, 4, 2, 5, 6, 1)
    else:  # 2 bits: k = chunk, two blocks, block, quarter, byte; field = block, high
        v = v.view(tiles, 2, 8, chunks, ku // 128, 2, 4, 16).permute(0, 3, 4, 2, 6, 7, 5, 1)
    return pack(v.contiguous().view(tiles, chunks, -1), layout.bits)


def _grouped_scales(scale: Tensor, zero: Tensor, ku: int) -> Tensor:
    """fp16 scale and zero [R, k / 128] -> [tiles, k / ku, ku / 128 · 64] uint8: (scale, zero) by group, g, high."""
    pairs = torch.stack([scale, zero], -1)
    tiles, per_stage = pairs.shape[0] // TILE, ku // GROUP
    v = pairs.view(tiles, 2, 8, -1, per_stage, 2).permute(0, 3, 4, 2, 1, 5)
    return v.contiguous().view(tiles, -1, per_stage * TILE * 2).view(torch.uint8)


def _codes(packed: Packed) -> Tensor:
    if packed.row.bits == 16:
        return packed.codes.contiguous().view(torch.int16)
    return unpack(packed.codes, packed.row.bits)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - tensor.shape[0]
    return tensor if not missing else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _stream_rows(packed: Packed, ku: int) -> Tensor:
    layout = LAYOUTS[packed.format]
    rows = -(-packed.n // TILE) * TILE
    parts = [_ordered(_padded(_codes(packed), rows), layout, ku)]
    if layout.grouped:
        assert packed.scale is not None
        zero = packed.zero
        if zero is None:  # w = (q + offset) scale: the offset is a power of two, so this product is exact
            zero = packed.scale * packed.row.offset
        parts.append(_grouped_scales(_padded(packed.scale, rows), _padded(zero, rows), ku))
    return torch.cat(parts, -1)


def pack_stream(packed: Packed) -> Stream:
    """Re-order one packed matrix. Raises LowbitError for a format without a layout, or a k that stages can't hold."""
    ku = stage_columns(packed.format, packed.k)
    step = max(TILE, CHUNK_WEIGHTS // packed.k // TILE * TILE)
    pieces = [_stream_rows(packed.rows(r, min(r + step, packed.n)), ku) for r in range(0, packed.n, step)]
    data = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    row_scale = None
    if not LAYOUTS[packed.format].grouped and packed.scale is not None:
        row_scale = _padded(packed.scale.view(-1).float(), -(-packed.n // TILE) * TILE).contiguous()
    return Stream(packed.format, packed.n, packed.k, data.contiguous(), row_scale)


def _values(data: Tensor, layout: Layout, ku: int) -> Tensor:
    """The inverse of ``_ordered``: [tiles, chunks, bytes] -> codes one per element [tiles · 16, k]."""
    tiles, chunks = data.shape[:2]
    if layout.bits == 16:
        v = data.contiguous().view(torch.int16).view(tiles, chunks, ku // 32, 2, 8, 4, 2, 2, 2)
        return v.permute(0, 7, 4, 1, 2, 5, 3, 6, 8).reshape(tiles * TILE, -1)
    v = unpack(data.contiguous(), layout.bits)
    if layout.bits == 8:
        v = v.view(tiles, chunks, ku // 64, 2, 8, 4, 16).permute(0, 3, 4, 1, 2, 5, 6)
        return (v ^ 128 if layout.signed else v).reshape(tiles * TILE, -1)
    if layout.bits == 4:
        v = v.view(tiles, chunks, ku // 64, 8, 4, 16, 2).permute(0, 6, 3, 1, 2, 4, 5)
    else:
        v = v.view(tiles, chunks, ku // 128, 8, 4, 16, 2, 2).permute(0, 7, 3, 1, 2, 6, 4, 5)
    return v.reshape(tiles * TILE, -1)


def unpack_stream(stream: Stream) -> Packed:
    """The inverse of ``pack_stream``: what is streamed, as canonical codes and scales, without padding."""
    layout, ku, row = stream.layout, stream.ku, weights.find(stream.format)
    size = TILE * ku * layout.bits // 8
    values = _values(stream.data[..., :size], layout, ku)[: stream.rows]
    codes = values.contiguous().view(torch.uint8) if layout.bits == 16 else pack(values, layout.bits)
    scale = zero = None
    if layout.grouped:
        pairs = stream.data[..., size:].contiguous().view(torch.float16)
        pairs = pairs.view(stream.tiles, stream.k // ku, ku // GROUP, 8, 2, 2).permute(0, 4, 3, 1, 2, 5)
        pairs = pairs.reshape(stream.tiles * TILE, -1, 2)[: stream.rows]
        scale, zero = pairs[..., 0].contiguous(), pairs[..., 1].contiguous() if row.zero is not None else None
    elif stream.row_scale is not None:
        scale = stream.row_scale[: stream.rows].view(-1, 1)
    return Packed(stream.format, stream.rows, stream.k, codes, scale, zero)


def concatenate(parts: list[Packed]) -> Packed:
    """Matrices with the same x below each other: q, k and v."""
    return _joined(parts, torch.cat)


def interleave(gate: Packed, up: Packed) -> Packed:
    """8 rows of gate, 8 rows of up, and so on: one tile then holds both halves of 8 outputs."""
    if gate.n != up.n or gate.n % 8:
        raise LowbitError(f"gate and up must have as many rows, a multiple of 8, got {gate.n} and {up.n}")

    def woven(tensors: list[Tensor]) -> Tensor:
        a, b = (tensor.view(gate.n // 8, 8, -1) for tensor in tensors)
        return torch.cat([a, b], 1).view(2 * gate.n, -1)

    return _joined([gate, up], woven)


def _joined(parts: list[Packed], join: Any) -> Packed:
    first = parts[0]
    if any((part.format, part.k) != (first.format, first.k) for part in parts):
        found = ", ".join(f"{part.format} K={part.k}" for part in parts)
        raise LowbitError(f"matrices of one product must have one format and K, got {found}")
    named = {name: join([part.tensors()[name] for part in parts]) for name in first.tensors()}
    return Packed(first.format, sum(part.n for part in parts), first.k, **named)
