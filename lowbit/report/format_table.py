"""docs/formats.md: every format as a row, with what stored runs measured of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from lowbit.formats.row import LINEARS, TABLES, Format
from lowbit.report import checkpoint_table
from lowbit.report.figures import CPU, H200, Place, Source, places
from lowbit.report.layout import NONE, divergence, number
from lowbit.report.markdown import code, text
from lowbit.report.rows import HEADLINE, Row

COMMAND = "python -m lowbit formats --markdown -o docs/formats.md"
BF16 = "bf16-torch"
VOWELS = "AEFHILMNORSX8"  # of names that are spelled out: an H200, an A100, an L40; a B200, a T4

CAPABILITY = {H200: 90}
"""Of a card, as rows ask for it (SM90): no stored run has it."""

TITLES = {
    "torch": "PyTorch, and the KV cache",
    "calibrated": "Calibrated: GPTQ and AWQ",
    "lowbit": "lowbit's own kernels",
    "reference": "lowbit's references",
    "tables": "Embedding and head",
    "recipe": "Recipes",
}
"""Headings of the libraries whose name is none."""

OPTIONS = {"double_quant": "double quantization", "hqq": "zeros and scales searched by HQQ", "emulated": "emulated"}
"""What these of a row's options mean."""


class Column(NamedTuple):
    """``cell`` gives a format's text; a column that ``always`` stands there does so without a single figure."""

    title: str
    cell: Callable[[Format], str]
    always: bool = True
    right: bool = True


def page(formats: Sequence[Format], sources: Sequence[Source], needs: Mapping[str, str]) -> str:
    """The whole page. ``needs`` maps a format's id to what it asks for, in words (``backends.needs``)."""
    found = places(sources, [fmt.id for fmt in formats])
    columns = _columns(found, needs)
    shown = [column for column in columns if column.always or any(column.cell(fmt) != NONE for fmt in formats)]
    lines = ["# Formats", "", *_origin(sources), "", *_legend(formats, found, needs)]
    by_library = sorted(formats, key=lambda fmt: [each.backend for each in formats].index(fmt.backend))
    for library, members in groupby(by_library, key=lambda fmt: fmt.backend):
        lines += ["", f"## {TITLES.get(library, library)}", *table(shown, list(members))]
    return "\n".join([*lines, *checkpoint_table.section()]) + "\n"


def table(columns: Sequence[Column], formats: Iterable[Format]) -> list[str]:
    lines = [[column.title for column in columns], ["---:" if column.right else "---" for column in columns]]
    lines += [[column.cell(fmt) for column in columns] for fmt in formats]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _origin(sources: Sequence[Source]) -> list[str]:
    lines = [f"Written by `{COMMAND}`; what is changed by hand is lost. Made of", ""]
    taken: dict[str, int] = {}
    for source in sources:
        header = source.header
        dummy = ", dummy weights" if header.load_format == "dummy" else ""
        versions = ", ".join(
            f"{name} {header.environment[name]}"
            for name in ("torch", "triton", "torchao", "gemlite", "bitsandbytes", "hqq", "driver")
            if header.environment.get(name, "none")[0].isdigit()  # else "not installed", "none"
        )
        told = (
            f"- `{source.path.as_posix()}`: {text(header.model)}{dummy} on {text(header.device_name)}, "
            f"{header.started[:10]}, suite {header.suite}; {text(versions)}"
        )
        taken[told] = taken.get(told, 0) + source.runs
    lines += [f"{told}; {count} {'run' if count == 1 else 'runs'}" for told, count in taken.items()]
    return [*lines, *([] if sources else ["- no stored run at all"])]


def _legend(formats: Sequence[Format], found: Sequence[Place], needs: Mapping[str, str]) -> list[str]:
    references = sum(not fmt.fast for fmt in formats)
    lines = [
        f"{len(formats)} rows, {len(formats) - references} of them fast paths, {references} references: right, but not "
        "what anybody would serve.",
        "",
        "- **bits**: stored per weight of the quantized matrices, scales and zeros included, counted from the tensors; "
        "of Llama-3.1-8B where it was measured, else of the embedded model, whose small matrices make what is stored "
        "once per matrix or row weigh more.",
        "- **KL**: mean divergence from bf16 in nats, **ppl**: perplexity, both of the embedded model on its own text, "
        "on the machine that the heading names.",
        "- **decode**: tokens per second at batch 1 and context ~0 of the fastest mode measured, Llama-3.1-8B's shape "
        "on a GPU, the embedded model on a CPU; where another context alone was measured, its workload is named "
        "(b1_c128: from a context of 128). *Not measured*: in none of the files above; *can't run*: the row asks for a "
        "later GPU. **×bf16**: over bf16's fastest, "
        "at context ~0 alone. **VRAM**: this process's peak by NVML. **MBU**: bytes read per second over the card's "
        "*measured* read bandwidth. **quantize**: from the master "
        "in host memory to the quantized model on the card.",
    ]
    cpu = next(place for place in found if place.slug == CPU)
    if not any(cpu.fastest(fmt.id) for fmt in formats):
        lines.append("- Decode on a CPU is in no stored run: nothing was measured on an idle machine.")
    gpus = [place for place in found if place.slug != CPU]
    lines += [_coverage(formats, gpu, needs, "decode") for gpu in gpus if gpu.measured]
    return lines + [_coverage(formats, gpu, needs, "quality") for gpu in gpus if gpu.beside]


