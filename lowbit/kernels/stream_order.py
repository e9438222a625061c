"""The order of a stage's bytes, there and back: codes and scales as a lane of a warp reads them (cuda/decode.cu).

A stage is 16 rows x ku columns. Lane l holds rows g = l // 4 and g + 8 and, of every 64 columns, 16: those from
(l % 4)·16 on, or where 32 columns share a scale, 8 from (l % 4)·8 on and the 8 that lie 32 further (bf16: of every 32,
8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.bits import pack, unpack

TILE, GROUP = 16, 128
THIRD = [3, 1, 0, 2]
"""3 bits: of four blocks of 64 columns, whose bit lies in place 0, 1, 2, 3 of a row's nibble in the second plane."""


@dataclass(frozen=True)
class Layout:
    """How a weight format is streamed. ``code`` is FORMAT in cuda/common.cu, ``widest`` the most columns of a stage,
    ``warps`` the consumer warps that were fastest on an H200 (docs/kernels.md; of what was never timed, those of the
    most similar format). While a ring is filled for the first time ``window`` is the stages at most that are on their
    way (0: as many as it holds), ``pace`` the clock cycles at least between asking for four of them and for the next
    four. ``group`` columns share a scale, which with its zero takes ``scale_bytes``; None: a row does, and then it
    lies beside the stream."""

    code: int
    bits: int
    widest: int
    warps: int = 11
    window: int = 0
    pace: int = 0
    group: int | None = None
    scale_bytes: int = 0

    @property
    def grouped(self) -> bool:
        return self.group is not None

    @property
    def zeroed(self) -> bool:
        """A scale has a zero beside it."""
        return self.scale_bytes == 4

    @property
    def e2m1(self) -> bool:
        return self.code in (6, 7)

    @property
    def integer(self) -> bool:
        """Multiplied as integers, x in two digits (cuda/common.cu)."""
        return self.code not in (0, 5)

    @property
    def signed(self) -> bool:
        """Bytes of the stream are two's complement; canonical codes are q + 128."""
        return self.code == 1

    def sum_columns(self, sequences: int = 1) -> int:
        """Columns whose sum of x is kept in shared memory, if x is in digits (SUM_COLUMNS in cuda/common.cu)."""
        apart = self.code == 2 or (self.code == 7 and sequences > 1)
        return min(self.group or GROUP, GROUP) if apart else GROUP

    def code_bytes(self, ku: int) -> int:
        """Bytes of 16 rows x ku columns without scales."""
        return TILE * ku * self.bits // 8

    def stage_bytes(self, ku: int) -> int:
        """Bytes of 16 rows x ku columns with their scales."""
        return self.code_bytes(ku) + (TILE * ku // self.group * self.scale_bytes if self.group else 0)


def _split(v: Tensor, dim: int, *sizes: int) -> Tensor:
    return v.reshape(*v.shape[:dim], *sizes, *v.shape[dim + 1 :])


def ordered(values: Tensor, layout: Layout, ku: int) -> Tensor:
    """Codes one per element [R, k] (R in whole tiles) -> [tiles, k / ku, bytes] uint8 in a warp's order."""
    tiles, chunks = values.shape[0] // TILE, values.shape[1] // ku
    if layout.bits == 16:  # tile, high, g; k = chunk, block of 32, lane's quarter, half of it, pair, element
        v = values.view(tiles, 2, 8, chunks, ku // 32, 4, 2, 2, 2).permute(0, 3, 4, 6, 2, 5, 7, 1, 8)
        return v.contiguous().view(tiles, chunks, -1).view(torch.uint8)
    if layout.group == 32:  # k = chunk, block of 64, mma, quarter, byte
        v = values.view(tiles, 2, 8, chunks, ku // 64, 2, 4, 8).permute(0, 3, 4, 2, 6, 5, 7, 1)
    else:  # k = chunk, block of 64, quarter, byte
        v = values.view(tiles, 2, 8, chunks, ku // 64, 4, 16).permute(0, 3, 4, 2, 5, 6, 1)
    v = v.reshape(tiles, chunks, ku // 64, 8, 4, 16, 2)  # tile, chunk, block, g, quarter, byte, high
    return torch.cat([_bytes(plane, bits) for plane, bits in _planes(v, layout, ku)], -1)


def _bytes(v: Tensor, bits: int) -> Tensor:
    return pack(v.reshape(*v.shape[:2], -1), bits)


def _planes(v: Tensor, layout: Layout, ku: int) -> list[tuple[Tensor, int]]:
    """[tile, chunk, block, g, quarter, byte, high] -> what lies one behind the other, in order, and its bits."""
    if layout.bits == 8:  # a word per row
        return [((v ^ 128 if layout.signed else v).permute(0, 1, 2, 6, 3, 4, 5), 8)]
    if layout.e2m1:  # a word: 4 columns of row g, 4 of row g + 8
        return [(_split(v, 5, 4, 4).transpose(-1, -2), 4)]
    if layout.bits == 4:  # a byte: the same column of both rows
        return [(v, 4)]
    if layout.bits == 1:  # of both rows, the same column of four blocks
        return [(_split(v, 2, ku // 256, 4).permute(0, 1, 2, 4, 5, 6, 7, 3), 1)]
    pairs = _split(v, 2, ku // 128, 2)
    if layout.bits == 2:  # two blocks, of both rows
        return [(pairs.permute(0, 1, 2, 4, 5, 6, 3, 7), 2)]
    # 3 bits: the low two of the first block, the high two of the second; then the third of four blocks
    two = torch.stack([pairs[:, :, :, 0] & 3, pairs[:, :, :, 1] >> 1], -1)
    one = torch.stack([pairs[:, :, :, 0] >> 2, pairs[:, :, :, 1] & 1], 3)
    fours = _split(one.flatten(2, 3), 2, ku // 256, 4).permute(0, 1, 2, 4, 5, 6, 7, 3)
    return [(two, 2), (fours[..., THIRD], 1)]


def values(data: Tensor, layout: Layout, ku: int) -> Tensor:
    """The inverse of ``ordered``: [tiles, chunks, bytes] -> codes one per element [tiles · 16, k]."""
    tiles, chunks = data.shape[:2]
    if layout.bits == 16:
        v = data.contiguous().view(torch.int16).view(tiles, chunks, ku // 32, 2, 8, 4, 2, 2, 2)
        return v.permute(0, 7, 4, 1, 2, 5, 3, 6, 8).reshape(tiles * TILE, -1)
    v = _joined(data.contiguous(), layout, ku)
    if layout.group == 32:
        v = _split(v, 5, 2, 8).permute(0, 7, 3, 1, 2, 5, 4, 6)
    else:
        v = v.permute(0, 6, 3, 1, 2, 4, 5)
    return v.reshape(tiles * TILE, -1)


def _joined(data: Tensor, layout: Layout, ku: int) -> Tensor:
    """The inverse of ``_planes``: bytes -> [tile, chunk, block, g, quarter, byte, high]."""
    lead = data.shape[:2]
    if layout.bits == 8:
        v = data.view(*lead, ku // 64, 2, 8, 4, 16).permute(0, 1, 2, 4, 5, 6, 3)
        return v ^ 128 if layout.signed else v
    if layout.e2m1:
        return unpack(data, 4).view(*lead, ku // 64, 8, 4, 4, 2, 4).transpose(-1, -2).flatten(5, 6)
    if layout.bits == 4:
        return unpack(data, 4).view(*lead, ku // 64, 8, 4, 16, 2)
    if layout.bits == 1:
        return unpack(data, 1).view(*lead, ku // 256, 8, 4, 16, 2, 4).permute(0, 1, 2, 7, 3, 4, 5, 6).flatten(2, 3)
    if layout.bits == 2:
        return unpack(data, 2).view(*lead, ku // 128, 8, 4, 16, 2, 2).permute(0, 1, 2, 6, 3, 4, 5, 7).flatten(2, 3)
    size = TILE * ku * 2 // 8
    two = unpack(data[..., :size].contiguous(), 2).view(*lead, ku // 128, 8, 4, 16, 2, 2)
    fours = unpack(data[..., size:].contiguous(), 1).view(*lead, ku // 256, 8, 4, 16, 2, 4)
    placed = fours[..., [THIRD.index(block) for block in range(4)]].permute(0, 1, 2, 7, 3, 4, 5, 6)
    one = _split(placed.flatten(2, 3), 2, ku // 128, 2)
    first, second = two[..., 0] | one[:, :, :, 0] << 2, two[..., 1] << 1 | one[:, :, :, 1]
    return torch.stack([first, second], 3).flatten(2, 3)


def ordered_scales(scale: Tensor, zero: Tensor | None, layout: Layout, ku: int) -> Tensor:
    """[R, k / group] fp16, or bytes, with zeros or None -> [tiles, k / ku, bytes] uint8.

    By group of 128 columns, g, scale in it, high; nvfp4, of whose 64 columns a lane holds one group: by lane, 64, high.
    """
    assert layout.group is not None
    parts = scale.unsqueeze(-1) if zero is None else torch.stack([scale, zero], -1)
    tiles, chunks, last = scale.shape[0] // TILE, scale.shape[1] * layout.group // ku, parts.shape[-1]
    if layout.group == 16:
        v = parts.view(tiles, 2, 8, chunks, ku // 64, 4, last).permute(0, 3, 2, 5, 4, 1, 6)
    else:
        v = parts.view(tiles, 2, 8, chunks, ku // GROUP, GROUP // layout.group, last).permute(0, 3, 4, 2, 5, 1, 6)
    return v.contiguous().view(tiles, chunks, -1).view(torch.uint8)


def scales(data: Tensor, layout: Layout, ku: int) -> tuple[Tensor, Tensor | None]:
    """The inverse of ``ordered_scales``."""
    assert layout.group is not None
    tiles, chunks = data.shape[:2]
    v = data.contiguous() if layout.scale_bytes == 1 else data.contiguous().view(torch.float16)
    last = 2 if layout.zeroed else 1
    if layout.group == 16:
        v = v.view(tiles, chunks, 8, 4, ku // 64, 2, last).permute(0, 5, 2, 1, 4, 3, 6)
    else:
        v = v.view(tiles, chunks, ku // GROUP, 8, GROUP // layout.group, 2, last).permute(0, 5, 3, 1, 2, 4, 6)
    v = v.reshape(tiles * TILE, -1, last)
    return v[..., 0].contiguous(), v[..., 1].contiguous() if layout.zeroed else None
