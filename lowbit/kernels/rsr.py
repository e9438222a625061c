"""RSR++: ternary and binary matrix-vector products with fewer additions (Dehghankar, Erfanian, Asudeh, An Efficient
Matrix Multiplication Algorithm for Accelerating Inference in Binary and Ternary Neural Networks, arXiv 2411.06360).

Preprocessing, once per matrix. A ternary W is P - M with binary P and M. Each is cut into blocks of ``width`` rows; in
a block every column is a number of ``width`` bits, and columns of the same number are treated the same. So the columns
are put in the order of their numbers (a permutation), and where each number begins is noted (the full segmentation).

Product with x [k]: x in that order; one sum per segment, u [2^width]; then row i is the sum of those u whose number has
bit i, which RSR++ gets by halving: the odd entries' sum is bit 0's row, pairs are added, and so on. That is
k + 2 · 2^width additions per block instead of k · width.

What it buys: additions, not bytes. The permutation takes 16 bits (32 in PyTorch) per column and block, so 16 / width
bits per weight and binary matrix, against 1 in the packed codes: where memory is the limit, as for a decoded token on a
GPU, it reads more, and gathers x out of order. benches/test_kernels.py measures it beside the packed product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.weights import Packed, code_values, row_chunks

MAX_WIDTH = 16


@dataclass(frozen=True, eq=False)
class BinaryIndex:
    """One binary matrix [n, k], n padded to whole blocks: ``order`` [blocks, k] int32, columns by their number;
    ``starts`` [blocks, 2^width + 1] int64, where each number's columns begin in it."""

    order: Tensor
    starts: Tensor
    width: int


@dataclass(frozen=True, eq=False)
class RsrIndex:
    """A ternary or binary weight [n, k]: where it is +1, where it is -1, and the scale of each row [n] fp32."""

    n: int
    k: int
    plus: BinaryIndex
    minus: BinaryIndex
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """What a product reads, without x."""
        tensors = (self.plus.order, self.plus.starts, self.minus.order, self.minus.starts, self.scale)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def best_width(k: int) -> int:
    """The rows per block of fewest additions, (k + 2·2^width) / width per row (the paper's choice of its k)."""
    return min(range(1, MAX_WIDTH + 1), key=lambda width: (k + 2 * (1 << width)) / width)


def preprocess(packed: Packed, width: int | None = None) -> RsrIndex:
    """The index of a packed ternary or binary weight, on its device. Raises LowbitError on another format."""
    row = packed.row
    if row.rule != "absmean" or packed.scale is None:
        raise LowbitError(f"RSR takes ternary and binary weights, got {packed.format}")
    width = best_width(packed.k) if width is None else width
    if not 1 <= width <= MAX_WIDTH:
        raise LowbitError(f"RSR blocks are 1 to {MAX_WIDTH} rows high, got {width}")
    plus, minus = _columns(packed, width)
    scale = packed.scale.reshape(-1).float()
    return RsrIndex(packed.n, packed.k, _index(plus, width), _index(minus, width), scale)


def _columns(packed: Packed, width: int) -> tuple[Tensor, Tensor]:
    """The number of each column in each block of rows, [blocks, k] int32: of the +1s and of the -1s."""
    row = packed.row
    blocks = -(-packed.n // width)
    numbers = [torch.zeros(blocks, packed.k, dtype=torch.int32, device=packed.codes.device) for _ in range(2)]
    for start, stop in row_chunks(packed.n, packed.k):
        values = code_values(packed.codes[start:stop], row)
        where = torch.arange(start, stop, device=values.device)
        bit = (1 << (where % width)).int().unsqueeze(1)
        for total, sign in zip(numbers, (1, -1), strict=True):
            total.index_add_(0, where // width, (values == sign).int() * bit)
    return numbers[0], numbers[1]


def _index(numbers: Tensor, width: int) -> BinaryIndex:
    ordered, order = numbers.sort(dim=1, stable=True)
    every = torch.arange((1 << width) + 1, dtype=torch.int32, device=numbers.device)
    starts = torch.searchsorted(ordered, every.expand(numbers.shape[0], -1).contiguous())
    return BinaryIndex(order.int(), starts, width)


def _binary_matvec(x: Tensor, index: BinaryIndex) -> Tensor:
    """x [k] fp32 -> [blocks · width]: segmented sums, then RSR++'s halving."""
    blocks, k = index.order.shape
    gathered = x.index_select(0, index.order.view(-1)).view(blocks, k)
    u = torch.segment_reduce(gathered, "sum", offsets=index.starts, axis=1, unsafe=True, initial=0)
    rows = []
    for _ in range(index.width):
        pairs = u.view(blocks, -1, 2)
        rows.append(pairs[..., 1].sum(-1))
        u = pairs.sum(-1)
    return torch.stack(rows, -1).view(-1)


def matvec(x: Tensor, index: RsrIndex) -> Tensor:
    """x [k] -> [n] fp32: the same product as ``weights.matvec`` of the packed weight, summed in another order."""
    wide = x.float()
    difference = _binary_matvec(wide, index.plus) - _binary_matvec(wide, index.minus)
    return difference[: index.n] * index.scale
