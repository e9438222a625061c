"""The formats of bitsandbytes."""

from __future__ import annotations

from lowbit.formats.row import FP16_FIRST, Format, row

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
)
