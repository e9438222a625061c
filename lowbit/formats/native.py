"""The formats of lowbit's own backend: packed weights, head included, activations in 16 bits."""

from __future__ import annotations

from typing import Any

from lowbit.formats.row import FP16_FIRST, LINEARS, Format, Suite, row


def _native(name: str, scheme: str, bits: float, *keywords: str, group: int | None = None, **fields: Any) -> Format:
    suite: Suite = fields.pop("suite", "nightly")
    targets = (*LINEARS, "lm_head")
    return row(
        name,
        "lowbit",
        scheme,
        (16, bits),
        *keywords,
        group_size=group,
        targets=targets,
        suite=suite,
        modes=MODES,
        **(FP16_FIRST | fields),
    )


MODES = ("eager", "reduce-overhead", "regional", "native")
"""``native``: the decode step in our own kernels' graph, where there are some for the format and the GPU (SM90).
``reduce-overhead`` and ``regional``: everywhere else on a GPU the operations are custom ops of Triton kernels, which a
compiler's graph holds. The decode kernels keep activations in fp16, beside bf16 weights in bf16."""

ROWS: tuple[Format, ...] = (
    _native("bf16", "bf16", 16, dtypes=("bf16",)),
    _native("a16w8", "int8", 8, "int8", suite="quick"),
    _native("a16w8_fp8", "fp8_e4m3", 8, "fp8", "float8"),
    _native("a16w4_g128", "int4_g128", 4, "int4", group=128, suite="quick"),
    _native("a16w4_g64", "int4_g64", 4, "int4", group=64),
    _native("a16w4_g32", "int4_g32", 4, "int4", group=32),
    _native("a16w4_sym_g128", "int4_sym_g128", 4, "int4", group=128),
    _native("a16w4_sym_g64", "int4_sym_g64", 4, "int4", group=64),
    _native("a16w4_sym_g32", "int4_sym_g32", 4, "int4", group=32),
    _native("a16w4_mxfp4", "mxfp4", 4, "mxfp4", "fp4", group=32),
    _native("a16w4_nvfp4", "nvfp4", 4, "nvfp4", "fp4", group=16),
    _native("a16w3_g128", "int3_g128", 3, "int3", group=128),
    _native("a16w2_g128", "int2_g128", 2, "int2", group=128),
    _native(
        "a16w158",
        "ternary",
        1.58,
        "ternary",
        note="absmean per row; a demonstration of speed unless the checkpoint is ternary",
    ),
    _native("a16w1", "binary", 1, "binary", note="sign and mean per row; a demonstration of speed"),
)
