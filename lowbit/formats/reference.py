"""The formats that lowbit itself keeps alive, as references on every device (``lowbit.reference``)."""

from __future__ import annotations

from typing import Any

from lowbit.formats.row import Format, row

REFERENCE: dict[str, Any] = {"fast": False, "suite": "full", "modes": ("eager", "default", "regional")}
"""Enough to show that they compile, and what a GPU makes of them: nobody would pick the fastest of six."""

MX = "OCP MX v1.0: blocks of 32 along K share a power of two"

ROWS: tuple[Format, ...] = (
    row("a16w6_e3m2_g32", "reference", "mxfp6_e3m2", (16, 6), "fp6", "mxfp6", group_size=32, note=MX, **REFERENCE),
    row("a16w6_e2m3_g32", "reference", "mxfp6_e2m3", (16, 6), "fp6", "mxfp6", group_size=32, note=MX, **REFERENCE),
    row(
        *("a16w6_e3m2", "reference", "fp6_e3m2_row", (16, 6), "fp6"),
        note="FP6-LLM's scale per output channel",
        **REFERENCE,
    ),
    row(
        *("a16w6_e2m3", "reference", "fp6_e2m3_row", (16, 6), "fp6"),
        note="one scale per output channel",
        **REFERENCE,
    ),
    row(
        *("a6w6_e3m2_g32", "reference", "mxfp6_e3m2_dynamic", (6, 6), "fp6", "mxfp6", "dynamic"),
        group_size=32,
        note=MX,
        **REFERENCE,
    ),
    row(
        *("a6w6_e2m3_g32", "reference", "mxfp6_e2m3_dynamic", (6, 6), "fp6", "mxfp6", "dynamic"),
        group_size=32,
        note=MX,
        **REFERENCE,
    ),
    row(
        *("a4w4_g128", "reference", "int4_dynamic", (4, 4), "int4", "dynamic"),
        group_size=128,
        note="absmax, weights per group, activations per token and group (Atom)",
        **REFERENCE,
    ),
    row(
        *("a1.58w1.58", "reference", "ternary_dynamic", (1.58, 1.58), "ternary", "dynamic"),
        note="absmean, weights per matrix (BitNet b1.58), activations per token; 5 trits a byte; not trained for it",
        **REFERENCE,
    ),
    row(
        *("a1w1", "reference", "binary_dynamic", (1, 1), "binary", "dynamic"),
        note="sign x mean magnitude, weights per channel, activations per token (XNOR-Net); not trained for it",
        **REFERENCE,
    ),
)
