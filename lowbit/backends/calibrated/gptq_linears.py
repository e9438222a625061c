"""GPTQ for the linears of a Llama layer, on the grids of lowbit's own integer formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lowbit.backends import Target
from lowbit.backends.calibrated import gptq
from lowbit.backends.calibrated.layers import Observer, Walk, unit, watched
from lowbit.formats import Format
from lowbit.kernels import Packed, WeightFormat, find, pack, quantize
from lowbit.kernels.modules import NativeLinear

SHARED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears of a Llama layer that see the same input: one matrix of moments, one factor, one pass over the columns."""


def finish(found: Sequence[Target], walk: Walk, layer: nn.Module, fmt: Format) -> list[nn.Module]:
    """A packed linear for each target, in their order."""
    by_name = {target.name: target.linear for target in found}
    together = [[by_name[name] for name in names if name in by_name] for names in SHARED]
    together = [linears for linears in together if linears]
    moments = [gptq.Moments(linears[0].in_features, linears[0].weight.device) for linears in together]
    with watched((linears[0], _adder(each)) for linears, each in zip(together, moments, strict=True)):
        walk.run(layer)
    row = find(fmt.options["stored_as"])
    finished: dict[nn.Module, nn.Module] = {}
    for linears in together:
        packed = _packed(linears, moments.pop(0).sum, row)
        finished |= {linear: NativeLinear(each, linear.bias) for linear, each in zip(linears, packed, strict=True)}
    return [finished[target.linear] for target in found]


def _adder(moments: gptq.Moments) -> Observer:
    return lambda x: moments.add(unit(x))


def _packed(linears: Sequence[nn.Linear], moments: Tensor, row: WeightFormat) -> Iterator[Packed]:
    weight = torch.cat([linear.weight for linear in linears])
    n, k = weight.shape

    def grid(columns: Tensor) -> tuple[Tensor, Tensor]:
        chosen = quantize(columns, row.name)
        assert chosen.scale is not None
        assert chosen.zero is not None
        return chosen.scale.float(), chosen.zero.float()

    group = row.group_size or k
    codes, scale, zero = gptq.quantize(weight, gptq.factor(moments), group, row.levels, grid)
    whole = Packed(row.name, n, k, pack(codes, row.bits), scale.to(row.scale), zero.to(row.zero))
    start = 0
    for linear in linears:
        part = whole.rows(start, start + linear.out_features)
        start += linear.out_features
        yield Packed(part.format, part.n, part.k, **{name: t.clone() for name, t in part.tensors().items()})
