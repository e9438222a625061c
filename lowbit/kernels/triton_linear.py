"""The packed linears on any GPU since SM80: Triton products for 1 to 8 vectors, for more an unpacking before cuBLAS.

Registered with ``dispatch`` below; Triton itself is imported at the first product. With TRITON_INTERPRET=1 in the
environment the same kernels run on the CPU, by Triton's interpreter: for tests.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.kernels import dispatch
from lowbit.kernels.dispatch import Problem
from lowbit.kernels.weights import Packed, WeightFormat, find, product

NEEDED_SM = (8, 0)
"""bf16 and asynchronous copies; Triton itself starts at SM75."""
MOST_ROWS = 8
"""Vectors of a product that reads packed weights; for more, tensor cores want them in 16 bits."""
VECTORS = 4
"""The most of one program of the GEMV; for more it reads the weight again."""
GEMV_ROWS = {8: 2, 3: MOST_ROWS}
"""Bits of a code -> vectors that the GEMV takes, VECTORS for the others: where it was the faster of the two on an H200,
of int4_g128, int8, int3, nvfp4 and ternary at 1, 2, 4 and 8 (ternary at 4: 31.9, 26.9 µs; the GEMM 31.1, 29.0)."""
DOT_COLUMNS = 8
"""Vectors of a product by tensor cores; what is not there is zero."""
DOT_DTYPES = (torch.float16, torch.bfloat16)

GEMV, GEMM = "Triton GEMV", "Triton small GEMM"
UNPACK, UNPACK_GEMM, GEMM_16 = "Triton unpack", "Triton unpack + cuBLAS", "cuBLAS"


class Tiles(NamedTuple):
    """How a product is cut: rows and columns of a program, parts of K that are summed afterwards, always in order."""

    rows: int
    columns: int
    splits: int = 1


EACH = 2
"""Words of 8 codes that a thread of the GEMV reads of each row: one scale for both, so they lie in one group."""
GEMV_TILES = ((2048, Tiles(2, 2048)), (None, Tiles(4, 2048)))
"""By the most rows of a weight. Timed on an H200 for 1 and 2 vectors, with 2, 4 and 8 rows, 1024 and 2048 columns."""
GEMM_TILES = (
    (2048, Tiles(32, 128, 8)),
    (8192, Tiles(64, 128, 8)),
    (32768, Tiles(64, 128, 2)),
    (None, Tiles(64, 128, 1)),
)
"""Enough programs for 100 to 150 multiprocessors at k_proj, q_proj and larger. Chosen by counting. Of others on an
H200, for 8 vectors in int4_g128 and int8, one was 14 % faster (int8's gate_proj, K in one part), none else a tenth."""


def tiles(row: WeightFormat, n: int, k: int, dot: bool) -> Tiles:
    """The cut for a weight [n, k]. Columns are a power of two, and whole groups; with ``dot`` one group."""
    found = next(cut for most, cut in (GEMM_TILES if dot else GEMV_TILES) if most is None or n <= most)
    smallest = row.group_size or 16
    columns = min(found.columns, max(smallest, 1 << (k - 1).bit_length()))
    if dot and row.group_size:
        columns = row.group_size
    blocks = _pieces(k, columns)
    return Tiles(found.rows, max(columns, smallest), min(found.splits, blocks))


# -- what runs where ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _here(asked: Problem) -> bool:
    if not _installed() or asked.format == "bf16" or (asked.k % 8 and find(asked.format).bits < 8):
        return False  # words of 8 codes
    if asked.device == "cpu":
        return interpreted()
    return asked.capability is not None and asked.capability >= NEEDED_SM


def _gemv(asked: Problem) -> bool:
    if asked.dtype not in DOT_DTYPES:
        most = MOST_ROWS  # tensor cores would round fp32 to TF32
    else:
        most = GEMV_ROWS.get(find(asked.format).bits, VECTORS)
    return 1 <= asked.rows <= most and _here(asked)


def _gemm(asked: Problem) -> bool:
    if asked.device == "cpu" and asked.dtype == torch.bfloat16:
        return False  # Triton's interpreter multiplies the bits of bf16 matrices as integers
    return 1 <= asked.rows <= MOST_ROWS and asked.dtype in DOT_DTYPES and _here(asked)


def _unpack_gemm(asked: Problem) -> bool:
    return asked.rows > MOST_ROWS and _here(asked)


def _gemm_16(asked: Problem) -> bool:
    if asked.capability is None or asked.capability < NEEDED_SM:
        return False
    return asked.format == "bf16" and asked.dtype == torch.bfloat16


# -- launching ---------------------------------------------------------------------------------------------------------


WORDS = {4: torch.int32, 2: torch.int16}
"""Bits of a code -> what holds 8 of them; the rest are bytes."""


def arguments(packed: Packed) -> tuple[Tensor | None, ...]:
    """What every kernel reads of a weight."""
    codes = packed.codes.view(WORDS.get(packed.row.bits, torch.uint8))
    return codes, packed.scale, packed.zero, packed.tensor_scale


def constants(row: WeightFormat) -> dict[str, Any]:
    """What a kernel is compiled for, by triton_source's names."""
    return {
        "BITS": row.bits,
        "KIND": {"int": 0, "e4m3": 1, "e2m1": 2}[row.kind],
        "OFFSET": row.offset,
        "STEP": row.step,
        "SCALE": {torch.float8_e4m3fn: 1, torch.float8_e8m0fnu: 3}.get(row.scale, 0) if row.scale else 0,
        "GROUP": row.group_size or 0,
    }


def _pieces(whole: int, size: int) -> int:
    return -(-whole // size)


def _partial(x: Tensor, n: int, cut: Tiles, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Where the parts of K go, [splits, m, n], and how many blocks of columns a part has."""
    kept = torch.float32 if cut.splits > 1 else dtype
    out = torch.empty(cut.splits, x.shape[0], n, device=x.device, dtype=kept)
    return out, _pieces(_pieces(x.shape[1], cut.columns), cut.splits)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def gemv(x: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """x [rows, k] -> [rows, n] in ``dtype``, in fp32 until then; the weight is read once per VECTORS rows."""
    from lowbit.kernels import triton_gemv, triton_source

    x, m, n, row = x.contiguous(), x.shape[0], packed.n, packed.row
    cut = tiles(row, n, packed.k, False)
    out, per_split = _partial(x, n, cut, dtype)
    vectors = min(VECTORS, 1 << (m - 1).bit_length())
    triton_gemv.gemv[(_pieces(n, cut.rows), cut.splits, _pieces(m, vectors))](
        *(x, *arguments(packed), out),
        *(m, n, packed.k, row.groups(packed.k), per_split, triton_source.MAGIC.value),
        **constants(row),
        MP=vectors,
        BN=cut.rows,
        BK=cut.columns,
        EACH=EACH,
        WHOLE=packed.k % cut.columns == 0,
        num_warps=max(1, cut.columns // (32 * 8 * EACH)),
    )
    return _summed(out, dtype)


def gemm(x: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """x [rows, k], up to 8 -> [rows, n] in ``dtype``: products of 16-bit numbers, summed in fp32."""
    from lowbit.kernels import triton_source

    x, n, row = x.contiguous(), packed.n, packed.row
    cut = tiles(row, n, packed.k, True)
    out, per_split = _partial(x, n, cut, dtype)
    triton_source.gemm[(_pieces(n, cut.rows), cut.splits)](
        *(x, *arguments(packed), out),
        *(x.shape[0], n, packed.k, row.groups(packed.k), per_split),
        **constants(row),
        MP=DOT_COLUMNS,
        BN=cut.rows,
        BK=cut.columns,
        num_warps=4,
        num_stages=4,
    )
    return _summed(out, dtype)


def unpack(x: Any, packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [n, k] in ``dtype``, bit for bit the reference's."""
    from lowbit.kernels import triton_source

    row, n, k = packed.row, packed.n, packed.k
    columns = max(256, row.group_size or 0)
    out = torch.empty(n, k, device=packed.codes.device, dtype=dtype)
    triton_source.unpack[(_pieces(n, 16), _pieces(k, columns))](
        *(*arguments(packed), out, n, k, row.groups(k)),
        **constants(row),
        BN=16,
        BK=columns,
        num_warps=4,
    )
    return out


def unpack_gemm(x: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """x [rows, k] -> [rows, n]: the weight in ``dtype`` in memory, a large one piece by piece, then cuBLAS."""
    return product(x, packed.n, packed.k, lambda start, stop: unpack(None, packed.rows(start, stop), dtype))


def gemm_16(x: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """x [rows, k] in bf16 by a weight that is stored as bf16."""
    return functional.linear(x, packed.codes.view(dtype))


def register() -> None:
    """Offer them all, the quickest first."""
    dispatch.register("linear", GEMM_16, _gemm_16, gemm_16)
    dispatch.register("linear", GEMV, _gemv, gemv)
    dispatch.register("linear", GEMM, _gemm, gemm)
    dispatch.register("linear", UNPACK_GEMM, _unpack_gemm, unpack_gemm)
    dispatch.register("dequantize", UNPACK, _here, unpack)


register()
