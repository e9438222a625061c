"""ReferenceLinear: a linear whose weight is kept packed, and dequantized anew by each call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.reference.scheme import SCHEMES


class ReferenceLinear(nn.Module):
    """y = Q(x) · dequantize()ᵀ + bias, in the type of x; no more of the weight is kept than ``packed`` and ``scale``.

    The products are of numbers on the low-bit grids, rounded to x's type (bf16 keeps the 6-bit floats and their
    power-of-two scales exactly), and summed as that type's matrix product sums.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, scheme: str, group_size: int | None) -> None:
        """Quantize the weight of ``linear`` where it lies. Raises LowbitError for NaN and Inf."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = scheme
        self.group_size = group_size or linear.in_features
        weight = linear.weight.detach()
        if not torch.isfinite(weight).all():
            raise LowbitError(f"{scheme}: expected finite weights, got NaN or Inf in a {list(weight.shape)} linear")
        packed, scale = SCHEMES[scheme].encode(weight.float(), self.group_size, weight.dtype)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantize(self) -> Tensor:
        """What the stored weight stands for: [out_features, in_features] fp32."""
        return SCHEMES[self.scheme].decode(self.packed, self.scale, self.in_features)

    def quantize_activations(self, x: Tensor) -> Tensor:
        """What of x enters the product: the same shape, in x's type. NaN and Inf make NaN of their group."""
        activations = SCHEMES[self.scheme].activations
        return x if activations is None else activations(x.float(), self.group_size).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(self.quantize_activations(x), self.dequantize().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"
