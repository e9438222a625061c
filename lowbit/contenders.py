"""Who multiplies in benches/test_kernels.py: rows of the format tables, lowbit's decode kernels by themselves, and
kernels that no row stands for (RSR)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import backends
from lowbit.backends import Shape, native
from lowbit.device import Device
from lowbit.formats import FORMATS, LINEARS, Format, Unmet
from lowbit.kernels import quantize, rsr
from lowbit.kernels import weights as packing
from lowbit.kernels.geometry import MOST_SEQUENCES
from lowbit.kernels.modules import NativeLinear
from lowbit.kernels.stream import LAYOUTS
from lowbit.kernels.stream_product import StreamProduct

PRODUCTS = ("q_proj", "k_proj", "gate_proj", "down_proj", "lm_head")
"""One of each shape: o_proj has q_proj's, v_proj k_proj's, up_proj gate_proj's."""
LIBRARIES = ("torch", "torchao", "gemlite", "bitsandbytes", "lowbit")

Quantizer = Callable[[nn.Linear, Format, torch.dtype], nn.Module]


@dataclass(frozen=True)
class Contender:
    """One way to multiply. ``id`` is its format's, or its own where the format has several kernels. ``mode`` is the one
    of a step that multiplies so, if only one does."""

    id: str
    format: Format
    make: Quantizer
    mode: str = ""

    def unmet(self, device: Device, config: Any) -> Unmet | None:
        """Why it can't multiply here, or None."""
        why = backends.unmet(self.format, device, config)
        if why is None and self.mode == "native":
            why = native.step_unmet(self.format, device, config, MOST_SEQUENCES)
        return why


class RsrLinear(nn.Module):
    """A ternary linear by RSR++, vector by vector: the paper's algorithm has no batch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = quantize(linear.weight.detach(), "ternary")
        self.index = rsr.preprocess(packed)
        self.weight = packing.dequantize(packed).to("cpu")  # to check against; not read by the product

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x [m, k] -> [m, n]."""
        return torch.stack([rsr.matvec(row, self.index) for row in x]).to(x.dtype)


def _by_backend(linear: nn.Linear, fmt: Format, dtype: torch.dtype) -> nn.Module:
    (name,) = fmt.targets
    holder = nn.ModuleDict({name: linear})
    backends.get(fmt.backend).quantize(holder, fmt, dtype)
    return holder[name]


def _native(linear: nn.Linear, fmt: Format, dtype: torch.dtype) -> nn.Module:
    return NativeLinear.from_linear(linear, fmt.scheme)


def _streamed(linear: nn.Linear, fmt: Format, dtype: torch.dtype) -> nn.Module:
    return StreamProduct(quantize(linear.weight.detach(), fmt.scheme))


_extra: dict[str, Contender] = {}


def register(contender: Contender) -> None:
    """Offer one more way to multiply a format. The same id again replaces it."""
    _extra[contender.id] = contender


register(Contender("a16w158_rsr-lowbit", FORMATS["a16w158-lowbit"], lambda linear, fmt, dtype: RsrLinear(linear)))


def contenders() -> list[Contender]:
    """Every row of LIBRARIES that is a product of its own, then lowbit's decode kernels (``a16w4_g128-lowbit-native``;
    its rows by themselves have those of other GPUs), then what was registered beside them.

    Left out: recipes, KV caches, tables, and rows that need a calibration by the whole model.
    """
    rows = [
        row
        for row in FORMATS.values()
        if row.backend in LIBRARIES and set(LINEARS) <= set(row.targets) and not (row.parts or row.kv)
        if not row.calibration_windows and "attention" not in row.options
    ]
    known = [Contender(row.id, row, _native if row.backend == "lowbit" else _by_backend) for row in rows]
    decoding = [
        Contender(f"{row.id}-native", row, _streamed, "native")
        for row in rows
        if row.backend == "lowbit" and row.scheme in LAYOUTS
    ]
    return [*known, *decoding, *_extra.values()]


def products(config: Any) -> list[Shape]:
    """The shapes of a Llama's linears, by the name of the first that has each."""
    found: dict[tuple[int, int], Shape] = {}
    for shape in backends.shapes(replace(FORMATS["bf16-torch"], targets=PRODUCTS), config):
        found.setdefault((shape.n, shape.k), shape)
    return list(found.values())


def ids(known: Sequence[Contender], shapes: Sequence[Shape]) -> list[str]:
    """``a16w4_g128-lowbit-q_proj``: the name of a test."""
    return [f"{contender.id}-{shape.name}" for contender in known for shape in shapes]
