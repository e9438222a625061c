"""The formats of torchao."""

from __future__ import annotations

from lowbit.formats.row import BF16, CUDA, Format, row

# Dequantize-in-the-epilogue int8 and fp8 matvecs are only fused into one kernel when Inductor may lower an M=1 product
# to a reduction, which it does under coordinate descent tuning alone (torch/_inductor/decomposition.py, mm).
FUSED_MATVEC = {"coordinate_descent_tuning": True}
# Fuses the two scales into the int8 product; torchao sets it process-wide (recommended_inductor_config_setter).
FUSED_INT8 = {**FUSED_MATVEC, "force_fuse_int_mm_with_mul": True}

ROWS: tuple[Format, ...] = (
    row(
        *("a16w8", "torchao", "int8_weight_only", (16, 8), "int8", "int8wo"),
        inductor=FUSED_MATVEC,
        # Else Inductor turns what is no fused matvec into aten._weight_int8pack_mm (fx_passes/quantization.py), whose
        # CUDA kernel takes 7,879 ms for a prefill of 512 tokens of 8B on an H200 (without: 24.5 ms, eager: 41 ms). A
        # decoded token is faster with the matcher's other patterns: 258 tok/s, 200 without. fp16 does not match that
        # pattern, but overflows: the products are summed before the scale is applied.
        cuda_matmul_inductor={"pattern_matcher": False},
    ),
    row(
        *("a8w8", "torchao", "int8_dynamic", (8, 8), "int8", "dynamic"),
        inductor=FUSED_INT8,
        # torch._int_mm on CUDA: "self.size(0) needs to be greater than 16" (2.11); eager torchao goes round it
        options={"compiled_min_rows": 17},
    ),
    row(
        *("a16w4_g128", "torchao", "int4_weight_only", (16, 4), "int4", "int4wo"),
        group_size=128,
        options={"pads_k_to": 1024},
        note="tile_packed_to_4d on CUDA (K padded to 1024), the prototype's opaque packing on a CPU",
        **BF16,
    ),
    row(
        *("a16w8_fp8", "torchao", "fp8_weight_only", (16, 8), "fp8", "float8"),
        inductor=FUSED_MATVEC,
        note="a decoded token's products are fused matvecs; other products dequantize first",
    ),
    row("a8w8_fp8", "torchao", "fp8_dynamic_row", (8, 8), "fp8", "float8", "dynamic", **BF16, **CUDA),
)
