"""One linear by the decode kernels of mode ``native``, alone: what benches/test_kernels.py times of them.

One vector by cuda/product.cu, 2 to 8 by cuda/batch.cu in slices of K, from a stream of the linear's own. x comes in 16
bits, as o's and down's does in a step; there a norm is part of the other products, and here of none.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import batch, product_launch
from lowbit.kernels.geometry import MOST_SEQUENCES, RING_BYTES, Geometry
from lowbit.kernels.launch import Launch, Module, compile_module
from lowbit.kernels.stream import TILE, pack_stream
from lowbit.kernels.stream_modules import StreamLinear, StreamPart
from lowbit.kernels.weights import Packed

ALONE, SLICED = "product_kernel<QDIM, false, TO_ACT>", "o"
"""The kernel for one vector, and whose is that for several (batch.PRODUCTS)."""
HEAD_DIM = 128
"""Attention's, which these sources are compiled with too, and which none of these kernels reads."""


def shape_of(format: str, k: int, batch: int = 1) -> Geometry:
    """What the kernels are compiled for: of a model, they read its widths alone, and all are K here."""
    return Geometry(format, k, k, k // HEAD_DIM, k // HEAD_DIM, HEAD_DIM, 1e-5, batch=batch)


def kernel(shape: Geometry) -> str:
    """The one that multiplies this many sequences."""
    return ALONE if shape.batch == 1 else batch.PRODUCTS[SLICED]


@cache
def load(shape: Geometry, device: int) -> Module:
    """Its kernel, compiled or from the cache, on this device; once per process."""
    return compile_module(("ptx", *product_launch.sources(shape.batch)), (kernel(shape),), shape.macros(), device)


class StreamProduct(StreamLinear):
    """Weights [n, k] of a streamed format, multiplied by the decode kernels with 1 to 8 vectors.

    ``launch`` is a kernel by itself, as a step has it; calling the module gives the product. x [m, k] is in the
    format's dtype of activations (Geometry.dtype); every x that it was given is kept, for its address is a kernel's
    argument. Raises LowbitError for another dtype and for more vectors.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__(StreamPart(pack_stream(packed), packed.n))
        self.dtype = shape_of(self.format, self.k).dtype
        self._made: dict[tuple[int, int], tuple[Launch, Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Of the stream and the rows' scales beside it."""
        scale = self.part.stream.row_scale
        return self.part.stream.data.nbytes + (0 if scale is None else scale.nbytes)

    def launch(self, x: Tensor) -> Tensor:
        """x [m, k] -> what the kernel leaves, in memory that the next launch with this x overwrites: of one vector
        [1, n] in x's dtype, of several fp32 [slices, m, n], which are still to be added."""
        key = x.data_ptr(), len(x)
        if key not in self._made:
            self._made[key] = (*self._prepared(x), x)
        made, out, _ = self._made[key]
        made.launch()
        return out

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [m, k] -> [m, n] in x's dtype."""
        out = self.launch(x)
        return out.clone() if len(x) == 1 else out.sum(0).to(x.dtype)

    def _prepared(self, x: Tensor) -> tuple[Launch, Tensor]:
        if not 1 <= len(x) <= MOST_SEQUENCES or x.dtype != self.dtype or not x.is_contiguous():
            raise LowbitError(
                f"the decode kernels multiply {self.format} with 1 to {MOST_SEQUENCES} vectors in {self.dtype}, "
                f"one behind the other, got {len(x)} in {x.dtype}{'' if x.is_contiguous() else ' with gaps'}"
            )
        count, stream = len(x), self.part.stream
        shape = shape_of(self.format, self.k, count)
        module = load(shape, x.device.index or 0)
        if count == 1:
            padded = torch.empty(stream.tiles * TILE, dtype=x.dtype, device=x.device)
            fields = product_launch.operands(stream, x, padded)
            made = product_launch.alone(module, ALONE, shape, stream, fields, RING_BYTES)
            return made, padded[: self.n].view(1, -1)
        slices = batch.slices(self.format, self.k)
        parts = torch.empty(slices, count, self.n, dtype=torch.float32, device=x.device)
        fields = product_launch.operands(stream, x, parts)
        return product_launch.several(module, SLICED, shape, stream, fields), parts
