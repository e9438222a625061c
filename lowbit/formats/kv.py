"""The formats of the KV cache alone: weights in bf16, keys and values in 8 or 4 bits (lowbit/kvcache)."""

from __future__ import annotations

from lowbit.formats.row import Format


def _kv(kv: str, bits: int, *words: str) -> Format:
    return Format(
        *(f"bf16_kv_{kv}", "torch", "cast", 16, 16),
        dtypes=("bf16",),
        keywords=("kv", f"kv{bits}", kv, *words),
        fast=False,
        suite="nightly",
        note="codes and scales per head and token, dequantized before attention: reference path, memory not speed",
        kv=kv,
    )


ROWS: tuple[Format, ...] = (
    _kv("int8", 8),
    _kv("fp8", 8, "float8"),
    _kv("int4", 4),
    Format(
        *("bf16_attn_fp8", "torch", "cast", 16, 16),
        dtypes=("bf16",),
        keywords=("kv", "kv8", "fp8", "float8", "attention"),
        suite="full",
        fast=False,
        modes=("eager", "regional"),
        note="queries, keys, probabilities and values in e4m3, both products in fp8, head by head: reference path",
        kv="fp8_attn",
    ),
)
