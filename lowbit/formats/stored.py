"""Checkpoints that are quantized already: what a config.json says of them, and the row that loads them as they are.

Published layouts that are read: GPTQ (AutoGPTQ 0.7, GPTQModel 7.7: ``gptq`` and ``gptq_v2``, act-order too), AWQ
(AutoAWQ 0.2: GEMM) and compressed-tensors 0.20 (``pack-quantized``; ``int-quantized``, ``float-quantized`` and
``naive-quantized`` with 8-bit weights, inputs in 16 or 8 bits). lowbit/prequantized.py reads the tensors; transformers
5.23 would need gptqmodel and optimum for the first two, which compile kernels, and decompress the third one on its
first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lowbit.errors import LowbitError
from lowbit.formats import compressed
from lowbit.formats.layouts import GROUPS, Layout, Stored, group_of, number, unless
from lowbit.formats.row import FP16_FIRST, LINEARS, Format, row

BITS: dict[Layout, tuple[int, ...]] = {"gptq": (2, 3, 4, 8), "awq": (4,), "compressed-tensors": (2, 4, 8)}
"""compressed-tensors packed 3-bit numbers with and without gaps, and its files don't say which."""

SHORT: dict[Layout, str] = {"gptq": "gptq", "awq": "awq", "compressed-tensors": "ct"}


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
    able = (8,) if stored.plain else BITS[stored.layout]
    if stored.bits not in able:
        problems.append(f"bits={stored.bits} (expected one of {', '.join(map(str, able))})")
    groups = (128,) if stored.kind == "float" else GROUPS
    if stored.group_size is not None and stored.group_size not in groups:
        problems.append(f"group_size={stored.group_size} (expected -1 or one of {', '.join(map(str, groups))})")
    if problems:
        raise LowbitError(
            f"{where}: lowbit can't read this {method} checkpoint: {'; '.join(problems)}. Give one without, or the "
            "unquantized weights"
        )
    return stored


def _attribute(config: Any) -> Any:
    return getattr(config, "quantization_config", None)


def _gptq(values: Mapping[str, Any]) -> tuple[Stored, list[str]]:
    problems: list[str] = []
    layout = values.get("checkpoint_format") or values.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        problems.append(f"checkpoint_format={layout!r} (expected 'gptq' or 'gptq_v2')")
    unless(problems, values, "dynamic", {})
    unless(problems, values, "pack_dtype", "int32")
    unless(problems, values, "is_marlin_format", False)
    stored = Stored(
        *("gptq", number(values, "bits"), group_of(values), bool(values.get("sym", True))),
        zero_offset=1 if layout == "gptq" else 0,
        head=bool(values.get("lm_head")),
        ordered=bool(values.get("desc_act")) and group_of(values) is not None,
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
    return Stored("awq", number(values, "bits"), group_of(values), symmetric=False), problems


READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Stored, list[str]]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": compressed.read,
}
"""By ``quant_method``."""


def streamed_as(stored: Stored) -> str | None:
    """The storage (lowbit/kernels/weights.py) in which the linears feed lowbit's own decode kernels, or None."""
    if stored.ordered or stored.inputs is not None or not stored.symmetric:
        return None
    if stored.kind == "float":
        return None if stored.group_size else "fp8_e4m3"
    return {(4, 128): "int4_sym_g128", (8, None): "int8"}.get((stored.bits, stored.group_size))


def as_rows(stored: Stored) -> tuple[Format, ...]:
    """A checkpoint's rows: as it is, and with a head in as many bits for the decode kernels, which want it packed."""
    own, native = as_row(stored), streamed_as(stored)
    if native is None or stored.head:
        return (own,)
    with_head = replace(
        own,
        name=f"{own.name}_head{stored.bits}",
        targets=(*own.targets, "lm_head"),
        options={"head": native},
        fast=True,
        modes=("eager", "native"),
        note=f"the checkpoint's own codes and scales, bit for bit, and the head rounded to {native} by lowbit",
        **FP16_FIRST,
    )
    return own, with_head


def as_row(stored: Stored) -> Format:
    """The row that multiplies with the linears exactly as they are stored."""
    native, inputs = streamed_as(stored), stored.inputs
    decodes = native is not None and stored.head
    scaled = inputs is not None and stored.kind == "float" and not (stored.group_size or inputs.group_size)
    note = "the checkpoint's own codes and scales, bit for bit; quality is taken against what they stand for"
    if inputs is not None:
        note = f"{note}; inputs in 8 bits, {'dynamic' if inputs.dynamic else 'by their stored scale'}"
    return row(
        _name(stored),
        "checkpoint",
        native or stored.layout,
        (8 if inputs else 16, stored.bits),
        *(f"int{stored.bits}",) if stored.kind == "int" else ("fp8", "float8"),
        stored.layout,
        "calibrated",
        group_size=stored.group_size,
        targets=(*LINEARS, "lm_head") if stored.head else LINEARS,
        fast=decodes or scaled,
        modes=("eager", "native") if decodes else ("eager", "reduce-overhead") if inputs else ("eager",),
        note=f"{note}; columns are put in the order of their groups at every product" if stored.ordered else note,
        **(FP16_FIRST if decodes else {}),
    )


def _name(stored: Stored) -> str:
    words = [f"a{8 if stored.inputs else 16}w{stored.bits}", SHORT[stored.layout]]
    if stored.plain:
        words.append("fp8" if stored.kind == "float" else "int8")
    if stored.inputs is not None:
        words.append("dynamic" if stored.inputs.dynamic else "static")
    if stored.group_size:
        words.append(f"{'block' if stored.per == 'block' else 'g'}{stored.group_size}")
    return "_".join([*words, *["act"] * stored.ordered, *["head"] * stored.head])
