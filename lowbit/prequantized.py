"""The linears of a checkpoint that is quantized already, from its published storage into lowbit's own, bit for bit.

All three layouts say w = (code - zero point) · scale, with 32-bit words of codes, little-endian:

- GPTQ: ``qweight`` [k·bits/32, n] packed along k, ``qzeros`` [groups, n·bits/32] along n, ``scales`` [groups, n], and
  ``g_idx`` [k], each column's group. (AutoGPTQ 0.7 nn_modules/qlinear/qlinear_cuda_old.py, GPTQModel 7.7
  nn_modules/qlinear/__init__.py.) Its first version stores zero points less one and wraps round.
- AWQ: ``qweight`` [k, n/8] and ``qzeros`` [groups, n/8], both along n, columns of a word in the order 0 2 4 6 1 3 5 7;
  ``scales`` [groups, n]. (AutoAWQ 0.2 utils/packing_utils.py.)
- compressed-tensors: ``weight_packed`` [n, k·bits/32] along k, ``weight_scale`` [n, groups], ``weight_shape`` [2] and,
  where it is not symmetric, ``weight_zero_point`` [n·bits/32, groups] along n (int8 [n, groups] in older files, which
  then are signed). (compressed_tensors 0.20 compressors/pack_quantized.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowbit import checkpoint
from lowbit.checkpoint import Entry
from lowbit.errors import LowbitError
from lowbit.formats.stored import Stored, as_row
from lowbit.hostmemory import Spec
from lowbit.kernels import weights
from lowbit.kernels.weights import Packed, find

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of a word's i-th four bits."""

SCALES = (torch.float16, torch.bfloat16)
"""Products with a code are exact in fp32 for these only."""

PARTS: dict[str, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
}
"""What every quantized linear must have."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "gptq": ("g_idx",),
    "awq": (),
    "compressed-tensors": ("weight_zero_point", "weight_g_idx"),
}


Expected = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
"""The shape of a part and the types that it may have."""


class Matrix(NamedTuple):
    """One quantized linear before it is read: where its parts lie, and how they will be held."""

    path: str
    n: int
    k: int
    stored: Stored
    parts: Mapping[str, Entry]
    format: str

    def specs(self) -> dict[str, Spec]:
        """Of the tensors that ``read`` fills, by their names in a LlamaForCausalLM of packed linears."""
        found = weights.specs(self.format, self.n, self.k)
        return {f"{self.path}.{name}": Spec(shape, dtype) for name, (shape, dtype) in found.items()}


def find_matrices(
    entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], stored: Stored
) -> tuple[dict[str, Matrix], dict[str, Entry]]:
    """The quantized linears by path, and the entries that are left.

    ``shapes`` are those of a LlamaForCausalLM's parameters. Raises LowbitError naming what is missing or of another
    shape.
    """
    left = dict(entries)
    problems: list[str] = []
    whole: dict[str, tuple[int, int, dict[str, Entry]]] = {}
    targets = as_row(stored).targets
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path.rpartition(".")[2] not in targets:
            continue
        known = (*PARTS[stored.layout], *OPTIONAL[stored.layout])
        if f"{path}.bias" not in shapes:  # optimum's GPTQ writes zeros where a Llama has none
            known = (*known, "bias")
        parts = {part: left.pop(f"{path}.{part}") for part in known if f"{path}.{part}" in left}
        n, k = shape
        problems += _problems(path, n, k, stored, parts)
        whole[path] = n, k, parts
    if problems:
        raise LowbitError(f"{stored.layout}: {checkpoint.some(problems)}; fetch the folder again")
    format = _format(stored, [parts for _, _, parts in whole.values()])
    return {path: Matrix(path, n, k, stored, parts, format) for path, (n, k, parts) in whole.items()}, left


def _problems(path: str, n: int, k: int, stored: Stored, parts: Mapping[str, Entry]) -> list[str]:
    missing = [f"{path}.{part} is missing" for part in PARTS[stored.layout] if part not in parts]
    asymmetric = stored.layout == "compressed-tensors" and not stored.symmetric
    if asymmetric and "weight_zero_point" not in parts:
        missing.append(f"{path}.weight_zero_point is missing")
    if "weight_g_idx" in parts:
        missing.append(f"{path}.weight_g_idx: columns in another order than their groups are not read")
    if missing:
        return missing
    unit = stored.group_size or 32
    if k % unit or k % 32 or n % 32:
        return [f"{path} [{n}, {k}] is not cut by groups of {unit} and words of 32"]
    words, groups = stored.bits, (k // stored.group_size if stored.group_size else 1)
    layouts: dict[str, dict[str, Expected]] = {
        "gptq": {
            "qweight": ((k * words // 32, n), (torch.int32,)),
            "qzeros": ((groups, n * words // 32), (torch.int32,)),
            "scales": ((groups, n), SCALES),
            "g_idx": ((k,), (torch.int32,)),
        },
        "awq": {
            "qweight": ((k, n // 8), (torch.int32,)),
            "qzeros": ((groups, n // 8), (torch.int32,)),
            "scales": ((groups, n), SCALES),
        },
        "compressed-tensors": {
            "weight_packed": ((n, k * words // 32), (torch.int32,)),
            "weight_scale": ((n, groups), SCALES),
            "weight_shape": ((2,), (torch.int64, torch.int32)),
            "weight_zero_point": _zero_point(parts, n, groups, words),
        },
    }
    expected = layouts[stored.layout] | {"bias": ((n,), tuple(checkpoint.DTYPES.values()))}
    return [
        f"{path}.{name} expected {list(expected[name][0])} in {_names(expected[name][1])}, "
        f"got {list(entry.spec.shape)} in {_names((entry.spec.dtype,))}"
        for name, entry in parts.items()
        if entry.spec.shape != expected[name][0] or entry.spec.dtype not in expected[name][1]
    ]


def _zero_point(parts: Mapping[str, Entry], n: int, groups: int, bits: int) -> Expected:
    found = parts.get("weight_zero_point")
    if found is not None and found.spec.dtype == torch.int8:
        return (n, groups), (torch.int8,)
    return (n * bits // 32, groups), (torch.int32,)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _format(stored: Stored, linears: Iterable[Mapping[str, Entry]]) -> str:
    """lowbit's storage that holds them exactly: fp16 scales alone where that is all there is, else fp32 pairs."""
    name = "weight_scale" if stored.layout == "compressed-tensors" else "scales"
    group = f"_g{stored.group_size}" if stored.group_size else ""
    plain = f"int{stored.bits}_sym{group}"
    if stored.symmetric and plain in weights.WEIGHT_FORMATS and all(_fits_fp16(parts[name]) for parts in linears):
        return plain
    return f"int{stored.bits}_zp{group}"


