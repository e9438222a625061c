"""auto: the row whose formats are chosen by measurement (lowbit/auto), part by part of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lowbit.formats.recipes import Recipe, make
from lowbit.formats.row import EVERY_MODE, LINEARS, Format

SCHEME = "auto"
"""Of a row that stands for another one, which a search finds."""

ENDS = "ends"

Groups = Mapping[str, tuple[str, ...]]
"""Name -> a recipe's patterns."""

GROUPS: dict[str, tuple[str, ...]] = {
    ENDS: ("layers.0.*", "layers.-1.*"),
    "q": ("*.q_proj",),
    "kv": ("*.k_proj", "*.v_proj"),
    "o": ("*.o_proj",),
    "gate_up": ("*.gate_proj", "*.up_proj"),
    "down": ("*.down_proj",),
    "head": ("lm_head",),
}
"""What gets a format of its own: a recipe's patterns, in its order. Linears of one group have one shape, but for the
first and the last layer, which lose the most and are taken together; the others are those of the layers between."""

NATIVE_GROUPS: dict[str, tuple[str, ...]] = {
    ENDS: GROUPS[ENDS],
    "qkv": (*GROUPS["q"], *GROUPS["kv"]),
    **{name: GROUPS[name] for name in ("o", "gate_up", "down", "head")},
}
"""The same for lowbit's own decode kernels, which multiply q, k and v as one matrix."""


def every_layer(among: Groups) -> Groups:
    """The same groups where no layer is told apart: first and last belong to the groups of their kind."""
    return {name: patterns for name, patterns in among.items() if name != ENDS}


PLAIN = {"bf16": "bf16-torch", "fp16": "fp16-torch"}
"""The format of what stays as it is, by base dtype."""

ROWS: tuple[Format, ...] = (
    Format(
        *("auto", "recipe", SCHEME, 16, 16),
        targets=(*LINEARS, "lm_head"),
        keywords=("search",),
        suite="full",
        modes=EVERY_MODE,
        note="the fastest formats within --max-kld, less a reserve, on a calibration text, part by part",
    ),
)


def counts(group: str, layers: int, among: Groups = GROUPS) -> dict[str, int]:
    """How many matrices of each name a group has in a model of ``layers`` decoder layers; none where it has no part."""
    ends = min(2, layers) if ENDS in among else 0
    if group == ENDS:
        return dict.fromkeys(LINEARS, ends)
    if group == "head":
        return {"lm_head": 1}
    names = (pattern.removeprefix("*.") for pattern in among[group])
    return {name: layers - ends for name in names if layers > ends}


def groups(layers: int, among: Groups = GROUPS) -> list[str]:
    """The groups that a model of ``layers`` decoder layers has."""
    return [name for name in among if counts(name, layers, among)]


def mix(
    name: str,
    formats: Mapping[str, str],
    dtype: str,
    known: Mapping[str, Format],
    note: str = "",
    among: Groups = GROUPS,
) -> Format:
    """The recipe that gives each group its format (id) and leaves the others plain, in the base ``dtype``.

    Raises LowbitError where the formats can't be mixed.
    """
    return make(Recipe(name, dict(_parts(formats, PLAIN[dtype], among)), note=note, dtype=dtype), known)


def _parts(formats: Mapping[str, str], plain: str, among: Groups) -> Iterator[tuple[str, str]]:
    # the ends are named even where they stay plain: the patterns of the others would reach them
    for group, patterns in among.items():
        part = formats.get(group, plain)
        if part != plain or group == ENDS:
            yield from ((pattern, part) for pattern in patterns)


def candidates(known: Iterable[Format]) -> list[Format]:
    """The rows worth a try, in the order of the search: first choices before the rest, 4 bits before others.

    Fast paths to all linears of a layer, lowbit's own kernels for 16 bits among them; no recipes, KV caches or rows
    that are calibrated on a whole model, for which a search has no time.
    """
    rows = [
        row
        for row in known
        if (row.quantized or row.backend == "lowbit") and row.fast and row.backend != "recipe"
        if set(LINEARS) <= set(row.targets) and not (row.kv or row.calibration_windows)
    ]
    return sorted(rows, key=lambda row: (row.suite != "quick", abs(row.weight_bits - 4)))
