"""How the linears of a checkpoint that is quantized already are stored, and words for what its config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Layout = Literal["gptq", "awq", "compressed-tensors"]

GROUPS = (32, 64, 128)
"""Weights that share a scale; -1 in a config, and None here: the whole row."""

Kind = Literal["int", "float"]


@dataclass(frozen=True)
class Inputs:
    """How a linear's inputs are quantized: 8 bits of ``kind``, a float is e4m3.

    ``dynamic``: each token finds its own scale, per ``group_size`` columns or (None) for all; else the checkpoint holds
    one scale per linear.
    """

    kind: Kind
    dynamic: bool
    group_size: int | None = None
    symmetric: bool = True


@dataclass(frozen=True)
class Stored:
    """How the linears of a checkpoint are stored.

    ``symmetric``: one zero point, in the middle of the codes, for all. ``zero_offset`` is added to zero points as they
    are stored: 1 in GPTQ's first layout. ``head``: lm_head is quantized too. ``ordered``: the groups' columns are not
    neighbours, g_idx says which they are (act-order). ``plain``: each weight is an element of its own, an int8 or
    (``kind``) an e4m3, not a field of a 32-bit word. ``per``: what shares a scale where no group does; a block of a
    ``group_size`` columns counts as many rows.
    """

    layout: Layout
    bits: int
    group_size: int | None
    symmetric: bool
    zero_offset: int = 0
    head: bool = False
    ordered: bool = False
    plain: bool = False
    kind: Kind = "int"
    per: Literal["row", "tensor", "block"] = "row"
    inputs: Inputs | None = None

    def __str__(self) -> str:
        group = f"group {self.group_size}" if self.group_size else f"a scale per {self.per}"
        if self.per == "block":
            group = f"blocks of {self.group_size}"
        words = [self.layout, f"{self.bits} bits" + (" e4m3" if self.kind == "float" else ""), group]
        if self.inputs is not None:
            words.append(f"{'dynamic' if self.inputs.dynamic else 'static'} 8-bit inputs")
        return ", ".join(words) + (", act-order" if self.ordered else "")


def number(values: Mapping[str, Any], name: str) -> int:
    """An integer of a config; 0, which nothing allows, for anything else."""
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def group_of(values: Mapping[str, Any]) -> int | None:
    """Its group_size; None: no groups."""
    value = values.get("group_size", -1)
    return None if value in (-1, None) else value if isinstance(value, int) else 0


def unless(problems: list[str], values: Mapping[str, Any], name: str, *allowed: Any) -> None:
    """A problem for an option that is there and none of the allowed."""
    value = values.get(name)
    if value not in (None, *allowed):
        problems.append(f"{name}={value!r}")
