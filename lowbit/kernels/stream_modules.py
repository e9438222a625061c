"""Linears whose weights lie in a stream of the decode kernels, alone or with the linears that share their x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.kernels.keeping import keep
from lowbit.kernels.stream import TILE, Stream, concatenate, interleave, own_scale, pack_stream, unpack_stream
from lowbit.kernels.weights import Packed

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that are multiplied with the same x, and share a stream."""


@dataclass(eq=False)
class StreamPart:
    """The rows of a stream that one linear owns: from ``row0`` on; with ``half``, the first (1) or last (2) 8 of 16."""

    stream: Stream
    rows: int
    row0: int = 0
    half: int = 0


class StreamLinear(nn.Module):
    """A linear whose weights lie in a stream that it may share. Products with many tokens dequantize them first.

    x [..., in_features] -> [..., out_features], in x's dtype (fp16 or bf16), by cuBLAS on the dequantized matrix.
    """

    def __init__(self, part: StreamPart) -> None:
        super().__init__()
        self.part = part
        self.out_features, self.in_features, self.format = part.rows, part.stream.k, part.stream.format
        self.n, self.k = part.rows, part.stream.k

    @property
    def packed(self) -> Packed:
        """This linear's own rows in canonical form: a copy, for saving and for proofs."""
        whole = unpack_stream(self.part.stream)
        if not self.part.half:
            return own_scale(whole.rows(self.part.row0, self.part.row0 + self.part.rows))
        first = 8 * (self.part.half - 1)
        named = {
            name: tensor.view(-1, TILE, tensor.shape[-1])[:, first : first + 8].reshape(self.part.rows, -1)
            for name, tensor in whole.tensors().items()
        }
        return own_scale(Packed(whole.format, self.part.rows, whole.k, **named))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out_features, in_features] in ``dtype``, rounded once."""
        from lowbit.kernels.unpacking import unpack

        return unpack(self.part, dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # saved as every packed linear is, so that a file does not depend on the GPU that wrote it
        destination.update({prefix + name: tensor for name, tensor in self.packed.tensors().items()})

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize(x.dtype))

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
    stream = replace(made, data=keep(made.data), row_scale=None if made.row_scale is None else keep(made.row_scale))
    row = 0
    for index, (name, part) in enumerate(zip(names, parts, strict=True)):
        own = StreamPart(stream, part.n, half=index + 1) if woven else StreamPart(stream, part.n, row0=row)
        setattr(parent, name, StreamLinear(own))
        row += part.n
    return len(parts)
