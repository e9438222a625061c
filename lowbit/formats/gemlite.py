"""The formats of gemlite: every processor of gemlite.helper (0.6.0.post2), each at the group sizes that it takes.

Groups below 32 are left out: a kernel's step along K is at least 32 and loads one scale for it.
"""

from __future__ import annotations

from typing import Any

from lowbit.formats.row import CUDA, FP16_FIRST, Format, row

GEMLITE: dict[str, Any] = FP16_FIRST | CUDA
NIGHTLY: dict[str, Any] = GEMLITE | {"suite": "nightly", "modes": ("reduce-overhead", "regional")}
"""Eager, every kernel waits for Python (19 tok/s of an 8B on an H200, whatever the format): two modes that replay
CUDA graphs are enough, the second of which compiles one layer."""
HQQ: dict[str, Any] = NIGHTLY | {"packages": ("hqq",)}

EMULATED = "below SM100 its values are widened in registers, for products in 16 bits"
ROUNDED = "above 4 rows, its weights are rounded to e4m3 with their scales (a group's small ones to 2^-9)"
TERNARY = "weights ternarised by BitNet b1.58's absmean rule: a speed demonstration unless the checkpoint is ternary"


def in_parts(*notes: str) -> dict[str, Any]:
    """Bound and note of a row of integers below 8 bits, behind ``notes``. What multiplies 1 to 4 tokens there,
    gemv_revsplitK, adds K / 16 to K / 128 parts in fp16, in the order in which they come: 5.5e-3 at most with
    Llama-3.1-8B's K of 14336; bf16's epsilon is 7.8e-3. What it costs to find a wrong scale: docs/findings.md."""
    added = "up to 4 rows, adds up parts of K in fp16, in any order: off by up to 2^-7, which kernel truth allows it"
    return {"options": {"kernel_bound": 2.0**-7}, "note": "; ".join((*notes, added))}


BITNET: dict[str, Any] = NIGHTLY | in_parts(TERNARY)


def _weight_only(bits: int, groups: tuple[int | None, ...]) -> tuple[Format, ...]:
    """HQQ weights of ``bits``; group None: one for the row."""
    fields = HQQ | (in_parts() if bits < 8 else {})
    return tuple(
        row(
            *(f"a16w{bits}_hqq" if group is None else f"a16w{bits}_g{group}", "gemlite", f"A16W{bits}_HQQ_INT"),
            *((16, bits), f"int{bits}", "hqq"),
            group_size=group,
            **fields,
        )
        for group in groups
    )


def _fp8_activations(bits: int, group: int) -> Format:
    return row(
        *(f"a8w{bits}_g{group}", "gemlite", f"A8W{bits}_HQQ_INT_dynamic", (8, bits)),
        *(f"int{bits}", "fp8", "hqq", "dynamic"),
        group_size=group,
        **(HQQ | in_parts(ROUNDED)),
    )


def _microscaled(name: str, scheme: str, bits: tuple[int, int], group: int, *words: str) -> Format:
    return row(name, "gemlite", scheme, bits, *words, group_size=group, note=EMULATED, **NIGHTLY)


ROWS: tuple[Format, ...] = (
    row("a16w8", "gemlite", "A16W8_INT8", (16, 8), "int8", **GEMLITE),
    row(
        *("a16w4_g128", "gemlite", "A16W4_HQQ_INT", (16, 4), "int4", "hqq"),
        group_size=128,
        packages=("hqq",),
        **(GEMLITE | in_parts()),
    ),
    row("a8w8_fp8", "gemlite", "A8W8_FP8_dynamic", (8, 8), "fp8", "float8", "dynamic", **GEMLITE),
    row("a16w8_fp8", "gemlite", "A16W8_FP8", (16, 8), "fp8", "float8", **NIGHTLY),
    *_weight_only(8, (None, 128)),
    *_weight_only(4, (None, 32, 64, 256)),
    *_weight_only(2, (32, 64, 128)),
    *_weight_only(1, (32, 64, 128)),
    row("a8w8", "gemlite", "A8W8_INT8_dynamic", (8, 8), "int8", "dynamic", **NIGHTLY),
    *(
        row(
            *(f"a8w8_{number}block128", "gemlite", f"A8W8_{kind}_dynamic", (8, 8), kind.lower(), "dynamic", "block"),
            options={"processor": {"block_quant": True}},
            note="a weight scale per 128 × 128, an activation scale per 128 of a row",
            **NIGHTLY,
        )
        for number, kind in (("", "INT8"), ("fp8_", "FP8"))
    ),
    _fp8_activations(4, 64),
    _fp8_activations(4, 128),
    _fp8_activations(2, 64),
    _fp8_activations(2, 128),
    _microscaled("a16w8_mxfp8", "A16W8_MXFP", (16, 8), 32, "mxfp8", "mx", "fp8"),
    _microscaled("a16w4_mxfp4", "A16W4_MXFP", (16, 4), 32, "mxfp4", "mx", "fp4"),
    _microscaled("a16w4_nvfp4", "A16W4_NVFP", (16, 4), 16, "nvfp4", "fp4"),
    _microscaled("a8w8_mxfp8", "A8W8_MXFP_dynamic", (8, 8), 32, "mxfp8", "mx", "fp8", "dynamic"),
    _microscaled("a8w4_mxfp4", "A8W4_MXFP_dynamic", (8, 4), 32, "mxfp4", "mx", "fp4", "dynamic"),
    _microscaled("a4w4_mxfp4", "A4W4_MXFP_dynamic", (4, 4), 32, "mxfp4", "mx", "fp4", "dynamic"),
    _microscaled("a4w4_nvfp4", "A4W4_NVFP_dynamic", (4, 4), 16, "nvfp4", "fp4", "dynamic"),
    row("a16w1.58", "gemlite", "A16W158_INT", (16, 1.58), "ternary", "bitnet", **BITNET),
    row("a8w1.58", "gemlite", "A8W158_INT_dynamic", (8, 1.58), "ternary", "bitnet", "dynamic", **BITNET),
)
