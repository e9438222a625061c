"""Weights in the order in which the decode kernels (cuda/product.cu) read them: one contiguous stream per thread block.

A matrix [rows, k] becomes [rows / 16][k / ku] stages. A stage is 16 rows x ku columns of codes, then, in the grouped
formats, their scales and zeros, as kernels/stream_order.py orders them for the lanes of a warp: 128-bit words whose
fields an mma takes as operand A where they lie. Bits as stored: nothing is added to a weight's size but padding of a
head's rows to a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import stream_order, weights
from lowbit.kernels.bits import pack, unpack
from lowbit.kernels.keeping import room
from lowbit.kernels.stream_order import Layout
from lowbit.kernels.weights import Packed

TILE, GROUP = stream_order.TILE, stream_order.GROUP
CHUNK_WEIGHTS = 1 << 26
"""Weights that are re-ordered at once: a head of 525 million must not take gigabytes beside it."""


LAYOUTS: dict[str, Layout] = {
    "bf16": Layout(0, 16, 256, window=8),
    "int8": Layout(1, 8, 256, warps=14, window=28),
    "fp8_e4m3": Layout(5, 8, 512),
    **{f"int4_g{n}": Layout(2, 4, 512, warps=14, pace=600, group=n, scale_bytes=4) for n in (128, 64, 32)},
    **{f"int4_sym_g{n}": Layout(2, 4, 512, warps=14, pace=150, group=n, scale_bytes=2) for n in (128, 64, 32)},
    "mxfp4": Layout(6, 4, 512, warps=14, group=32, scale_bytes=1),
    "nvfp4": Layout(7, 4, 512, warps=14, group=16, scale_bytes=1),
    "int3_g128": Layout(8, 3, 512, warps=14, group=128, scale_bytes=4),
    "int2_g128": Layout(3, 2, 1024, warps=16, group=128, scale_bytes=4),
    "ternary": Layout(4, 2, 1024, warps=20),
    "binary": Layout(9, 1, 1024, warps=16),
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

    def tiled(self, first: int, last: int) -> Stream:
        """Tiles ``first`` up to ``last`` as a stream of their own, sharing memory."""
        low, high = first * TILE, min(last * TILE, self.rows)
        scale = None if self.row_scale is None else self.row_scale[low : last * TILE]
        return Stream(self.format, high - low, self.k, self.data[first:last], scale)


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
    parts = [stream_order.ordered(_padded(_codes(packed), rows), layout, ku)]
    if layout.grouped:
        assert packed.scale is not None
        zero = None if packed.zero is None else _padded(packed.zero, rows)
        parts.append(stream_order.ordered_scales(_padded(packed.scale, rows), zero, layout, ku))
    return torch.cat(parts, -1)


def _row_scale(packed: Packed) -> Tensor | None:
    """[rows] fp32: the scale of each row, or of its matrix (nvfp4); None where groups have all there is."""
    rows = -(-packed.n // TILE) * TILE
    if packed.tensor_scale is not None:
        return _padded(packed.tensor_scale.view(-1).expand(packed.n), rows).contiguous()
    if LAYOUTS[packed.format].grouped or packed.scale is None:
        return None
    return _padded(packed.scale.view(-1).float(), rows).contiguous()


def pack_stream(packed: Packed) -> Stream:
    """Re-order one packed matrix, into the pool of ``keeping.kept_together`` where there is one.

    Raises LowbitError for a format without a layout, or a k that stages can't hold.
    """
    ku = stage_columns(packed.format, packed.k)
    stage = packed.k // ku, LAYOUTS[packed.format].stage_bytes(ku)
    data = room((-(-packed.n // TILE), *stage), torch.uint8, packed.codes.device)
    for start, stop in weights.row_chunks(packed.n, packed.k, CHUNK_WEIGHTS, TILE):
        data[start // TILE : -(-stop // TILE)] = _stream_rows(packed.rows(start, stop), ku)
    return Stream(packed.format, packed.n, packed.k, data, _row_scale(packed))


def unpack_stream(stream: Stream) -> Packed:
    """The inverse of ``pack_stream``: what is streamed, as canonical codes and scales, without padding.

    A tensor's scale comes back for each row, [rows, 1]: matrices in one stream have one each (``own_scale``).
    """
    layout, ku, row = stream.layout, stream.ku, weights.find(stream.format)
    size = layout.code_bytes(ku)
    values = stream_order.values(stream.data[..., :size], layout, ku)[: stream.rows]
    codes = values.contiguous().view(torch.uint8) if layout.bits == 16 else pack(values, layout.bits)
    scale = zero = per_row = None
    if stream.row_scale is not None:
        per_row = stream.row_scale[: stream.rows].view(-1, 1)
    if layout.grouped:
        scale, zero = stream_order.scales(stream.data[..., size:], layout, ku)
        scale, zero = scale[: stream.rows], None if zero is None else zero[: stream.rows]
    else:
        scale = per_row
    tensor_scale = per_row if row.tensor_scale else None
    return Packed(stream.format, stream.rows, stream.k, codes, scale, zero, tensor_scale)


def own_scale(packed: Packed) -> Packed:
    """One matrix of a stream with its tensor's scale as the format has it, [1]."""
    if packed.tensor_scale is None:
        return packed
    return replace(packed, tensor_scale=packed.tensor_scale.view(-1)[:1].clone())


def concatenate(parts: list[Packed]) -> Packed:
    """Matrices with the same x below each other: q, k and v."""
    return _joined(parts, torch.cat)


def interleave(gate: Packed, up: Packed) -> Packed:
    """8 rows of gate, 8 rows of up, and so on: one tile then holds both halves of 8 outputs."""
    if gate.n != up.n or gate.n % 8:
        raise LowbitError(f"gate and up must have as many rows, a multiple of 8, got {gate.n} and {up.n}")

    def woven(tensors: list[Tensor]) -> Tensor:
        a, b = (tensor.reshape(gate.n // 8, 8, -1) for tensor in tensors)
        return torch.cat([a, b], 1).view(2 * gate.n, -1)

    return _joined([gate, up], woven)


def _joined(parts: list[Packed], join: Any) -> Packed:
    first = parts[0]
    if any((part.format, part.k) != (first.format, first.k) for part in parts):
        found = ", ".join(f"{part.format} K={part.k}" for part in parts)
        raise LowbitError(f"matrices of one product must have one format and K, got {found}")
    tensors = [part.tensors() for part in parts]
    if first.tensor_scale is not None:  # each matrix has its own: then each row
        for part, named in zip(parts, tensors, strict=True):
            named["tensor_scale"] = named["tensor_scale"].view(-1, 1).expand(part.n, 1)
    joined = {name: join([named[name] for named in tensors]) for name in tensors[0]}
    return Packed(first.format, sum(part.n for part in parts), first.k, **joined)
