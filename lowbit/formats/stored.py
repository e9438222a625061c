"""Checkpoints that are quantized already: what a config.json says of them, and the row that loads them as they are.

Published layouts that are read: GPTQ (AutoGPTQ 0.7, GPTQModel 7.7: ``gptq`` and ``gptq_v2``), AWQ (AutoAWQ 0.2: GEMM)
and compressed-tensors 0.20 (``pack-quantized``). lowbit/prequantized.py reads the tensors; transformers 5.23 would need
gptqmodel and optimum for the first two, which compile kernels, and decompress the third one on its first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowbit.errors import LowbitError
from lowbit.formats.row import FP16_FIRST, LINEARS, Format, row

Layout = Literal["gptq", "awq", "compressed-tensors"]

GROUPS = (32, 64, 128)
"""Weights that share a scale; -1 in a config, and None here: the whole row."""

BITS: dict[Layout, tuple[int, ...]] = {"gptq": (2, 3, 4, 8), "awq": (4,), "compressed-tensors": (2, 4, 8)}
"""compressed-tensors packed 3-bit numbers with and without gaps, and its files don't say which."""

SHORT: dict[Layout, str] = {"gptq": "gptq", "awq": "awq", "compressed-tensors": "ct"}


@dataclass(frozen=True)
class Stored:
    """How the linears of a checkpoint are stored.

    ``symmetric``: one zero point, in the middle of the codes, for all. ``zero_offset`` is added to zero points as they
    are stored: 1 in GPTQ's first layout. ``head``: lm_head is quantized too.
    """

    layout: Layout
    bits: int
    group_size: int | None
    symmetric: bool
    zero_offset: int = 0
    head: bool = False

    def __str__(self) -> str:
        group = f"group {self.group_size}" if self.group_size else "a scale per row"
        return f"{self.layout}, {self.bits} bits, {group}"


def read(config: Any, where: str) -> Stored | None:
    """What a config says (``quantization_config``, a dict), None if the checkpoint is not quantized.

    Raises LowbitError that names every option which lowbit can't read.
    """
    found = config.get("quantization_config") if isinstance(config, Mapping) else _attribute(config)
    if found is None:
        return None
    method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
    reader = READERS.get(str(method).lower())
    if reader is None:
        raise LowbitError(
            f"{where}: the checkpoint is already quantized ({method}), by none of {', '.join(READERS)}, which lowbit "
            "reads; give the unquantized weights"
        )
    stored, problems = reader(found)
    if stored.bits not in BITS[stored.layout]:
        problems.append(f"bits={stored.bits} (expected one of {', '.join(map(str, BITS[stored.layout]))})")
    if stored.group_size is not None and stored.group_size not in GROUPS:
        problems.append(f"group_size={stored.group_size} (expected -1 or one of {', '.join(map(str, GROUPS))})")
    if problems:
        raise LowbitError(
            f"{where}: lowbit can't read this {method} checkpoint: {'; '.join(problems)}. Give one without, or the "
            "unquantized weights"
        )
    return stored


def _attribute(config: Any) -> Any:
    return getattr(config, "quantization_config", None)


