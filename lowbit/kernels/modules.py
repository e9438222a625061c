"""Modules that hold packed weights in the place of nn.Linear and nn.Embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.kernels import ops
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.stream_modules import StreamLinear
from lowbit.kernels.weights import Packed

M = TypeVar("M", bound="PackedModule")


class PackedModule(nn.Module):
    """One packed matrix in buffers ``codes``, ``scale``, ``zero``, ``tensor_scale`` (None: the format has none).

    The buffers belong together: ``module.to(device)`` moves them, ``module.to(dtype)`` and ``half()`` leave them.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.format, self.n, self.k = packed.format, packed.n, packed.k
        for name in ("codes", "scale", "zero", "tensor_scale"):
            self.register_buffer(name, packed.tensors().get(name))

    @property
    def packed(self) -> Packed:
        """The matrix, sharing memory with the buffers."""
        return Packed(self.format, self.n, self.k, self.codes, self.scale, self.zero, self.tensor_scale)

    def rows(self, start: int, stop: int) -> Packed:
        """Rows ``start`` up to ``stop``, sharing memory."""
        return self.packed.rows(start, stop)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What is stored, as [n, k] in ``dtype``."""
        found: Tensor = ops.dequantize(*ops.parts(self.packed), dtype)
        return found

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        held = {name: self._buffers[name] for name in dtypes}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in dtypes.items():
            moved, before = self._buffers[name], held[name]
            assert moved is not None
            assert before is not None
            if moved.dtype != dtype:
                self._buffers[name] = before.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"[{self.n}, {self.k}] {self.format}"


class NativeLinear(PackedModule):
    """y = x · Wᵀ (+ bias) with W [out_features, in_features] packed; x and y in any one float dtype."""

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__(packed)
        self.out_features, self.in_features = packed.n, packed.k
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str) -> NativeLinear:
        """Quantize a plain linear into the weight format ``name``, where its weight lies; the linear is untouched."""
        return cls(quantize(linear.weight.detach(), name), linear.bias).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        y: Tensor = ops.linear(x, *ops.parts(self.packed))
        return y if self.bias is None else y + self.bias


class NativeEmbedding(PackedModule):
    """Rows of a packed table [num_embeddings, embedding_dim], given in ``dtype``."""

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim, self.dtype = packed.n, packed.k, dtype

    @classmethod
    def from_embedding(cls, table: nn.Embedding, name: str) -> NativeEmbedding:
        """Quantize a plain table into the weight format ``name``. Raises LowbitError if it rescales rows at look-up."""
        if table.max_norm is not None:
            raise LowbitError(f"{name}: expected an embedding without max_norm, got max_norm={table.max_norm}")
        weight = table.weight.detach()
        return cls(quantize(weight, name), weight.dtype).train(table.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int -> [..., embedding_dim]."""
        rows: Tensor = ops.embedding(ids, *ops.parts(self.packed), self.dtype)
        return rows


def unpack_linears(module: nn.Module, dtype: torch.dtype, parents: Iterable[nn.Module] | None = None) -> None:
    """Replace every packed linear inside ``module`` by a plain one in ``dtype``: the weights it stands for, rounded.

    ``parents``: only those that are children of one of these.
    """
    for parent in list(module.modules() if parents is None else parents):
        for name, child in list(parent.named_children()):
            if isinstance(child, NativeLinear):
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                plain.weight = nn.Parameter(child.dequantize(dtype), requires_grad=False)
                if child.bias is not None:
                    plain.bias = nn.Parameter(child.bias.detach().to(dtype), requires_grad=False)
                setattr(parent, name, plain.train(child.training))


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """Every packed linear and embedding of a model, by its path; one that hangs in two places has both paths."""
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if isinstance(module, PackedModule | StreamLinear)}