def _fits_fp16(scale: Entry) -> bool:
    if scale.spec.dtype == torch.float16:
        return True
    found = _tensor(scale)
    return torch.equal(found.half().float(), found.float())


# -- reading -----------------------------------------------------------------------------------------------------------


def read(matrix: Matrix) -> Packed:
    """Read one linear. Raises LowbitError for columns out of order, or zero points that its config excludes."""
    tensors = {name: _tensor(entry) for name, entry in matrix.parts.items()}
    codes, scale, zero_point = _UNPACK[matrix.stored.layout](matrix, tensors)
    middle = 1 << (matrix.stored.bits - 1)
    if matrix.stored.symmetric and not bool((zero_point == middle).all()):
        odd = int(zero_point[zero_point != middle][0])
        raise LowbitError(
            f"{matrix.path}: the config calls the checkpoint symmetric, which has zero points of {middle}, got {odd}; "
            "its config.json belongs to another version of it, or its layout (gptq, gptq_v2) is named wrongly"
        )
    if bool(tensors.get("bias", torch.zeros(1)).any()):
        raise LowbitError(f"{matrix.path}: expected no bias by its config.json, got one that is not zero")
    if not bool(torch.isfinite(scale.float()).all()):
        raise LowbitError(f"{matrix.path}: expected finite scales, got NaN or Inf; fetch the folder again")
    row = find(matrix.format)
    assert row.scale is not None
    zero = None if row.zero is None else -zero_point.to(row.zero) * scale.to(row.zero)
    packed = Packed(matrix.format, matrix.n, matrix.k, codes, scale.to(row.scale).contiguous(), zero)
    packed.check(matrix.path)
    return packed


def _tensor(entry: Entry) -> Tensor:
    data = np.empty(entry.spec.nbytes, dtype=np.uint8)
    checkpoint.read_bytes(entry, data)
    return torch.from_numpy(data).view(entry.spec.dtype).view(entry.spec.shape)


def _bytes(words: Tensor) -> Tensor:
    """Words [..., m] -> bytes [..., m · size], lowest first."""
    return words.contiguous().view(torch.uint8)


Unpacked = tuple[Tensor, Tensor, Tensor]
"""Codes as lowbit packs them [n, bytes]; scale [n, groups]; zero point [n, groups] int64."""


def _gptq(matrix: Matrix, tensors: Mapping[str, Tensor]) -> Unpacked:
    stored, order = matrix.stored, tensors.get("g_idx")
    if order is not None:
        columns = torch.arange(matrix.k, dtype=order.dtype)
        if not torch.equal(order, columns // (stored.group_size or matrix.k)):
            raise LowbitError(
                f"{matrix.path}: its columns are in another order than their groups (g_idx, desc_act with act-order), "
                "which lowbit does not read; give a checkpoint that was made with desc_act=False"
            )
    zero_point = weights.unpack(_bytes(tensors["qzeros"]), stored.bits).T.long()
    zero_point = (zero_point + stored.zero_offset) & ((1 << stored.bits) - 1)
    return _bytes(tensors["qweight"].T), tensors["scales"].T, zero_point


def _awq(matrix: Matrix, tensors: Mapping[str, Tensor]) -> Unpacked:
    codes = weights.pack(_awq_columns(tensors["qweight"]).T.contiguous(), 4)
    return codes, tensors["scales"].T, _awq_columns(tensors["qzeros"]).T.long()


def _awq_columns(words: Tensor) -> Tensor:
    """[rows, n/8] int32 -> [rows, n] uint8."""
    fields = weights.split(weights.unpack(_bytes(words), 4), 8)
    columns = torch.empty_like(fields)
    columns[..., torch.tensor(AWQ_COLUMNS)] = fields
    return columns.flatten(-2)


def _compressed(matrix: Matrix, tensors: Mapping[str, Tensor]) -> Unpacked:
    shape = tensors["weight_shape"].tolist()
    if shape != [matrix.n, matrix.k]:
        raise LowbitError(f"{matrix.path}: expected weight_shape [{matrix.n}, {matrix.k}], got {shape}")
    scale, bits = tensors["weight_scale"], matrix.stored.bits
    middle, zero = 1 << (bits - 1), tensors.get("weight_zero_point")
    if zero is None:
        zero_point = torch.full(scale.shape, middle)
    elif zero.dtype == torch.int8:
        zero_point = zero.long() + middle
    else:
        zero_point = weights.unpack(_bytes(zero.T), bits).T.long()
    return _bytes(tensors["weight_packed"]), scale, zero_point


_UNPACK: dict[str, Callable[[Matrix, Mapping[str, Tensor]], Unpacked]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
