"""The formats of HQQ (half-quadratic quantization), all of axis 1: groups run along a weight's row.

``scheme`` is the product's kernel, ``weight_bits`` what the zero and scale of each group are searched for. Its own
kernels dequantize a whole weight to 16 bits in every call: references for quality, not for speed.
"""

from __future__ import annotations

from typing import Any

from lowbit.formats.gemlite import in_parts
from lowbit.formats.row import BF16, CUDA, FP16_FIRST, Format, row

REFERENCE: dict[str, Any] = {
    **FP16_FIRST,  # its compute_dtype by default; in bf16 the 8-bit zero points are rounded to 8 bits of mantissa
    "fast": False,
    "suite": "full",
    "modes": ("eager", "reduce-overhead", "regional"),
}
NIGHTLY: dict[str, Any] = {"suite": "nightly", "modes": ("eager", "reduce-overhead", "regional")}

WHOLE_BYTES = "packed in whole bytes: 8 bits stored per weight (hqq 0.2.8, Quantizer.bit_to_packing)"
NOTES = {
    6: WHOLE_BYTES,
    5: WHOLE_BYTES,
    3: "ten weights in 32 bits",
    1.58: "three levels in 2 bits per weight",
}


def _own(bits: float, group: int) -> Format:
    note = "; ".join(filter(None, ("dequantizes in every call", NOTES.get(bits))))
    words = (f"int{bits}",) if isinstance(bits, int) else ("ternary",)
    return row(
        *(f"a16w{bits:g}_g{group}", "hqq", "pytorch", (16, bits), *words), group_size=group, note=note, **REFERENCE
    )


ROWS: tuple[Format, ...] = (
    *(_own(bits, 64) for bits in (8, 6, 5, 4, 3, 2, 1.58, 1)),
    *(_own(bits, group) for bits, group in ((4, 128), (2, 32), (2, 16), (1, 32))),
    row(
        *("a16w4_compile_g64", "hqq", "pytorch_compile", (16, 4), "int4"),
        group_size=64,
        note="hqq compiles each product by itself (HQQBackend.PYTORCH_COMPILE): in an eager model only",
        **{**REFERENCE, "modes": ("eager",)},
    ),
    row(
        *("a16w4_aten_g64", "hqq", "aten", (16, 4), "int4"),
        group_size=64,
        packages=("hqq_aten",),
        options={"axis": 0},
        note="hqq's own CUDA dequantization, which takes axis 0 only",
        **(REFERENCE | CUDA),
    ),
    row(
        *("a16w4_gemlite_g64", "hqq", "gemlite", (16, 4), "int4", "gemlite"),
        group_size=64,
        packages=("gemlite", "triton"),
        **(FP16_FIRST | CUDA | NIGHTLY | in_parts("gemlite's kernel as hqq calls it")),
    ),
    row(
        *("a16w4_torchao_g64", "hqq", "torchao_int4", (16, 4), "int4", "torchao"),
        group_size=64,
        note="tinygemm, as hqq calls it",
        **(BF16 | CUDA | NIGHTLY),
    ),
    row(
        *("a16w4_bitblas_g64", "hqq", "bitblas", (16, 4), "int4", "bitblas"),
        group_size=64,
        packages=("bitblas",),
        dtypes=("fp16",),
        **(CUDA | NIGHTLY),
    ),
    row(
        *("a16w4_marlin", "hqq", "marlin", (16, 4), "int4", "marlin"),
        packages=("marlin",),
        dtypes=("fp16",),
        **(CUDA | NIGHTLY),
    ),
)
