"""The tensors of each published layout: which there must be, of which shape and type, and how codes come out of them.

All say w = (code - zero point) · scale; words have 32 bits and are little-endian:

- GPTQ: ``qweight`` [k·bits/32, n] packed along k, ``qzeros`` [groups, n·bits/32] along n, ``scales`` [groups, n], and
  ``g_idx`` [k], each column's group. (AutoGPTQ 0.7 nn_modules/qlinear/qlinear_cuda_old.py, GPTQModel 7.7
  nn_modules/qlinear/__init__.py.) Its first version stores zero points less one and wraps round.
- AWQ: ``qweight`` [k, n/8] and ``qzeros`` [groups, n/8], both along n, columns of a word in the order 0 2 4 6 1 3 5 7;
  ``scales`` [groups, n]. (AutoAWQ 0.2 utils/packing_utils.py.)
- compressed-tensors in words: ``weight_packed`` [n, k·bits/32] along k, ``weight_scale`` [n, groups], ``weight_shape``
  [2] and, where it is not symmetric, ``weight_zero_point`` [n·bits/32, groups] along n (int8 [n, groups] in older
  files, which then are signed), where its groups are out of order ``weight_g_idx`` [k]. (compressed_tensors 0.20
  compressors/pack_quantized.)
- compressed-tensors, plain: ``weight`` [n, k] in int8 or e4m3, ``weight_scale`` [n, 1], [1], [n, groups] or one per
  block, ``weight_zero_point`` where it is not symmetric; ``input_scale`` [1], ``input_zero_point`` of static inputs.
  (compressed_tensors 0.20 compressors/naive_quantized/base.py.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit import checkpoint
from lowbit.checkpoint import Entry
from lowbit.errors import LowbitError
from lowbit.formats.layouts import Inputs, Stored
from lowbit.kernels import bits as packing
from lowbit.kernels import weights

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of a word's i-th four bits."""

SCALES = (torch.float16, torch.bfloat16)
"""Products with a code are exact in fp32 for these only."""

ANY_SCALE = (*SCALES, torch.float32)

BLOCK = 128
"""Rows of a block."""