def _number(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _group(values: Mapping[str, Any]) -> int | None:
    value = values.get("group_size", -1)
    return None if value in (-1, None) else value if isinstance(value, int) else 0


def _unless(problems: list[str], values: Mapping[str, Any], name: str, *allowed: Any) -> None:
    value = values.get(name)
    if value not in (None, *allowed):
        problems.append(f"{name}={value!r}")


def _gptq(values: Mapping[str, Any]) -> tuple[Stored, list[str]]:
    problems: list[str] = []
    layout = values.get("checkpoint_format") or values.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        problems.append(f"checkpoint_format={layout!r} (expected 'gptq' or 'gptq_v2')")
    if values.get("desc_act") and _group(values) is not None:
        problems.append("desc_act=True (columns in another order than their groups: g_idx)")
    _unless(problems, values, "dynamic", {})
    _unless(problems, values, "pack_dtype", "int32")
    _unless(problems, values, "is_marlin_format", False)
    stored = Stored(
        *("gptq", _number(values, "bits"), _group(values), bool(values.get("sym", True))),
        zero_offset=1 if layout == "gptq" else 0,
        head=bool(values.get("lm_head")),
    )
    return stored, problems


def _awq(values: Mapping[str, Any]) -> tuple[Stored, list[str]]:
    problems: list[str] = []
    version = str(values.get("version") or values.get("format") or "gemm").lower()
    if version != "gemm":
        problems.append(f"version={version!r} (expected 'gemm')")
    if values.get("zero_point", True) is not True:
        problems.append("zero_point=False")
    left = [name for name in values.get("modules_to_not_convert") or () if name != "lm_head"]
    if left:
        problems.append(f"modules_to_not_convert={left!r}")
    return Stored("awq", _number(values, "bits"), _group(values), symmetric=False), problems


def _compressed(values: Mapping[str, Any]) -> tuple[Stored, list[str]]:
    problems: list[str] = []
    groups = list(dict(values.get("config_groups") or {}).values())
    if len(groups) != 1 or not isinstance(groups[0], Mapping):
        problems.append(f"{len(groups)} config_groups (expected one, written out)")
    group: Mapping[str, Any] = groups[0] if groups and isinstance(groups[0], Mapping) else {}
    weights: Mapping[str, Any] = group.get("weights") or {}
    layout = group.get("format") or values.get("format")
    if layout != "pack-quantized":
        problems.append(f"format={layout!r} (expected 'pack-quantized')")
    for name in ("input_activations", "output_activations"):
        _unless(problems, group, name)
    _unless(problems, values, "kv_cache_scheme")
    if dict(values.get("sparsity_config") or {}).get("format", "dense") != "dense":
        problems.append("sparsity_config")
    if weights.get("type", "int") != "int":
        problems.append(f"type={weights.get('type')!r} (expected 'int')")
    strategy = weights.get("strategy") or ("group" if _group(weights) else "channel")
    if strategy not in ("group", "channel"):
        problems.append(f"strategy={strategy!r} (expected 'group' or 'channel')")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        problems.append(f"actorder={weights.get('actorder')!r} (columns in another order than their groups)")
    size = _group(weights) if strategy == "group" else None
    symmetric = weights.get("symmetric", True) is not False
    return Stored("compressed-tensors", _number(weights, "num_bits"), size, symmetric), problems


READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Stored, list[str]]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
"""By ``quant_method``."""


NATIVE = "int4_sym_g128"
"""The storage (lowbit/kernels/weights.py) in which symmetric 4-bit groups of 128 feed lowbit's own decode kernels."""


def as_rows(stored: Stored) -> tuple[Format, ...]:
    """A checkpoint's rows: as it is, and with its head in 4 bits, for the decode kernels, which take one format."""
    own = as_row(stored)
    if own.scheme != NATIVE or stored.head:
        return (own,)
    with_head = replace(
        own,
        name=f"{own.name}_head4",
        targets=(*own.targets, "lm_head"),
        options={"head": NATIVE},
        fast=True,
        modes=("eager", "native"),
        note="the checkpoint's own codes and scales, bit for bit, and the head rounded to int4_sym_g128 by lowbit",
        **FP16_FIRST,
    )
    return own, with_head


def as_row(stored: Stored) -> Format:
    """The row that multiplies with the linears exactly as they are stored."""
    native = stored.symmetric and (stored.bits, stored.group_size) == (4, 128)
    size = (f"_g{stored.group_size}" if stored.group_size else "") + ("_head" if stored.head else "")
    return row(
        f"a16w{stored.bits}_{SHORT[stored.layout]}{size}",
        "checkpoint",
        NATIVE if native else stored.layout,
        (16, stored.bits),
        f"int{stored.bits}",
        stored.layout,
        "calibrated",
        group_size=stored.group_size,
        targets=(*LINEARS, "lm_head") if stored.head else LINEARS,
        fast=native and stored.head,
        modes=("eager", "native") if native and stored.head else ("eager",),
        note="the checkpoint's own codes and scales, bit for bit; quality is taken against what they stand for",
        **(FP16_FIRST if native and stored.head else {}),
    )
