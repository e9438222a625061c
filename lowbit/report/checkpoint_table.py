"""The part of docs/formats.md on checkpoints that are quantized already: their rows come with the model."""

from __future__ import annotations

from lowbit.formats import stored
from lowbit.formats.layouts import GROUPS, Inputs, Layout, Stored
from lowbit.report.markdown import code

CT: Layout = "compressed-tensors"
SIZES = ", ".join(map(str, GROUPS))

EXAMPLES: tuple[tuple[Stored, str], ...] = (
    (Stored("gptq", 4, 128, True), f"2, 3, 4 or 8 bits; groups of {SIZES} or a row; with and without zero points"),
    (Stored("gptq", 4, 128, True, ordered=True), "`desc_act`: act-order, `g_idx`"),
    (Stored("awq", 4, 128, False), f"GEMM; groups of {SIZES}"),
    (Stored(CT, 4, 128, True), f"`pack-quantized`; 2, 4 or 8 bits; groups of {SIZES} or a row; zero points too"),
    (Stored(CT, 4, 128, True, ordered=True), "`pack-quantized`, `actorder` group: `weight_g_idx`"),
    (Stored(CT, 8, None, True, plain=True), f"`int-quantized`, W8A16; per row, tensor or group of {SIZES}"),
    (Stored(CT, 8, None, True, plain=True, kind="float"), "`float-quantized`, fp8 weights alone; per row or tensor"),
    (
        Stored(CT, 8, None, True, plain=True, inputs=Inputs("int", dynamic=True)),
        "`int-quantized`, W8A8; inputs per token, symmetric or not",
    ),
    (
        Stored(CT, 8, None, True, plain=True, inputs=Inputs("int", dynamic=False)),
        "`int-quantized`, W8A8; inputs by `input_scale`",
    ),
    (
        Stored(CT, 8, None, True, plain=True, kind="float", inputs=Inputs("float", dynamic=True)),
        "`float-quantized`, fp8 W8A8; weights per row or tensor, inputs per token",
    ),
    (
        Stored(CT, 8, None, True, plain=True, kind="float", per="tensor", inputs=Inputs("float", dynamic=False)),
        "`float-quantized`, fp8 W8A8; inputs by `input_scale`",
    ),
    (
        Stored(CT, 8, 128, True, plain=True, kind="float", per="block", inputs=Inputs("float", True, 128)),
        "`float-quantized`, fp8 in blocks of 128 × 128; inputs per token and 128 columns",
    ),
)
"""One of each kind that lowbit/formats/stored.py reads, and what else is read like it."""


def section() -> list[str]:
    """Heading, what is common to all, and a table: what a config says, the row that runs it, that for mode native."""
    lines = [
        "",
        "## Checkpoints that are quantized already",
        "`--model` with such a folder or hub id brings rows of its own, with the checkpoint's codes and scales bit for "
        "bit; quality is taken against what they stand for. Mode `native` wants a packed head too, which lowbit makes. "
        "One of each kind; bits and group size stand in the name:",
        "",
        "| published as | row | modes | row for mode native |",
        "| --- | --- | --- | --- |",
    ]
    for how, said in EXAMPLES:
        own, *with_head = stored.as_rows(how)
        head = code(with_head[0].id) if with_head else "–"
        lines.append(f"| {how.layout}, {said} | {code(own.id)} | {', '.join(own.modes)} | {head} |")
    return lines
