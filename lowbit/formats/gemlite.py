"""The formats of gemlite."""

from __future__ import annotations

from lowbit.formats.row import CUDA, FP16_FIRST, Format, row

ROWS: tuple[Format, ...] = (
    row("a16w8", "gemlite", "A16W8_INT8", (16, 8), "int8", **FP16_FIRST, **CUDA),
    row("a16w4_g128", "gemlite", "A16W4_HQQ_INT", (16, 4), "int4", "hqq", group_size=128, **FP16_FIRST, **CUDA),
    row("a8w8_fp8", "gemlite", "A8W8_FP8_dynamic", (8, 8), "fp8", "float8", "dynamic", **FP16_FIRST, **CUDA),
)
