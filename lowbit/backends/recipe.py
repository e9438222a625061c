"""Recipes: each part of a model is given to its own format's backend. The rows are in lowbit/formats/recipes.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit import backends
from lowbit.errors import LowbitError
from lowbit.formats import Format, Unmet, find
from lowbit.formats.auto import SCHEME as AUTO
from lowbit.formats.recipes import assignment, part_of

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("torch",)

MARK = "lowbit_part"
"""Attribute of a module that a recipe quantized: the id of its format."""


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """The first part's reason why it can't run on its own modules, with its format's id in front; none for ``auto``."""
    if fmt.scheme == AUTO:
        return None
    named: dict[str, dict[str, None]] = {}
    for _, name, part in assignment(fmt, config.num_hidden_layers):
        named.setdefault(part, {})[name] = None
    if not named:
        return Unmet("shape", f"{', '.join(fmt.parts)} match nothing in {config.num_hidden_layers} layers")
    for part, names in named.items():
        reason = backends.unmet(replace(find(part), targets=tuple(names)), device, config)
        if reason is not None:
            return Unmet(reason.kind, f"{part}: {reason.reason}")
    return backends.kv_requirement(fmt, device, config)


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Every decoder layer inside ``module``, or embedding and head as its own children, each part by its backend.

    A layer says itself which one it is (transformers' ``self_attn.layer_idx`` and config). Raises LowbitError for an
    ``auto`` row, which names no formats before it was searched for.
    """
    if fmt.scheme == AUTO:
        raise LowbitError(f"{fmt.id} stands for what a search finds: take its recipe file, or Lab.auto.selection()")
    layers = [layer for layer in module.modules() if hasattr(layer, "self_attn") and hasattr(layer, "mlp")]
    for layer in layers:
        attention: Any = layer.self_attn
        index, count = attention.layer_idx, attention.config.num_hidden_layers
        for parent, place in ((layer.self_attn, "self_attn"), (layer.mlp, "mlp")):
            _quantize_children(parent, f"layers.{index}.{place}.", fmt, count, dtype)
    _quantize_children(module, "", fmt, 0, dtype)


def _quantize_children(parent: Any, prefix: str, fmt: Format, layers: int, dtype: torch.dtype) -> None:
    parts: dict[str, list[str]] = {}
    for name in parent._modules:
        if name in fmt.targets and (part := part_of(fmt, prefix + name, layers)):
            parts.setdefault(part, []).append(name)
    for part, names in parts.items():
        row = replace(find(part), targets=tuple(names))
        if row.quantized or names != ["embed_tokens"]:
            backends.get(row.backend).quantize(parent, row, dtype)
    for part, names in parts.items():  # after the last: linears of several parts may have become one stream
        for name in names:
            setattr(getattr(parent, name), MARK, part)


def is_quantized(module: nn.Module) -> bool:
    """True for a module that a recipe gave a format, and that holds that format's weights."""
    part = getattr(module, MARK, None)
    return part is not None and backends.get(find(part).backend).is_quantized(module)


def parts_of(model: nn.Module, fmt: Format) -> Iterator[tuple[str, nn.Module, Format]]:
    """(path, module, its format) of all that the recipe names in a whole model. LowbitError for what is not there."""
    config: Any = model.config
    modules = dict(model.named_modules())
    for path, _, part in assignment(fmt, config.num_hidden_layers):
        if path not in modules:
            raise LowbitError(f"{fmt.id} names {path}, which the model does not have")
        if find(part).quantized or not isinstance(modules[path], nn.Embedding):  # a plain table is no linear
            yield path, modules[path], find(part)
