"""AWQ (Lin et al. 2024, arXiv 2306.00978) by torchao's own flow: inputs are scaled by channel, so that the weights that
large inputs meet lose less; the scales are searched for, one linear at a time, on the output that they give.

torchao divides the inputs in each forward pass (torchao 0.18, prototype/awq/api.py: ``act_pre_scale``), where AWQ's
authors fold the scales into the operation before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backends import Target
from lowbit.backends.calibrated.layers import Observer, Walk, unit, watched
from lowbit.backends.torchao.configs import make
from lowbit.backends.torchao.unpacking import dequantize as unpacked
from lowbit.formats import Format
from lowbit.quiet import quiet_import


def finish(found: Sequence[Target], walk: Walk, layer: nn.Module, fmt: Format) -> list[nn.Module]:
    """torchao's linear for each target, in their order."""
    api, awq = quiet_import("torchao.quantization"), quiet_import("torchao.prototype.awq")
    chosen = {id(target.linear) for target in found}
    base = make(replace(fmt, scheme=fmt.options["stored_as"]), found[0].linear)
    inputs = _inputs(found, walk, layer)
    weight = found[0].linear.weight
    # Each linear that torchao makes draws weights of its own first.
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        api.quantize_(layer, awq.AWQConfig(base, step="prepare"), filter_fn=lambda module, _: id(module) in chosen)
        for target, seen in zip(found, inputs, strict=True):
            getattr(target.parent, target.name)(torch.cat(seen))
        observed = {id(getattr(target.parent, target.name)) for target in found}
        api.quantize_(layer, awq.AWQConfig(base, step="convert"), filter_fn=lambda module, _: id(module) in observed)
    return [getattr(target.parent, target.name) for target in found]


def _inputs(found: Sequence[Target], walk: Walk, layer: nn.Module) -> list[list[Tensor]]:
    """Of each target, by window [1, window, k]: the vectors that its search is to take for the layer's inputs."""
    inputs: list[list[Tensor]] = [[] for _ in found]
    with watched((target.linear, _keeper(seen)) for target, seen in zip(found, inputs, strict=True)):
        walk.run(layer)
    return inputs


def _keeper(seen: list[Tensor]) -> Observer:
    return lambda x: seen.append(unit(x))


def dequantize(module: nn.Module) -> Tensor:
    """[n, k] fp32: what torchao's tensor holds times the scale of its inputs."""
    weight: Any = module.weight
    stored = unpacked(module)
    return stored if weight.act_pre_scale is None else stored * weight.act_pre_scale.float()
