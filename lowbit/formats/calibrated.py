"""The formats that are fitted to a text before they are stored: GPTQ and AWQ."""

from __future__ import annotations

from lowbit.formats.row import BF16, Format, row


def _gptq(bits: int) -> Format:
    return row(
        *(f"a16w{bits}_gptq_g128", "calibrated", "gptq", (16, bits), f"int{bits}", "gptq", "calibrated"),
        group_size=128,
        options={"stored_as": f"int{bits}_g128"},
        calibration_windows=32,
        suite="nightly",
        modes=("eager", "regional"),
        note=f"stored and multiplied as lowbit's own int{bits}",
    )


ROWS: tuple[Format, ...] = (
    _gptq(4),
    _gptq(3),
    _gptq(2),
    row(
        *("a16w4_awq_g128", "calibrated", "awq", (16, 4), "int4", "awq", "calibrated"),
        group_size=128,
        options={"stored_as": "int4_weight_only", "pads_k_to": 1024},
        packages=("torchao",),
        calibration_windows=16,
        suite="nightly",
        note="torchao's own AWQ over its int4; the inputs are scaled in each forward pass",
        **BF16,
    ),
)