def _coverage(formats: Sequence[Format], gpu: Place, needs: Mapping[str, str], kind: str) -> str:
    """How many of a GPU's rows have a decode figure, or a KL, there, and what became of the others."""

    def has(fmt: Format) -> bool:
        return (gpu.decode(fmt.id) if kind == "decode" else gpu.quality(fmt.id, "ppl")) is not None

    able = [fmt for fmt in formats if "cuda" in fmt.devices]
    rest = [fmt for fmt in able if not has(fmt)]
    later = [fmt for fmt in rest if _too_old(gpu, needs[fmt.id])]
    outcomes = [gpu.fate(fmt.id, kind)[0] for fmt in rest if fmt not in later]
    fates = {
        "need a later GPU": len(later),
        "were skipped, for the reason in the remarks": outcomes.count("skipped"),
        "failed, as the remarks have it": outcomes.count("failed"),
        "are in no stored run": outcomes.count(""),
    }
    figure = "decode figure" if kind == "decode" else "KL"
    told = f"- {_short(gpu)}: {len(able) - len(rest)} of {len(able)} rows have a {figure}"
    return told + "".join(f"; {fate}: {count}" for fate, count in fates.items() if count) + "."


def _columns(found: Sequence[Place], needs: Mapping[str, str]) -> list[Column]:
    gpus = [place for place in found if place.slug != CPU]
    cpu = next(place for place in found if place.slug == CPU)
    columns = [
        Column("format", lambda fmt: code(fmt.id), right=False),
        Column("what it is", what, right=False),
        Column("bits", lambda fmt: _bits(fmt, [*gpus, cpu])),
        Column("path", lambda fmt: "fast" if fmt.fast else "reference", right=False),
        Column("needs", lambda fmt: text(needs[fmt.id]), right=False),
        Column("KL, CPU", lambda fmt: _kl(fmt, cpu)),
        Column("ppl, CPU", lambda fmt: _ppl(cpu.quality(fmt.id, "ppl")), always=False),
        Column("decode, CPU", lambda fmt: _decode(fmt, cpu) if cpu.fastest(fmt.id) else NONE, always=False),
    ]
    for gpu in gpus:
        columns += _gpu_columns(gpu, needs)
    return [*columns, Column("remarks", lambda fmt: _remarks(fmt, found), right=False)]


def _gpu_columns(gpu: Place, needs: Mapping[str, str]) -> list[Column]:
    name = _short(gpu)
    return [
        Column(f"KL, {name}", lambda fmt: _kl(fmt, gpu), always=False),
        Column(f"decode, {name}", lambda fmt: _decode(fmt, gpu, needs[fmt.id]), always=gpu.slug == H200),
        Column("×bf16", lambda fmt: _three(_ratio(fmt, gpu)), always=False),
        Column("VRAM, MiB", lambda fmt: _of(gpu, fmt, "vram_peak_mib", number), always=False),
        Column("MBU", lambda fmt: _of(gpu, fmt, "mbu", _percent), always=False),
        Column("quantize, s", lambda fmt: _of(gpu, fmt, "quantize_s", number), always=False),
    ]


def what(fmt: Format) -> str:
    """``A16W4 int4, groups of 128``; a recipe's parts; a cache's contents."""
    words = [f"A{fmt.activation_bits:g}W{fmt.weight_bits:g}"]
    if fmt.parts:
        parts = [
            f"{code(pattern)} {'in 16 bits' if part == BF16 else code(part)}" for pattern, part in fmt.parts.items()
        ]
        words.append(", ".join(parts))
    elif fmt.quantized:
        words[0] += f" {fmt.keywords[0]}" if fmt.keywords else ""
        words += [f"groups of {fmt.group_size}"] if fmt.group_size else []
        words += [code(fmt.scheme)]
        words += [said for option, said in OPTIONS.items() if fmt.options.get(option)]
    if fmt.targets == TABLES:
        words.append("embedding and head alone")
    elif not fmt.parts and set(fmt.targets) > set(LINEARS):
        words.append(f"{' and '.join(code(name) for name in fmt.targets if name not in LINEARS)} too")
    if fmt.kv:
        words.append(f"KV cache in {fmt.kv}")
    return ", ".join(words)


