"""The formats of torchao 0.18 without a fast kernel in its wheel: emulated, dequantized, or to be built from source."""

from __future__ import annotations

from typing import Any

from lowbit.formats.row import BF16, Format
from lowbit.formats.torchao import ao

REFERENCE: dict[str, Any] = {"suite": "full", "fast": False, "modes": ("eager", "regional")}

E8M0 = "its scales, float8_e8m0fnu (torch 2.13: KeyError in Inductor's C++)"

ROWS: tuple[Format, ...] = (
    *(
        ao(
            f"a{activation}w{bits}_intx_g32",
            scheme,
            (activation, bits),
            f"int{bits}",
            "intx",
            group_size=32,
            note="one byte is stored per weight, whatever its bits",
            **REFERENCE,
        )
        for activation, scheme in ((16, "intx_weight_only"), (8, "int8_dynamic_intx"))
        for bits in range(1, 9)
    ),
    ao(
        "a8w4_g32",
        "int8_dynamic_int4",
        (8, 4),
        "int4",
        "dynamic",
        group_size=32,
        devices=("cpu",),
        suite="full",
    ),
    *(
        ao(
            f"a{bits}w{bits}_mxfp{bits}_emulated",
            "mx_dynamic",
            (bits, bits),
            f"mxfp{bits}",
            "mx",
            group_size=32,
            options={"emulated": True, "cpu_compiler_lacks": E8M0},
            note="quantized as on SM100, multiplied in bf16",
            **BF16,
            **REFERENCE,
        )
        for bits in (8, 4)
    ),
    ao(
        "a16w4_nvfp4",
        "nvfp4_weight_only",
        (16, 4),
        "nvfp4",
        group_size=16,
        note="dequantizes before each product",
        **BF16,
        **REFERENCE,
    ),
    ao(
        "a16w4_nf4",
        "nf4_weight_only",
        (16, 4),
        "nf4",
        group_size=64,
        note="dequantizes before each product",
        **REFERENCE,
    ),
)