class Expected(NamedTuple):
    """The shapes and the types that a part may have; the first shape is today's."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


def parts_of(stored: Stored) -> tuple[str, ...]:
    """What every quantized linear must have."""
    zero = () if stored.symmetric else ("weight_zero_point",)
    if stored.plain:
        return ("weight", "weight_scale", *zero, *_input_parts(stored.inputs))
    if stored.layout == "compressed-tensors":
        return ("weight_packed", "weight_scale", "weight_shape", *zero, *["weight_g_idx"] * stored.ordered)
    return ("qweight", "qzeros", "scales", *["g_idx"] * stored.ordered)


def _input_parts(inputs: Inputs | None) -> tuple[str, ...]:
    if inputs is None or inputs.dynamic:
        return ()
    return ("input_scale",) if inputs.symmetric else ("input_scale", "input_zero_point")


def known_parts(stored: Stored) -> tuple[str, ...]:
    """These, and what else it may have."""
    more: dict[str, tuple[str, ...]] = {"gptq": ("g_idx",), "awq": (), "compressed-tensors": ("weight_zero_point",)}
    if stored.layout == "compressed-tensors" and not stored.plain:
        more["compressed-tensors"] += ("weight_g_idx",)
    return tuple(dict.fromkeys((*parts_of(stored), *more[stored.layout])))


def expected(stored: Stored, n: int, k: int, parts: Mapping[str, Entry]) -> dict[str, Expected]:
    """Of a linear [n, k], by the part's name."""
    groups, words, int32 = (k // stored.group_size if stored.group_size else 1), stored.bits, (torch.int32,)
    if stored.plain:
        return _expected_plain(stored, n, k, groups)
    if stored.layout == "compressed-tensors":
        return {
            "weight_packed": Expected(((n, k * words // 32),), int32),
            "weight_scale": Expected(((n, groups),), SCALES),
            "weight_shape": Expected(((2,),), (torch.int64, torch.int32)),
            "weight_zero_point": _zero_point(parts, n, groups, words),
            "weight_g_idx": Expected(((k,),), int32),
        }
    rows = {"gptq": (k * words // 32, n), "awq": (k, n // 8)}[stored.layout]
    return {
        "qweight": Expected((rows,), int32),
        "qzeros": Expected(((groups, n * words // 32),), int32),
        "scales": Expected(((groups, n),), SCALES),
        "g_idx": Expected(((k,),), int32),
    }


def _expected_plain(stored: Stored, n: int, k: int, groups: int) -> dict[str, Expected]:
    scales: dict[str, tuple[tuple[int, ...], ...]] = {
        "row": ((n, 1), (n,)) if groups == 1 else ((n, groups),),
        "tensor": ((1,), (), (1, 1)),
        "block": ((-(-n // BLOCK), groups),),
    }
    exact = stored.kind == "float" or (stored.symmetric and stored.group_size is None)
    shapes = scales[stored.per]
    return {
        "weight": Expected(((n, k),), (torch.float8_e4m3fn if stored.kind == "float" else torch.int8,)),
        "weight_scale": Expected(shapes, ANY_SCALE if exact else SCALES),
        "weight_zero_point": Expected(shapes, (torch.int8,)),
        "input_scale": Expected(((1,), (), (1, 1)), ANY_SCALE),
        "input_zero_point": Expected(((1,), (), (1, 1)), (torch.int8,)),
    }


def _zero_point(parts: Mapping[str, Entry], n: int, groups: int, bits: int) -> Expected:
    found = parts.get("weight_zero_point")
    if found is not None and found.spec.dtype == torch.int8:
        return Expected(((n, groups),), (torch.int8,))
    return Expected(((n * bits // 32, groups),), (torch.int32,))


def storage(stored: Stored, narrow: bool) -> str:
    """The weight format that holds them exactly; ``narrow``: every scale is an fp16 number."""
    group = f"_g{stored.group_size}" if stored.group_size else ""
    if stored.kind == "float":
        return f"fp8_e4m3{group}"
    if stored.symmetric and stored.bits == 8 and not group:
        return "int8"
    plain = f"int{stored.bits}_sym{group}"
    return plain if stored.symmetric and narrow and plain in weights.WEIGHT_FORMATS else f"int{stored.bits}_zp{group}"


# -- out of the tensors ------------------------------------------------------------------------------------------------


class Unpacked(NamedTuple):
    """Codes as lowbit packs them [n, bytes]; scale [n, groups]; zero point [n, groups] int64, None of floats; the group
    of each column [k], None where they are in order."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_of: Tensor | None = None


def unpack(path: str, n: int, k: int, stored: Stored, tensors: Mapping[str, Tensor]) -> Unpacked:
    """One linear. Raises LowbitError for tensors that contradict each other."""
    if stored.plain:
        return _plain(path, n, stored, tensors)
    return _UNPACK[stored.layout](path, n, k, stored, tensors)


def _bytes(words: Tensor) -> Tensor:
    """Words [..., m] -> bytes [..., m · size], lowest first."""
    return words.contiguous().view(torch.uint8)


def _gptq(path: str, n: int, k: int, stored: Stored, tensors: Mapping[str, Tensor]) -> Unpacked:
    zero_point = packing.unpack(_bytes(tensors["qzeros"]), stored.bits).T.long()
    zero_point = (zero_point + stored.zero_offset) & ((1 << stored.bits) - 1)
    return Unpacked(_bytes(tensors["qweight"].T), tensors["scales"].T, zero_point, tensors.get("g_idx"))


def _awq(path: str, n: int, k: int, stored: Stored, tensors: Mapping[str, Tensor]) -> Unpacked:
    codes = packing.pack(_awq_columns(tensors["qweight"]).T.contiguous(), 4)
    return Unpacked(codes, tensors["scales"].T, _awq_columns(tensors["qzeros"]).T.long())


def _awq_columns(words: Tensor) -> Tensor:
    """[rows, n/8] int32 -> [rows, n] uint8."""
    fields = packing.split(packing.unpack(_bytes(words), 4), 8)
    columns = torch.empty_like(fields)
    columns[..., torch.tensor(AWQ_COLUMNS)] = fields
    return columns.flatten(-2)


def _compressed(path: str, n: int, k: int, stored: Stored, tensors: Mapping[str, Tensor]) -> Unpacked:
    shape = tensors["weight_shape"].tolist()
    if shape != [n, k]:
        raise LowbitError(f"{path}: expected weight_shape [{n}, {k}], got {shape}")
    scale, bits = tensors["weight_scale"], stored.bits
    middle, zero = 1 << (bits - 1), tensors.get("weight_zero_point")
    if zero is None:
        zero_point = torch.full(scale.shape, middle)
    elif zero.dtype == torch.int8:
        zero_point = zero.long() + middle
    else:
        zero_point = packing.unpack(_bytes(zero.T), bits).T.long()
    return Unpacked(_bytes(tensors["weight_packed"]), scale, zero_point, tensors.get("weight_g_idx"))


_UNPACK: dict[str, Callable[[str, int, int, Stored, Mapping[str, Tensor]], Unpacked]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}


def _plain(path: str, n: int, stored: Stored, tensors: Mapping[str, Tensor]) -> Unpacked:
    codes = tensors["weight"].contiguous().view(torch.uint8)
    if stored.kind == "float":
        if bool(((codes & 0x7F) == 0x7F).any()):  # e4m3fn has no infinities, and NaN at both ends
            raise LowbitError(f"{path}: expected finite weights, got NaN; fetch the folder again")
        return Unpacked(codes, _spread(tensors["weight_scale"], n, stored), None)
    zero = tensors.get("weight_zero_point")
    scale = _spread(tensors["weight_scale"], n, stored)
    zero_point = torch.zeros(scale.shape) if zero is None else _spread(zero, n, stored)
    return Unpacked(codes ^ 0x80, scale, zero_point.long() + 128)


def _spread(values: Tensor, n: int, stored: Stored) -> Tensor:
    """As they are stored -> [n, groups]."""
    if stored.per == "block":
        return values.repeat_interleave(BLOCK, 0)[:n]
    if stored.per == "tensor":
        return values.reshape(1, 1).expand(n, 1)
    return values.view(n, -1)


def in_order(path: str, found: Unpacked, k: int, stored: Stored) -> tuple[Tensor, Tensor | None]:
    """The codes with each group's columns side by side, and which column each was [k] int32; None: they are as in the
    model. Raises LowbitError for groups of another size, and for an order that the config denies."""
    group, size = found.group_of, stored.group_size or k
    if group is None:
        return found.codes, None
    if not stored.ordered:
        if not torch.equal(group.long(), torch.arange(k) // size):
            raise LowbitError(
                f"{path}: its columns are in another order than their groups (g_idx), and its config denies it "
                "(desc_act, actorder): its config.json belongs to another version of it"
            )
        return found.codes, None
    counts = torch.bincount(group.long().clamp(min=0), minlength=k // size)
    if int(group.min()) < 0 or counts.tolist() != [size] * (k // size):
        raise LowbitError(
            f"{path}: expected g_idx with {k // size} groups of {size} columns, got {counts.tolist()[:8]} columns; "
            "lowbit reads groups of one size"
        )
    order = torch.argsort(group, stable=True)
    codes = packing.pack(packing.unpack(found.codes, stored.bits)[:, order], stored.bits)
    return codes, order.to(torch.int32)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """For a message."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def biases(n: int) -> Expected:
    """Of a bias that a linear may have beside its parts."""
    return Expected(((n,),), tuple(checkpoint.DTYPES.values()))