def _short(place: Place) -> str:
    return place.name.removeprefix("NVIDIA ")


def _bits(fmt: Format, order: Sequence[Place]) -> str:
    found = next((value for place in order if (value := place.value(fmt.id, "bits_per_weight")) is not None), None)
    return NONE if found is None else f"{found:.3f}"


def _kl(fmt: Format, place: Place) -> str:
    if fmt.is_baseline and place.quality(fmt.id, "ppl") is not None:
        return "0"
    return divergence(place.quality(fmt.id, "kld"))


def _three(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _ppl(value: float | None) -> str:
    return number(value) if value is not None and value >= 100 else _three(value)


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f} %"


def _of(place: Place, fmt: Format, name: str, show: Callable[[float | None], str]) -> str:
    found = place.decode(fmt.id)
    return show(found[0].value("decode", found[1], name)) if found else NONE


def _too_old(place: Place, needs: str) -> str:
    """The SM100 of a row's needs, where the place's card is older; "" where it is not, or nobody knows."""
    oldest, has = re.search(r"\bSM(\d+)", needs), CAPABILITY.get(place.slug)
    return oldest[0] if oldest and has and int(oldest[1]) > has else ""


def _decode(fmt: Format, place: Place, needs: str = "") -> str:
    """``276.3 reduce-overhead``, ``749.2 native, b1_c128``; else that there is no figure, or can be none there."""
    found = place.decode(fmt.id)
    if found is not None:
        row, workload = found
        speed = number(row.value("decode", workload, "decode_tok_s"))
        return f"{speed} {row.mode}" + (f", {workload}" if workload != HEADLINE else "")
    name = _short(place)
    if "cuda" not in fmt.devices:
        return "runs on a CPU alone"
    if oldest := _too_old(place, needs):
        return f"can't run: needs {oldest}, this is SM{CAPABILITY[place.slug]}"
    return f"not measured on {'an' if name[0] in VOWELS else 'a'} {name}"


def _ratio(fmt: Format, place: Place) -> float | None:
    mine, base = place.fastest(fmt.id), place.fastest(BF16)
    return _speed(mine) / _speed(base) if mine and base else None


def _speed(row: Row) -> float:
    assert row.decode_tok_s is not None  # Place.fastest gives no row without
    return row.decode_tok_s


def _why_slow(fmt: Format) -> str:
    waits = fmt.options.get("waits_for_host")
    return fmt.slow or (f"no CUDA graph can hold {waits}, it waits for the host" if waits else "")


def _why_slower(fmt: Format, place: Place) -> str:
    """The row's own reason; else that it was never compiled and bf16 was. "" where neither is known."""
    mine, base = place.fastest(fmt.id), place.fastest(BF16)
    eager = {row.mode for row in place.rows.get(fmt.id, ()) if row.decode_tok_s} == {"eager"}
    if _why_slow(fmt) or mine is None or base is None or not eager or base.mode == "eager":
        return _why_slow(fmt)
    return f"in eager mode, all that was measured; bf16's figure is {base.mode}"


def _remarks(fmt: Format, found: Sequence[Place]) -> str:
    """Slower than bf16, and why; why there is no figure; the row's own note."""
    told, reasons = [], dict[str, list[str]]()
    for place in found:
        ratio = _ratio(fmt, place)
        if ratio is not None and ratio < 1:
            why = _why_slower(fmt, place)
            why = f": {text(why)}" if why else ""
            told.append(f"**slower than bf16** on {'the' if place.slug == CPU else 'an'} {_short(place)}{why}")
        if ("cpu" if place.slug == CPU else "cuda") not in fmt.devices:
            continue  # "needs" says it
        name = _short(place)
        missing = {} if place.slug == CPU or place.decode(fmt.id) else {"decode": name}
        if place.quality(fmt.id, "ppl") is None:
            missing["quality"] = name if place.slug == CPU or missing else f"KL on {name}"
        for kind, where in missing.items():
            if (reason := place.fate(fmt.id, kind)[1]) and where not in reasons.setdefault(reason, []):
                reasons[reason].append(where)
    told += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    cache = next((value for place in found if (value := place.value(fmt.id, "kv_bytes_per_tok"))), None)
    if fmt.kv and cache:
        told.append(f"KV cache: {cache:,.0f} bytes per position")
    told += [fmt.note] if fmt.note else []
    return "; ".join(text(each) if not each.startswith("**") else each for each in told)
