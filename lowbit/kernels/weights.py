"""Weight formats of the ``lowbit`` backend: how a matrix is stored, and plain PyTorch that defines what it means.

Canonical storage, whatever a GPU kernel makes of it: ``codes`` [n, k·bits/8] uint8, one row of the matrix per row,
values little-endian along k (value 0 in the lowest bits of byte 0; a 3-bit value may straddle two bytes). A weight is

    w[r, c] = (code·step + offset) · scale[r, c // group] (+ zero[r, c // group])       for ``kind`` "int"
    w[r, c] = float(code) · scale[r, c // group] (· tensor_scale)                       for the float kinds

computed in fp32. A product of a code and an fp16 scale is exact there, so fused and separate adds give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import LowbitError, unknown
from lowbit.kernels.bits import split, unpack

Kind = Literal["bf16", "int", "e4m3", "e2m1"]
Rule = Literal["cast", "range", "absmax", "absmean", "mx", "nv"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of codes 0 to 7; bit 3 is the sign (OCP Microscaling Formats v1.0, section 5.3.3)."""
E2M1_MAX, E4M3_MAX = 6.0, 448.0


@dataclass(frozen=True)
class WeightFormat:
    """One row: how weights are stored.

    ``group_size`` counts weights along k that share a scale; None: the whole row does. ``scale`` and ``zero`` are the
    dtypes of [n, groups] numbers or None; 8-bit floats are kept as their bytes, uint8. ``zero`` is in units of the
    weight (the value of code 0) and is added. ``offset`` and ``step`` turn an integer code into its value.
    ``tensor_scale``: one more fp32 factor, [1]. ``rule`` is how ``quantize`` finds scales. ``version`` counts changes
    of the storage; files carry it.
    """

    name: str
    bits: int
    kind: Kind
    rule: Rule
    group_size: int | None = None
    scale: torch.dtype | None = torch.float16
    zero: torch.dtype | None = None
    offset: int = 0
    step: int = 1
    tensor_scale: bool = False
    version: int = 1

    @property
    def levels(self) -> int:
        """The highest code that is used."""
        return 2 if self.name == "ternary" else (1 << self.bits) - 1

    def groups(self, k: int) -> int:
        """How many scales a row of k weights has."""
        return 1 if self.group_size is None else k // self.group_size

    def row_bytes(self, k: int) -> int:
        """Bytes of one row's codes."""
        return k * self.bits // 8

    def stored_bits(self, k: int) -> float:
        """Bits per weight with scales and zeros, without the tensor scale."""
        extra = sum(dtype.itemsize for dtype in (self.scale, self.zero) if dtype is not None)
        return self.bits + 8 * extra * self.groups(k) / k

    def check(self, n: int, k: int, what: str = "a weight") -> None:
        """Raise LowbitError if a matrix [n, k] can't be stored: k in whole groups, a row in whole bytes."""
        step = self.group_size or 8 // math.gcd(8, self.bits)
        if n < 1 or k < 1 or k % step:
            unit = f"groups of {step}" if self.group_size else f"whole bytes ({step} values)"
            raise LowbitError(
                f"{self.name} stores rows in {unit}: {what} of shape [{n}, {k}] has K={k}, which {step} does not "
                "divide; take a format with a smaller group or one scale per row (int8, fp8_e4m3)"
            )


def _int(name: str, bits: int, group_size: int | None, *, zero: bool) -> WeightFormat:
    if zero:
        return WeightFormat(name, bits, "int", "range", group_size, zero=torch.float16)
    return WeightFormat(name, bits, "int", "absmax", group_size, offset=-(1 << (bits - 1)))


_ROW: dict[str, Any] = {"scale": torch.float32}

