"""The formats that torchao 0.18 has kernels for; torchao_reference.py has the rest.

What it no longer has is not here: autoquant, 6-bit floats (FPX), its own gemlite tensor and semi-sparse int4.
"""

from __future__ import annotations

from typing import Any

from lowbit.formats.row import BF16, CUDA, FP16_FIRST, Format, row

# Dequantize-in-the-epilogue int8 and fp8 matvecs are only fused into one kernel when Inductor may lower an M=1 product
# to a reduction, which it does under coordinate descent tuning alone (torch/_inductor/decomposition.py, mm).
FUSED_MATVEC = {"coordinate_descent_tuning": True}
# Fuses the two scales into the int8 product; torchao sets it process-wide (recommended_inductor_config_setter).
FUSED_INT8 = {**FUSED_MATVEC, "force_fuse_int_mm_with_mul": True}

INT8_WEIGHTS: dict[str, Any] = {
    "inductor": FUSED_MATVEC,
    # Else Inductor turns what is no fused matvec into aten._weight_int8pack_mm (fx_passes/quantization.py), whose
    # CUDA kernel takes 7,879 ms for a prefill of 512 tokens of 8B on an H200 (without: 24.5 ms, eager: 41 ms). A
    # decoded token is faster with the matcher's other patterns: 258 tok/s, 200 without. fp16 does not match that
    # pattern, but overflows: the products are summed before the scale is applied.
    "cuda_matmul_inductor": {"pattern_matcher": False},
}
INT8_PRODUCTS: dict[str, Any] = {"inductor": FUSED_INT8}
# torch._int_mm on CUDA: "self.size(0) needs to be greater than 16" (2.11); eager torchao goes round it
INT_MM: dict[str, Any] = {"compiled_min_rows": 17}
NIGHTLY: dict[str, Any] = {"suite": "nightly"}


def ao(name: str, scheme: str, bits: tuple[int, int], *keywords: str, **fields: Any) -> Format:
    """One row of this library: ``bits`` are those of activation and weight."""
    return row(name, "torchao", scheme, bits, *keywords, **fields)


FIRST: tuple[Format, ...] = (
    ao("a16w8", "int8_weight_only", (16, 8), "int8", "int8wo", **INT8_WEIGHTS),
    ao(
        "a8w8",
        "int8_dynamic",
        (8, 8),
        "int8",
        "dynamic",
        options=INT_MM,
        slow="compiled, its int8 product asks for 17 tokens; in eager mode safe_int_mm copies the whole weight and, "
        "at 16 tokens or fewer, multiplies in fp32 (docs/findings.md)",
        **INT8_PRODUCTS,
    ),
    ao(
        "a16w4_g128",
        "int4_weight_only",
        (16, 4),
        "int4",
        "int4wo",
        group_size=128,
        options={"pads_k_to": 1024},
        note="tile_packed_to_4d on CUDA (K padded to 1024), the prototype's opaque packing on a CPU",
        **BF16,
    ),
    ao(
        "a16w8_fp8",
        "fp8_weight_only",
        (16, 8),
        "fp8",
        "float8",
        inductor=FUSED_MATVEC,
        note="a decoded token's products are fused matvecs; other products dequantize first",
    ),
    ao("a8w8_fp8", "fp8_dynamic", (8, 8), "fp8", "float8", "dynamic", **BF16, **CUDA),
)

INT4: tuple[Format, ...] = tuple(
    ao(
        f"a16w4{'_hqq' if hqq else ''}_g{group}",
        "int4_weight_only",
        (16, 4),
        "int4",
        "int4wo",
        *(("hqq",) if hqq else ()),
        group_size=group,
        options={"pads_k_to": 1024, "hqq": hqq},
        **BF16,
        **NIGHTLY,
    )
    for hqq in (False, True)
    for group in (32, 64, 128, 256)
    if hqq or group != 128  # that one is a first choice
)

