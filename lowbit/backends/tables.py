"""lowbit's own quantized embedding and head alone: rows are gathered, then dequantized, so the table stays packed.

Modules and operations are those of ``lowbit.kernels``. A model that ties its head to its embedding keeps one packed
table for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit import kernels as packing
from lowbit.backends import native
from lowbit.errors import LowbitError
from lowbit.formats import Format, Unmet
from lowbit.formats.row import TABLES
from lowbit.kernels.modules import NativeEmbedding, NativeLinear

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("torch",)


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """Rows of whole groups and whole bytes."""
    return native.requirement(fmt, device, config)


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Replace the target tables among ``module``'s own children; a matrix that two of them share is packed once.

    ``Format.scheme`` is a weight format of lowbit/kernels/weights.py.
    """
    done: dict[int, packing.Packed] = {}
    for name in fmt.targets:
        table = module._modules.get(name)
        if table is None:
            continue
        plain = type(table) in (nn.Linear, nn.Embedding) and getattr(table, "bias", None) is None
        if name not in TABLES or not plain:
            raise LowbitError(
                f"{fmt.id} expects plain {' and '.join(TABLES)} without bias, but {name} is a {type(table).__name__}: "
                "start from a fresh copy of the master for every format"
            )
        weight: Any = table.weight
        if id(weight) not in done:
            done[id(weight)] = packing.quantize(weight.data, fmt.scheme)
        packed = done[id(weight)]
        new = NativeEmbedding(packed, dtype) if isinstance(table, nn.Embedding) else NativeLinear(packed)
        setattr(module, name, new.train(table.training))


def is_quantized(module: nn.Module) -> bool:
    """True for an embedding or a head with packed weights."""
    return isinstance(module, NativeEmbedding) or native.is_quantized(module)


def dequantize(module: nn.Module) -> Tensor:
    """The weights that a table stands for: [n, k] fp32."""
    return native.dequantize(module)


def dequantize_blocks(module: nn.Module, size: int) -> Iterator[Tensor]:
    """The same, some rows of about ``size`` weights after the other."""
    return native.dequantize_blocks(module, size)


def kernels(model: nn.Module, dtype: torch.dtype) -> str:
    """Which kernel multiplies with the head: ``PyTorch reference (1)``."""
    return native.kernels(model, dtype)
