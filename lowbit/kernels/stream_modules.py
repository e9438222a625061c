"""Linears whose weights lie in a stream of the decode kernels, alone or with the linears that share their x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.kernels.keeping import keep
from lowbit.kernels.stream import (
    CHUNK_WEIGHTS,
    TILE,
    Stream,
    concatenate,
    interleave,
    own_scale,
    pack_stream,
    unpack_stream,
)
from lowbit.kernels.weights import Packed, product, row_chunks

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that are multiplied with the same x, and share a stream."""


@dataclass(eq=False)
class StreamPart:
    """The rows of a stream that one linear owns: from ``row0`` on; with ``half``, the first (1) or last (2) 8 of 16."""

    stream: Stream
    rows: int
    row0: int = 0
    half: int = 0

    def cut(self, start: int, stop: int) -> StreamPart:
        """Its rows ``start`` up to ``stop`` alone, in no more than their tiles, sharing memory.

        A half starts with a tile: ``start`` is then a multiple of 8.
        """
        own = TILE // 2 if self.half else TILE  # rows of a tile that are this linear's
        low, high = self.row0 + start, self.row0 + stop
        first = low // own
        return StreamPart(self.stream.tiled(first, -(-high // own)), stop - start, low - first * own, self.half)


class StreamLinear(nn.Module):
    """A linear whose weights lie in a stream that it may share. Products with many tokens dequantize them first.

    x [..., in_features] -> [..., out_features], in x's dtype (fp16 or bf16), by cuBLAS on the dequantized matrix; a
    large one piece by piece.
    """

    def __init__(self, part: StreamPart) -> None:
        super().__init__()
        self.part = part
        self.out_features, self.in_features, self.format = part.rows, part.stream.k, part.stream.format
        self.n, self.k = part.rows, part.stream.k

    @property
    def packed(self) -> Packed:
        """This linear's own rows in canonical form: a copy, for saving."""
        pieces = [self.rows(*piece) for piece in row_chunks(self.n, self.k, CHUNK_WEIGHTS)]
        return own_scale(pieces[0] if len(pieces) == 1 else concatenate(pieces))

    def rows(self, start: int, stop: int) -> Packed:
        """Rows ``start`` up to ``stop`` of it in canonical form: a copy of no more than their tiles."""
        tile = TILE // 2 if self.part.half else 1
        part = self.part.cut(start // tile * tile, stop)
        tiles = unpack_stream(part.stream)
        if part.half:
            of_tile = 8 * (part.half - 1)
            named = {
                name: tensor.view(-1, TILE, tensor.shape[-1])[:, of_tile : of_tile + 8].flatten(0, 1)
                for name, tensor in tiles.tensors().items()
            }
            tiles = Packed(tiles.format, tiles.n // 2, tiles.k, **named)
        return own_scale(tiles.rows(part.row0 + part.rows - (stop - start), part.row0 + part.rows))

    def dequantize(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """[out_features, in_features] in ``dtype``, rounded once; of it rows ``start``, in whole tiles, to ``stop``."""
        from lowbit.kernels.unpacking import unpack

        whole = start == 0 and stop in (None, self.n)
        return unpack(self.part if whole else self.part.cut(start, self.n if stop is None else stop), dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # saved as every packed linear is, so that a file does not depend on the GPU that wrote it
        destination.update({prefix + name: tensor for name, tensor in self.packed.tensors().items()})

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.n, self.k, lambda start, stop: self.dequantize(x.dtype, start, stop))

    def extra_repr(self) -> str:
        return f"[{self.out_features}, {self.in_features}] {self.format}, streamed"


def attach(module: nn.Module, packed: Callable[[nn.Module], Packed | None]) -> int:
    """Put streams in the place of the packed linears inside ``module``: one for q, k and v, one for gate and up.

    ``packed`` gives the matrix of a linear, or None for one that is to stay; then those that would share its stream
    stay too, as do such of several formats. Returns how many linears were replaced.
    """
    replaced = 0
    for parent in list(module.modules()):
        for names in (*SHARED, ("o_proj",), ("down_proj",), ("lm_head",)):
            linears = [parent._modules.get(name) for name in names]
            found = [packed(linear) for linear in linears if linear is not None]
            parts = [part for part in found if part is not None]
            if not parts:
                continue
            if len(parts) != len(names) or len({part.format for part in parts}) > 1:
                continue  # a recipe that mixes them: each stays a linear of its own
            replaced += _replace(parent, names, parts)
    return replaced


def _replace(parent: nn.Module, names: tuple[str, ...], parts: list[Packed]) -> int:
    woven = len(parts) == 2
    made = pack_stream(interleave(*parts) if woven else concatenate(parts) if len(parts) > 1 else parts[0])
    stream = made if made.row_scale is None else replace(made, row_scale=keep(made.row_scale))
    row = 0
    for index, (name, part) in enumerate(zip(names, parts, strict=True)):
        own = StreamPart(stream, part.n, half=index + 1) if woven else StreamPart(stream, part.n, row0=row)
        setattr(parent, name, StreamLinear(own))
        row += part.n
    return len(parts)