MSLK: tuple[Format, ...] = (
    *(
        ao(
            f"a16w4_{packing}_g128",
            "int4_mslk",
            (16, 4),
            "int4",
            "int4wo",
            "mslk",
            group_size=128,
            options={"packing": packing},
            **BF16,
            **CUDA,
            **NIGHTLY,
        )
        for packing in ("plain", "preshuffled")
    ),
    ao(
        "a8w4_fp8_g128",
        "fp8_int4_mslk",
        (8, 4),
        "int4",
        "fp8",
        "float8",
        "dynamic",
        "mslk",
        group_size=128,
        options={"packing": "preshuffled"},
        **BF16,
        **CUDA,
        **NIGHTLY,
    ),
)

EIGHT: tuple[Format, ...] = (
    ao(
        "a16w8_g128",
        "int8_weight_only",
        (16, 8),
        "int8",
        "int8wo",
        group_size=128,
        inductor=FUSED_MATVEC,
        note="dequantizes before each product",
        **NIGHTLY,
    ),
    ao(
        "a8w8_asym",
        "int8_dynamic",
        (8, 8),
        "int8",
        "dynamic",
        "asymmetric",
        options={**INT_MM, "asymmetric": True, "kernel_bound": 0.125},
        note="rounds each product to bf16 before it takes off the zero point's share: 2.7 % off at K = 768 beside an "
        "outlier, and more with larger K; in fp16 it overflows",
        **INT8_PRODUCTS,
        **BF16,
        **NIGHTLY,
    ),
    ao(
        "a8w8_static",
        "int8_static",
        (8, 8),
        "int8",
        "static",
        "calibrated",
        options=INT_MM,
        calibration_windows=8,
        note="one activation scale per linear, found on a calibration text",
        **INT8_PRODUCTS,
        **NIGHTLY,
    ),
    ao(
        "a16w8_fp8_tensor",
        "fp8_weight_only",
        (16, 8),
        "fp8",
        "float8",
        inductor=FUSED_MATVEC,
        options={"granularity": "tensor"},
        **NIGHTLY,
    ),
    ao(
        "a16w8_e5m2",
        "fp8_weight_only",
        (16, 8),
        "fp8",
        "float8",
        inductor=FUSED_MATVEC,
        options={"e5m2": True},
        **NIGHTLY,
    ),
    ao(
        "a8w8_fp8_tensor",
        "fp8_dynamic",
        (8, 8),
        "fp8",
        "float8",
        "dynamic",
        options={"granularity": "tensor"},
        **BF16,
        **CUDA,
        **NIGHTLY,
    ),
    ao(
        "a8w8_fp8_b128",
        "fp8_dynamic",
        (8, 8),
        "fp8",
        "float8",
        "dynamic",
        "block",
        group_size=128,
        packages=("triton",),
        note="weights in blocks of 128 by 128, activations in groups of 128",
        **BF16,
        **CUDA,
        **NIGHTLY,
    ),
    ao(
        "a8w8_fp8_static",
        "fp8_static",
        (8, 8),
        "fp8",
        "float8",
        "static",
        "calibrated",
        calibration_windows=8,
        note="one activation scale per linear, found on a calibration text",
        **BF16,
        **CUDA,
        **NIGHTLY,
    ),
)

BLACKWELL: tuple[Format, ...] = (
    ao("a8w8_mxfp8", "mx_dynamic", (8, 8), "mxfp8", "mx", group_size=32, **BF16, **CUDA, **NIGHTLY),
    ao("a4w4_mxfp4", "mx_dynamic", (4, 4), "mxfp4", "mx", group_size=32, **BF16, **CUDA, **NIGHTLY),
    ao("a4w4_nvfp4", "nvfp4_dynamic", (4, 4), "nvfp4", group_size=16, **BF16, **CUDA, **NIGHTLY),
)

UINTX: tuple[Format, ...] = tuple(
    ao(
        f"a{activation}w{bits}_uint{'_g128' if bits == 4 else ''}",
        scheme,
        (activation, bits),
        *(f"int{bits}", "uintx", "gemlite"),
        group_size=128 if bits == 4 else None,
        packages=("gemlite", "triton"),
        note="gemlite's kernels behind torchao's tensor",
        **FP16_FIRST,
        **CUDA,
        **NIGHTLY,
    )
    for activation, scheme in ((16, "uintx_weight_only"), (8, "int8_dynamic_uintx"))
    for bits in (4, 8)
)

ROWS: tuple[Format, ...] = (*FIRST, *INT4, *MSLK, *EIGHT, *BLACKWELL, *UINTX)
