"""lowbit's own kernels: weight formats, packing, and the operations on packed weights, defined in plain PyTorch."""

from __future__ import annotations

from lowbit.kernels import triton_linear as triton_linear  # registers its kernels
from lowbit.kernels.bits import pack, unpack
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.weights import (
    WEIGHT_FORMATS,
    Packed,
    WeightFormat,
    dequantize,
    embedding,
    find,
    matmul,
    matvec,
    specs,
)

__all__ = [
    "WEIGHT_FORMATS",
    "Packed",
    "WeightFormat",
    "dequantize",
    "embedding",
    "find",
    "matmul",
    "matvec",
    "pack",
    "quantize",
    "specs",
    "unpack",
]