WEIGHT_FORMATS: dict[str, WeightFormat] = {
    row.name: row
    for row in (
        WeightFormat("bf16", 16, "bf16", "cast", scale=None),
        WeightFormat("int8", 8, "int", "absmax", offset=-128, **_ROW),
        WeightFormat("fp8_e4m3", 8, "e4m3", "absmax", **_ROW),
        _int("int4_g128", 4, 128, zero=True),
        _int("int4_g64", 4, 64, zero=True),
        _int("int4_g32", 4, 32, zero=True),
        _int("int4_sym_g128", 4, 128, zero=False),
        _int("int4_sym_g64", 4, 64, zero=False),
        _int("int4_sym_g32", 4, 32, zero=False),
        WeightFormat("mxfp4", 4, "e2m1", "mx", 32, scale=torch.float8_e8m0fnu),
        WeightFormat("nvfp4", 4, "e2m1", "nv", 16, scale=torch.float8_e4m3fn, tensor_scale=True),
        _int("int3_g128", 3, 128, zero=True),
        _int("int2_g128", 2, 128, zero=True),
        WeightFormat("ternary", 2, "int", "absmean", offset=-1, **_ROW),
        WeightFormat("binary", 1, "int", "absmean", offset=-1, step=2, **_ROW),
    )
}

STORED_FORMATS: dict[str, WeightFormat] = {
    row.name: row
    for bits in (2, 3, 4, 8)
    for group in (32, 64, 128, None)
    for row in (
        WeightFormat(
            f"int{bits}_zp_g{group}" if group else f"int{bits}_zp",
            *(bits, "int", "range", group),
            scale=torch.float32,
            zero=torch.float32,
        ),
    )
}
STORED_FORMATS["fp8_e4m3_g128"] = WeightFormat("fp8_e4m3_g128", 8, "e4m3", "absmax", 128, **_ROW)
"""What checkpoints that are quantized already are held in (lowbit/prequantized.py): their 16-bit scale times their
integer zero point is exact in fp32 and not in fp16. Nothing quantizes into these."""


def find(name: str) -> WeightFormat:
    """The row of this name. Raises LowbitError naming the known ones."""
    try:
        return WEIGHT_FORMATS.get(name) or STORED_FORMATS[name]
    except KeyError:
        raise unknown("weight format", name, WEIGHT_FORMATS) from None


@dataclass(frozen=True, eq=False)
class Packed:
    """One matrix [n, k] in a weight format: ``codes`` [n, row bytes] uint8, ``scale`` and ``zero`` [n, groups]."""

    format: str
    n: int
    k: int
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    tensor_scale: Tensor | None = None

    @property
    def row(self) -> WeightFormat:
        return find(self.format)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    def tensors(self) -> dict[str, Tensor]:
        """What there is of codes, scale, zero, tensor_scale, by that name."""
        named = {"codes": self.codes, "scale": self.scale, "zero": self.zero, "tensor_scale": self.tensor_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def to(self, device: torch.device | str) -> Packed:
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Packed(self.format, self.n, self.k, **moved)

    def rows(self, start: int, stop: int) -> Packed:
        """Rows start .. stop, sharing memory."""
        whole = {"tensor_scale"} if self.tensor_scale is not None and self.tensor_scale.numel() == 1 else set()
        parts = {name: t if name in whole else t[start:stop] for name, t in self.tensors().items()}
        return Packed(self.format, len(range(self.n)[start:stop]), self.k, **parts)

    def check(self, what: str = "a packed weight") -> None:
        """Raise LowbitError unless every tensor has the shape and dtype that the format says."""
        self.row.check(self.n, self.k, what)
        expected = specs(self.format, self.n, self.k)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors().items()}
        if found != expected:
            raise LowbitError(f"{what} [{self.n}, {self.k}] in {self.format}: expected {expected}, got {found}")


