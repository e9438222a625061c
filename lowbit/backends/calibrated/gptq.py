"""GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1): columns are rounded one after another, and what each loses
is made up for by the columns that are still to come, as the second moments of the layer's inputs say.

Plain PyTorch on any device. torchao 0.18 has the algorithm for CUDA alone, and its int4 only with mslk
(torchao/prototype/gptq/api.py); GPTQModel 7.7 and llm-compressor 0.14 ask for other torch and transformers versions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.errors import LowbitError

DAMPING = 0.1
"""Share of the mean diagonal that is added to the diagonal. The paper has 0.01; on the embedded model 0.03, 0.1 and 0.3
gave a KL of 0.00102, 0.00104 and 0.00104 at 4 bits, 0.00427, 0.00401 and 0.00397 at 3 (32 windows, 16 scored)."""

BLOCK = 128
"""Columns whose corrections to the rest of the matrix are added together, the paper's B."""

Grid = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A group of columns [n, group] fp32 -> scale and zero [n, 1] fp32: a weight is code * scale + zero."""


class Rounded(NamedTuple):
    """codes [n, k] uint8; scale and zero [n, groups] fp32."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


class Moments:
    """Second moments of a linear's inputs, sum of x xᵀ: [k, k] fp32."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.sum = torch.zeros(k, k, device=device)

    def add(self, x: Tensor) -> None:
        """x: [..., k]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)


def factor(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moments [k, k]: fp32, worked out in fp64.

    Inputs that are always zero get a moment of their own, so that there is an inverse; nothing is moved onto them.
    Raises LowbitError if the moments are not finite.
    """
    wide = moments.double()
    diagonal = wide.diagonal()
    if not torch.isfinite(diagonal).all():
        raise LowbitError("GPTQ: expected finite inputs, got NaN or Inf on the calibration text")
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()


def quantize(weight: Tensor, upper: Tensor, group_size: int, levels: int, grid: Grid) -> Rounded:
    """Round a weight [n, k] to codes 0 … ``levels``; ``upper`` is ``factor`` of its inputs' moments.

    Scale and zero of a group are chosen when its first column's turn has come, from what its columns are by then.
    """
    left = weight.float().clone()  # what is still to be represented
    n, k = left.shape
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        lost = torch.zeros(n, stop - start, device=weight.device)
        for column in range(start, stop):
            if column % group_size == 0:
                # the block's later columns have their corrections; those beyond it must have them for a wider group
                scale, zero = grid(_corrected(left, lost, upper, start, stop, column + group_size)[:, column:])
                scales.append(scale)
                zeros.append(zero)
            code = ((left[:, column : column + 1] - zero) / scale).nan_to_num_().round().clamp(0, levels)
            codes[:, column] = code[:, 0].to(torch.uint8)
            error = (left[:, column : column + 1] - (code * scale + zero)) / upper[column, column]
            left[:, column:stop] -= error * upper[column, column:stop]
            lost[:, column - start] = error[:, 0]
        left[:, stop:] -= lost @ upper[start:stop, stop:]
    return Rounded(codes, torch.cat(scales, 1), torch.cat(zeros, 1))


def _corrected(left: Tensor, lost: Tensor, upper: Tensor, start: int, stop: int, until: int) -> Tensor:
    """Columns 0 … ``until`` with what the block at hand owes to those beyond it."""
    if until <= stop:
        return left[:, :until]
    return torch.cat((left[:, :stop], left[:, stop:until] - lost @ upper[start:stop, stop:until]), 1)
