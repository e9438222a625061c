"""The formats of bitsandbytes."""

from __future__ import annotations

from typing import Any

from lowbit.formats.row import FP16_FIRST, Format, row

NIGHTLY: dict[str, Any] = {"suite": "nightly", "modes": ("eager", "reduce-overhead", "regional")}

ROWS: tuple[Format, ...] = (
    row(
        *("a8w8_llmint8", "bitsandbytes", "llm_int8", (8, 8), "int8", "llm.int8", "bnb"),
        options={"threshold": 6.0, "waits_for_host": "its search for outlier columns (threshold 6.0)"},
        **FP16_FIRST,
    ),
    row(
        *("a16w4_nf4_dq", "bitsandbytes", "nf4", (16, 4), "nf4", "int4", "bnb"),
        group_size=64,
        options={"double_quant": True},
    ),
    row(
        *("a8w8_llmint8_t0", "bitsandbytes", "llm_int8", (8, 8), "int8", "llm.int8", "bnb"),
        options={"threshold": 0.0},
        note="threshold 0: no column is kept in 16 bits, so nothing waits for the host",
        **(FP16_FIRST | NIGHTLY),
    ),
    row(*("a16w4_nf4", "bitsandbytes", "nf4", (16, 4), "nf4", "int4", "bnb"), group_size=64, **NIGHTLY),
    row(*("a16w4_fp4", "bitsandbytes", "fp4", (16, 4), "fp4", "bnb"), group_size=64, **NIGHTLY),
    row(
        *("a16w4_fp4_dq", "bitsandbytes", "fp4", (16, 4), "fp4", "bnb"),
        group_size=64,
        options={"double_quant": True},
        **NIGHTLY,
    ),
    # 4096, the largest block of quantize_4bit, is left out: it does not divide Llama-3.1-8B's K of 14336, and then
    # gemm_4bit leaves its kernel for a dequantized product (bitsandbytes 0.50.2, backends/cuda/ops.py)
    *(
        row(f"a16w4_nf4_g{block}", "bitsandbytes", "nf4", (16, 4), "nf4", "int4", "bnb", group_size=block, **NIGHTLY)
        for block in (32, 128, 256, 512, 1024, 2048)
    ),
    *(
        row(f"a16w4_fp4_g{block}", "bitsandbytes", "fp4", (16, 4), "fp4", "bnb", group_size=block, **NIGHTLY)
        for block in (32, 128)
    ),
)
