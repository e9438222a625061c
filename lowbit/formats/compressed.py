"""What a config of compressed-tensors 0.20 says (quantization/quant_args.py, quant_scheme.py there)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.formats.layouts import GROUPS, Inputs, Stored, group_of, number, unless

PLAIN: dict[str, tuple[str, ...]] = {
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}
"""Formats of compressed-tensors that store each weight as an element of its own, and the types that they may have."""


def read(values: Mapping[str, Any]) -> tuple[Stored, list[str]]:
    """How the linears are stored, and what of it lowbit can't read."""
    problems: list[str] = []
    groups = list(dict(values.get("config_groups") or {}).values())
    if len(groups) != 1 or not isinstance(groups[0], Mapping):
        problems.append(f"{len(groups)} config_groups (expected one, written out)")
    group: Mapping[str, Any] = groups[0] if groups and isinstance(groups[0], Mapping) else {}
    weights: Mapping[str, Any] = group.get("weights") or {}
    layout = str(group.get("format") or values.get("format"))
    if layout not in ("pack-quantized", *PLAIN):
        problems.append(f"format={layout!r} (expected one of pack-quantized, {', '.join(PLAIN)})")
    unless(problems, group, "output_activations")
    unless(problems, values, "kv_cache_scheme")
    if dict(values.get("sparsity_config") or {}).get("format", "dense") != "dense":
        problems.append("sparsity_config")
    kinds = PLAIN.get(layout, ("int",))
    if weights.get("type", "int") not in kinds:
        problems.append(f"type={weights.get('type')!r} (expected {' or '.join(map(repr, kinds))} in {layout})")
    if layout not in PLAIN:
        unless(problems, group, "input_activations")
        return _in_words(weights, problems), problems
    return _plain(weights, group.get("input_activations"), problems), problems


def _in_words(weights: Mapping[str, Any], problems: list[str]) -> Stored:
    strategy = weights.get("strategy") or ("group" if group_of(weights) else "channel")
    if strategy not in ("group", "channel"):
        problems.append(f"strategy={strategy!r} (expected 'group' or 'channel')")
    order = weights.get("actorder")
    if order not in (None, False, True, "weight", "static", "group", "dynamic"):
        problems.append(f"actorder={order!r} (expected 'weight' or 'group')")
    size = group_of(weights) if strategy == "group" else None
    return Stored(
        *("compressed-tensors", number(weights, "num_bits"), size, weights.get("symmetric", True) is not False),
        ordered=order in (True, "group", "dynamic") and size is not None,
    )


def _plain(weights: Mapping[str, Any], inputs: Any, problems: list[str]) -> Stored:
    size, kind = group_of(weights), weights.get("type", "int")
    strategy = weights.get("strategy") or (
        "group" if size else "channel" if weights.get("group_size") == -1 else "tensor"
    )
    symmetric = weights.get("symmetric", True) is not False
    if strategy not in ("group", "channel", "tensor", "block"):
        problems.append(f"strategy={strategy!r} (expected 'group', 'channel', 'tensor' or 'block')")
    if strategy == "block":
        blocks = weights.get("block_structure")
        size = 128
        if blocks != [128, 128] or kind != "float":
            problems.append(f"block_structure={blocks!r} of {kind} (expected [128, 128] of float)")
    if strategy == "group" and size is None:
        problems.append("strategy='group' without group_size")
    if kind == "float" and not symmetric:
        problems.append("symmetric=False of float weights")
    if weights.get("dynamic"):
        problems.append("dynamic weights")
    if weights.get("actorder") in (True, "group", "dynamic"):
        problems.append(f"actorder={weights.get('actorder')!r} of unpacked weights")
    per: dict[Any, Any] = {"tensor": "tensor", "block": "block"}
    return Stored(
        *("compressed-tensors", number(weights, "num_bits"), size if strategy in ("group", "block") else None),
        symmetric,
        plain=True,
        kind="float" if kind == "float" else "int",
        per=per.get(strategy, "row"),
        inputs=_inputs(inputs, problems) if inputs is not None else None,
    )


def _inputs(values: Mapping[str, Any], problems: list[str]) -> Inputs:
    kind, dynamic, strategy = values.get("type", "int"), values.get("dynamic", False), values.get("strategy")
    size, symmetric = group_of(values), values.get("symmetric", True) is not False
    strategy = strategy or ("group" if size else "token" if dynamic else "tensor")
    told = f"input_activations of type={kind!r}, strategy={strategy!r}, dynamic={dynamic!r}"
    if kind not in ("int", "float") or number(values, "num_bits") != 8 or (kind == "float" and not symmetric):
        problems.append(f"{told}, num_bits={values.get('num_bits')!r} (expected 8 bits, a float symmetric)")
    elif (dynamic, strategy) not in ((True, "token"), (True, "group"), (False, "tensor")):
        problems.append(f"{told} (expected dynamic per token or group, or static per tensor)")
    elif strategy == "group" and size not in GROUPS:
        problems.append(f"{told}, group_size={size} (expected one of {', '.join(map(str, GROUPS))})")
    size = size if strategy == "group" else None
    return Inputs("float" if kind == "float" else "int", bool(dynamic), size, symmetric)