def specs(name: str, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a matrix [n, k] in this format."""
    row = find(name)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": ((n, row.row_bytes(k)), torch.uint8)}
    for part, dtype in (("scale", row.scale), ("zero", row.zero)):
        if dtype is not None:
            # torch multiplies, hashes and moves no 8-bit floats, and nn.Module.to(dtype) would convert them
            found[part] = ((n, row.groups(k)), torch.uint8 if dtype.itemsize == 1 else dtype)
    if row.tensor_scale:
        found["tensor_scale"] = ((1,), torch.float32)
    return found


# -- meaning -----------------------------------------------------------------------------------------------------------

CHUNK = 1 << 22
"""Weights that are worked on at once, so that a head of 525 million needs no gigabytes beside it."""


def row_chunks(n: int, k: int, size: int | None = None, tile: int = 1) -> list[tuple[int, int]]:
    """Row ranges of about ``size`` weights (None: CHUNK), each but the last a multiple of ``tile`` rows."""
    step = max(tile, (size or CHUNK) // k // tile * tile)
    return [(start, min(start + step, n)) for start in range(0, n, step)]


@lru_cache(maxsize=8)
def e2m1_table(device: torch.device) -> Tensor:
    """The value of each e2m1 code, [16] fp32. Kept: a copy from the host can't be part of a CUDA graph."""
    return torch.tensor((*E2M1, *(-value for value in E2M1)), device=device)


def code_values(codes: Tensor, row: WeightFormat) -> Tensor:
    """The fp32 value of each code, before any scale: [..., row bytes] uint8 -> [..., k]."""
    if row.kind == "bf16":
        return codes.contiguous().view(torch.bfloat16).float()
    if row.kind == "e4m3":
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    values = unpack(codes, row.bits)
    if row.kind == "e2m1":
        return e2m1_table(codes.device)[values.int()]
    return values.float() * row.step + row.offset


def scale_values(scale: Tensor, row: WeightFormat) -> Tensor:
    """Scales as numbers: [n, groups] as stored -> fp32."""
    if row.scale is not None and row.scale.itemsize == 1:
        scale = scale.contiguous().view(row.scale)
    return scale.float()


def dequantize(packed: Packed) -> Tensor:
    """What the packed weight stands for: fp32 [n, k]."""
    row = packed.row
    values = code_values(packed.codes, row)
    if packed.scale is None:
        return values
    scale = scale_values(packed.scale, row)
    if packed.tensor_scale is not None:
        scale = scale * packed.tensor_scale
    grouped = split(values, packed.k // scale.shape[-1]) * scale.unsqueeze(-1)
    if packed.zero is not None:
        grouped = grouped + packed.zero.float().unsqueeze(-1)
    return grouped.flatten(-2)


def matmul(x: Tensor, packed: Packed) -> Tensor:
    """x [..., k] times the weight's transpose, all in fp32: [..., n] fp32. The definition of every product here."""
    wide = x.float()
    parts = [wide @ dequantize(packed.rows(*rows)).T for rows in row_chunks(packed.n, packed.k)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


PIECE = 1 << 27
"""Weights that are dequantized at once before a library's product, 256 MiB in 16 bits: a head of Llama-3.1-8B in 4
pieces, which would take 1 GiB beside the model; no matrix of its layers is cut."""


def product(x: Tensor, n: int, k: int, dequantized: Callable[[int, int], Tensor]) -> Tensor:
    """x [..., k] by a matrix [n, k], whose rows ``dequantized(start, stop)`` gives in x's dtype: [..., n].

    One product up to PIECE weights; of a larger matrix one per piece, whole tiles of 16 rows but for the last.
    """
    pieces = row_chunks(n, k, PIECE, tile=16)
    if len(pieces) == 1:
        return functional.linear(x, dequantized(0, n))
    y = x.new_empty(*x.shape[:-1], n)
    for start, stop in pieces:
        y[..., start:stop] = functional.linear(x, dequantized(start, stop))
    return y


def matvec(x: Tensor, packed: Packed) -> Tensor:
    """x [k] -> [n] fp32."""
    return matmul(x.unsqueeze(0), packed).squeeze(0)


def embedding(ids: Tensor, packed: Packed) -> Tensor:
    """Rows of a packed table: ids [...] int64 -> [..., k] fp32."""
    flat = ids.reshape(-1)
    parts = {name: t if name == "tensor_scale" else t[flat] for name, t in packed.tensors().items()}
    rows = dequantize(Packed(packed.format, flat.numel(), packed.k, **parts))
    return rows.reshape(*ids.shape, packed.k)
