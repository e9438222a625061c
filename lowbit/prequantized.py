"""The linears of a checkpoint that is quantized already, from its published storage into lowbit's own, bit for bit.

lowbit/stored_layouts.py says what the published tensors are; here they are found, checked, read and put into modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowbit import checkpoint, stored_layouts
from lowbit.checkpoint import Entry
from lowbit.errors import LowbitError
from lowbit.formats.layouts import Stored
from lowbit.formats.stored import as_row
from lowbit.hostmemory import Spec
from lowbit.kernels import weights
from lowbit.kernels.modules import NativeLinear
from lowbit.kernels.stored_linear import StoredLinear
from lowbit.kernels.weights import Packed, find


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
        found = dict(weights.specs(self.format, self.n, self.k))
        if self.stored.ordered:
            found["order"] = (self.k,), torch.int32
        for part, name in INPUTS.items():
            if part in self.parts:
                found[name] = (1,), torch.float32
        return {f"{self.path}.{name}": Spec(shape, dtype) for name, (shape, dtype) in found.items()}


INPUTS = {"input_scale": "input_scale", "input_zero_point": "input_zero"}
"""Published tensor -> the buffer of a StoredLinear that holds it."""


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
        known = stored_layouts.known_parts(stored)
        if f"{path}.bias" not in shapes:  # optimum's GPTQ writes zeros where a Llama has none
            known = (*known, "bias")
        parts = {part: left.pop(f"{path}.{part}") for part in known if f"{path}.{part}" in left}
        n, k = shape
        problems += _problems(path, n, k, stored, parts)
        whole[path] = n, k, parts
    problems += [
        f"{name} is in {stored_layouts.names((entry.spec.dtype,))}, which its config says nothing of"
        for name, entry in left.items()
        if name in shapes and entry.spec.dtype not in checkpoint.DTYPES.values()
    ]
    if problems:
        raise LowbitError(f"{stored.layout}: {checkpoint.some(problems)}; fetch the folder again")
    scale = "weight_scale" if stored.layout == "compressed-tensors" else "scales"
    narrow = stored.symmetric and all(_fits_fp16(parts[scale]) for _, _, parts in whole.values())
    format = stored_layouts.storage(stored, narrow)
    return {path: Matrix(path, n, k, stored, parts, format) for path, (n, k, parts) in whole.items()}, left


def _problems(path: str, n: int, k: int, stored: Stored, parts: Mapping[str, Entry]) -> list[str]:
    missing = [f"{path}.{part} is missing" for part in stored_layouts.parts_of(stored) if part not in parts]
    if "weight_g_idx" in parts and not stored.ordered:
        missing.append(f"{path}.weight_g_idx is there, and its config says nothing of actorder='group'")
    if missing:
        return missing
    unit = stored.group_size or (1 if stored.plain else 32)
    if k % unit or (not stored.plain and (k % 32 or n % 32)):
        return [f"{path} [{n}, {k}] is not cut by groups of {unit} and words of 32"]
    expected = stored_layouts.expected(stored, n, k, parts) | {"bias": stored_layouts.biases(n)}
    return [
        f"{path}.{name} expected {list(expected[name].shapes[0])} in {stored_layouts.names(expected[name].dtypes)}, "
        f"got {list(entry.spec.shape)} in {stored_layouts.names((entry.spec.dtype,))}"
        for name, entry in parts.items()
        if entry.spec.shape not in expected[name].shapes or entry.spec.dtype not in expected[name].dtypes
    ]


def _fits_fp16(scale: Entry) -> bool:
    if scale.spec.dtype == torch.float16:
        return True
    found = _tensor(scale)
    return torch.equal(found.half().float(), found.float())


def read(matrix: Matrix) -> dict[str, Tensor]:
    """Read one linear: the tensors of ``Matrix.specs``, by the last part of their names.

    Raises LowbitError for zero points or an order of columns that its config excludes, and for scales that aren't
    finite.
    """
    stored, path = matrix.stored, matrix.path
    tensors = {name: _tensor(entry) for name, entry in matrix.parts.items()}
    found = stored_layouts.unpack(path, matrix.n, matrix.k, stored, tensors)
    codes, order = stored_layouts.in_order(path, found, matrix.k, stored)
    middle = 1 << (stored.bits - 1)
    if stored.symmetric and found.zero_point is not None and not bool((found.zero_point == middle).all()):
        odd = int(found.zero_point[found.zero_point != middle][0])
        raise LowbitError(
            f"{path}: the config calls the checkpoint symmetric, which has zero points of {middle}, got {odd}; "
            "its config.json belongs to another version of it, or its layout (gptq, gptq_v2) is named wrongly"
        )
    if bool(tensors.get("bias", torch.zeros(1)).any()):
        raise LowbitError(f"{path}: expected no bias by its config.json, got one that is not zero")
    inputs = {name: tensors[part].float().reshape(1) for part, name in INPUTS.items() if part in tensors}
    for scale in (found.scale, inputs.get("input_scale", torch.ones(1))):
        if not bool(torch.isfinite(scale.float()).all()):
            raise LowbitError(f"{path}: expected finite scales, got NaN or Inf; fetch the folder again")
    if not bool(inputs.get("input_scale", torch.ones(1)) > 0):
        raise LowbitError(f"{path}: expected an input_scale above 0, got {float(inputs['input_scale'])}")
    row = find(matrix.format)
    assert row.scale is not None
    zero = None
    if row.zero is not None:
        assert found.zero_point is not None
        zero = -found.zero_point.to(row.zero) * found.scale.to(row.zero)
    packed = Packed(matrix.format, matrix.n, matrix.k, codes, found.scale.to(row.scale).contiguous(), zero)
    packed.check(path)
    return packed.tensors() | inputs | ({} if order is None else {"order": order})


def module(matrix: Matrix, tensors: Mapping[str, Tensor], bias: Tensor | None) -> NativeLinear:
    """The linear over what ``read`` gave, or over memory that holds it."""
    rest = dict(tensors)
    parts = {name: rest.pop(name) for name in weights.specs(matrix.format, matrix.n, matrix.k)}
    packed = Packed(matrix.format, matrix.n, matrix.k, **parts)
    if not rest and matrix.stored.inputs is None:
        return NativeLinear(packed, bias)
    return StoredLinear(packed, bias, inputs=matrix.stored.inputs, **rest)


def _tensor(entry: Entry) -> Tensor:
    data = np.empty(entry.spec.nbytes, dtype=np.uint8)
    checkpoint.read_bytes(entry, data)
    return torch.from_numpy(data).view(entry.spec.dtype).view(entry.spec.shape)
