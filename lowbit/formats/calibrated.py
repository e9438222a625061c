"""The formats that are fitted to a text before they are stored: GPTQ and AWQ."""

from __future__ import annotations

from lowbit.formats.row import BF16, Format, row

ROWS: tuple[Format, ...] = (
    row(
        *("a16w4_gptq_g128", "calibrated", "gptq", (16, 4), "int4", "gptq", "calibrated"),
        group_size=128,
        options={"stored_as": "int4_g128"},
        calibration_windows=32,
        suite="nightly",
        modes=("eager",),
        note="stored and multiplied as lowbit's own int4",
    ),
    row(
        *("a16w3_gptq_g128", "calibrated", "gptq", (16, 3), "int3", "gptq", "calibrated"),
        group_size=128,
        options={"stored_as": "int3_g128"},
        calibration_windows=32,
        suite="nightly",
        modes=("eager",),
        note="stored and multiplied as lowbit's own int3",
    ),
    row(
        *("a16w2_gptq_g128", "calibrated", "gptq", (16, 2), "int2", "gptq", "calibrated"),
        group_size=128,
        options={"stored_as": "int2_g128"},
        calibration_windows=32,
        suite="nightly",
        modes=("eager",),
        note="stored and multiplied as lowbit's own int2",
    ),
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
