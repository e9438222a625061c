"""Symmetric int4, ternary and binary quantizers of weights and activations, by the papers that proposed them.

Each takes numbers in fp32 and gives whole numbers in fp32 and the scale that they are multiplied by. A group of zeros
gets the scale 0 and the codes that the format has for 0 (binary has none: +1 × 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

INT4_MAX = 7
"""Codes -7 … 7: -8 is left out, so that a number and its negative are kept alike."""


def int4(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Absmax: scale = max|x| / 7, codes round(x / scale) ties to even, of the scale as ``dtype`` stores it.

    x: [..., group] -> codes [..., group] -7 … 7, scale [..., 1]. One rule for weights in groups along K and for
    activations per token and group: Atom (Zhao et al. 2024, arXiv 2310.19102, sections 4.2 and 4.3) has both.
    """
    scale = (x.abs().amax(-1, keepdim=True) / INT4_MAX).to(dtype).float()
    return _divide(x, scale).round().clamp(-INT4_MAX, INT4_MAX), scale


def ternary(x: Tensor, dtype: torch.dtype, dims: tuple[int, ...] = (-1,)) -> tuple[Tensor, Tensor]:
    """Absmean: scale = mean|x|, codes round(x / scale) clipped to -1, 0, 1.

    The weight rule of BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764, equations 1 to 3), over the whole matrix there
    (``dims``); here for activations too, per token: the paper keeps those in 8 bits.
    """
    scale = x.abs().mean(dims, keepdim=True).to(dtype).float()
    return _divide(x, scale).round().clamp(-1, 1), scale


def binary(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale = mean|x|, codes sign(x), +1 for 0: the best binary approximation in the least squares.

    XNOR-Net (Rastegari et al. 2016, arXiv 1603.05279, equation 6 for weights, per output channel; section 3.2 for
    inputs).
    """
    scale = x.abs().mean(-1, keepdim=True).to(dtype).float()
    return torch.where(x.isnan(), x, torch.where(x < 0, -1.0, 1.0)), scale


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    # a scale is 0 only where all of its group are 0, or too small for the scale's type; NaN and Inf stay what they are
    return torch.where(scale == 0, 0.0, x / scale)
