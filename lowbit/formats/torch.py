"""The formats of PyTorch itself: no quantization, the rows that all others are held against."""

from __future__ import annotations

from lowbit.formats.row import BF16, Format, row

ROWS: tuple[Format, ...] = (
    row("bf16", "torch", "cast", (16, 16), "bfloat16", **BF16),
    row("fp16", "torch", "cast", (16, 16), "float16", dtypes=("fp16",)),
)
