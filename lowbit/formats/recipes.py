"""Recipes: rows that give different parts of a model different formats, of any libraries.

A recipe is an ordered mapping pattern -> format id. A pattern is a shell glob over module paths without the leading
``model.``: ``layers.0.self_attn.q_proj`` … ``layers.31.mlp.down_proj``, ``lm_head``, ``embed_tokens``. Layers also
count from the end: ``layers.-1.*`` is the last one. The first pattern that matches decides; what none matches, and what
``bf16-torch`` or ``fp16-torch`` matches, stays as it is. The embedding is meant only by a pattern that spells
``embed_tokens``: most libraries quantize linears alone. A new recipe is one row here, or a file for ``--recipe``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from lowbit.errors import LowbitError, unknown
from lowbit.formats.row import EVERY_MODE, KV_FORMATS, LINEARS, TABLE_PATHS, TABLES, Format, unknown_format

INT4, INT8, NF4 = "a16w4_g128-torchao", "a16w8-torchao", "a16w4_nf4_dq-bitsandbytes"
TABLE8, TABLE4 = "a16w8-tables", "a16w4_g64-tables"
REST = "layers.*"
ANY_ROWS_MODES = set(EVERY_MODE) - {"native"}
"""The compile modes of a row that names none: lowbit's own kernels run lowbit's own rows alone."""


class Recipe(NamedTuple):
    """What a row of this file says; everything else follows from the formats that it names."""

    name: str
    parts: Mapping[str, str]
    keywords: tuple[str, ...] = ()
    suite: str = "full"
    note: str = ""
    kv: str = ""
    dtype: str = ""


RECIPES: tuple[Recipe, ...] = (
    Recipe("a16w4_g128_head8", {"lm_head": INT8, REST: INT4}, ("int4", "head8"), "nightly"),
    Recipe("a16w4_g128_head4", {"lm_head": INT4, REST: INT4}, ("int4", "head4"), "nightly"),
    Recipe("a16w8_head8", {"lm_head": INT8, REST: INT8}, ("int8", "head8"), "nightly"),
    Recipe(
        "a16w4_g128_head8_ends16",
        {"lm_head": INT8, "layers.0.*": "bf16-torch", "layers.-1.*": "bf16-torch", REST: INT4},
        ("int4", "head8", "ends16"),
        "nightly",
        "the first and the last layer stay in bf16",
    ),
    Recipe(
        "a16w4_g128_down8_head8",
        {"lm_head": INT8, "*.down_proj": INT8, REST: INT4},
        ("int4", "head8", "down8"),
        note="down_proj, whose inputs have the largest outliers, in int8",
    ),
    Recipe(
        "a16w4_nf4_attn8_head8",
        {"lm_head": INT8, "*.self_attn.*": INT8, REST: NF4},
        ("nf4", "int4", "attn8", "head8"),
        note="two libraries in one model",
    ),
    Recipe(
        "a16w4_g128_tables8",
        {"lm_head": TABLE8, "embed_tokens": TABLE8, REST: INT4},
        ("int4", "head8", "embed8"),
        note="embedding and head in int8; tied, they share one table",
    ),
    Recipe(
        "a16w4_g128_tables4",
        {"lm_head": TABLE4, "embed_tokens": TABLE4, REST: INT4},
        ("int4", "head4", "embed4"),
        note="embedding and head in int4; tied, they share one table",
    ),
    Recipe("a16w8_tables8", {"lm_head": TABLE8, "embed_tokens": TABLE8, REST: INT8}, ("int8", "head8", "embed8")),
    Recipe(
        "a16w4_g128_gemlite_head8",
        {"lm_head": "a16w8-gemlite", REST: "a16w4_g128-gemlite"},
        ("int4", "hqq", "head8"),
        "nightly",
    ),
    Recipe(
        "a16w4_g128_head8_kv_int8",
        {"lm_head": INT8, REST: INT4},
        ("int4", "head8", "kv", "kv8"),
        "nightly",
        "weights and KV cache",
        kv="int8",
    ),
    *(
        Recipe(
            f"a16w4_g128_lowbit_kv_{kv}",
            {"lm_head": "a16w4_g128-lowbit", REST: "a16w4_g128-lowbit"},
            ("int4", "head4", "kv", "kv8"),
            "nightly",
            "lowbit's own weights; mode native reads the codes of the KV cache, eager dequantizes it first",
            kv=kv,
        )
        for kv in ("int8", "fp8")
    ),
    Recipe("a16w8_gemlite_head8", {"lm_head": "a16w8-gemlite", REST: "a16w8-gemlite"}, ("int8", "head8"), "nightly"),
)


def rows(known: Mapping[str, Format]) -> list[Format]:
    """The recipes of this file as rows, made of the rows ``known``."""
    return [make(recipe, known) for recipe in RECIPES]


def make(recipe: Recipe, known: Mapping[str, Format]) -> Format:
    """The row of a recipe: dtypes and devices that all its formats share, their Inductor flags and limits together.

    Its bits are those of the format with the fewest. Raises LowbitError naming the recipe for an unknown format, a
    pattern that names nothing of a Llama, formats that share no base dtype or device or want different values of one
    Inductor flag, and a recipe inside a recipe.
    """
    if recipe.kv and recipe.kv not in KV_FORMATS:
        raise LowbitError(f"recipe {recipe.name}: {unknown('KV cache format', recipe.kv, KV_FORMATS)}")
    if not recipe.parts:
        raise LowbitError(
            f"recipe {recipe.name} is empty: expected patterns with format ids, such as {{'*': '{INT8}'}}"
        )
    for pattern, part in recipe.parts.items():
        if part not in known:
            raise LowbitError(f"recipe {recipe.name}: {unknown_format(part, known)}")
        if known[part].kv:
            raise LowbitError(
                f"recipe {recipe.name}: {pattern} names {part}, a format of the KV cache; say it as its kv"
            )
        nested = known[part].backend == "recipe"
        if nested or known[part].calibration_windows:
            what = "a recipe itself; name its formats" if nested else "which is calibrated on a whole model"
            raise LowbitError(f"recipe {recipe.name}: {pattern} names {part}, {what}")
        _check_reach(recipe.name, pattern, known[part])
    members = [known[part] for part in dict.fromkeys(recipe.parts.values())]
    lowest = min(members, key=lambda member: member.weight_bits)
    first = members[0]
    dtypes = tuple(
        name for name in first.dtypes if all(name in member.dtypes for member in members) and recipe.dtype in ("", name)
    )
    devices = tuple(name for name in first.devices if all(name in member.devices for member in members))
    shared = _shared_modes(members)
    if not dtypes or not devices or shared is None:
        told = "; ".join(f"{m.id}: {', '.join((*m.dtypes, *m.devices, *m.modes))}" for m in members)
        asked = f" within its dtype {recipe.dtype}" if recipe.dtype else ""
        raise LowbitError(
            f"recipe {recipe.name}: its formats share no base dtype, device or compile mode{asked} ({told})"
        )
    return Format(
        recipe.name,
        "recipe",
        "recipe",
        lowest.activation_bits,
        lowest.weight_bits,
        dtypes=dtypes,
        devices=devices,
        targets=tuple(name for name in (*LINEARS, *TABLES) if any(_reaches(p, name) for p in recipe.parts)),
        inductor=_merge(recipe.name, members, "inductor"),
        cuda_matmul_inductor=_merge(recipe.name, members, "cuda_matmul_inductor"),
        options=_limits(members),
        keywords=tuple(dict.fromkeys((*recipe.keywords, *(member.backend for member in members)))),
        fast=all(member.fast for member in members),
        suite=recipe.suite,  # type: ignore[arg-type]
        modes=shared,
        note=recipe.note,
        parts=dict(recipe.parts),
        kv=recipe.kv,
    )


def _shared_modes(members: Iterable[Format]) -> tuple[str, ...] | None:
    """The compile modes that all have, () for those of any row; None: they share none."""
    named = [set(member.modes or ANY_ROWS_MODES) for member in members]
    shared = set.intersection(*named)
    if shared == ANY_ROWS_MODES:
        return ()
    return tuple(mode for mode in EVERY_MODE if mode in shared) or None


def _check_reach(recipe: str, pattern: str, part: Format) -> None:
    reached = [name for name in (*LINEARS, *TABLES) if _reaches(pattern, name)]
    if not reached:
        names = ", ".join((*LINEARS, *TABLES))
        raise LowbitError(f"recipe {recipe}: {pattern!r} names no module of a Llama; there are {names}")
    able = {"lm_head", *LINEARS} if set(part.targets) & set(LINEARS) else set(part.targets)
    if part.quantized and (wrong := [name for name in reached if name not in able | set(part.targets)]):
        raise LowbitError(
            f"recipe {recipe}: {pattern!r} gives {part.id} to {', '.join(wrong)}; "
            f"it can hold {', '.join(sorted(able))}; for embed_tokens take {TABLE8} or {TABLE4}"
        )


def _merge(name: str, members: Iterable[Format], which: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for member in members:
        for flag, value in getattr(member, which).items():
            if merged.setdefault(flag, value) != value:
                raise LowbitError(
                    f"recipe {name}: {member.id} wants Inductor's {flag} = {value!r}, another of its formats "
                    f"{merged[flag]!r}, and one compile has one value"
                )
    return merged


def _limits(members: Iterable[Format]) -> dict[str, Any]:
    # what compilers.unmet reads of a row: one part's limit is the whole model's
    options: dict[str, Any] = {}
    for member in members:
        for name in ("waits_for_host", "cpu_compiler_lacks"):
            if name in member.options:
                options.setdefault(name, member.options[name])
        if least := member.options.get("compiled_min_rows"):
            options["compiled_min_rows"] = max(least, options.get("compiled_min_rows", 0))
    return options


def _paths(name: str, index: int) -> str:
    if name in TABLES:
        return name
    return f"layers.{index}.{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}"


def _reaches(pattern: str, name: str) -> bool:
    """Whether a pattern can match a module of this name in some layer of some model."""
    numbers = {0, -1, *(int(found) for found in re.findall(r"-?\d+", pattern))}
    return any(_matches(_paths(name, number), pattern) for number in numbers)


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) and (path != "embed_tokens" or path in pattern)


def part_of(fmt: Format, path: str, layers: int) -> str | None:
    """The id of the format that a recipe gives to the module at ``path`` in a model of ``layers`` decoder layers."""
    plain = path.removeprefix("model.")
    spellings = [plain]
    if found := re.match(r"layers\.(\d+)\.", plain):
        spellings.append(f"layers.{int(found[1]) - layers}.{plain[found.end() :]}")
    for pattern, part in fmt.parts.items():
        if any(_matches(spelling, pattern) for spelling in spellings):
            return part
    return None


def matrices(layers: int) -> Iterator[tuple[str, str]]:
    """(path, module name) of every matrix of a Llama with ``layers`` decoder layers."""
    yield from ((f"model.{_paths(name, index)}", name) for index in range(layers) for name in LINEARS)
    yield from zip(TABLE_PATHS, TABLES, strict=True)


def assignment(fmt: Format, layers: int) -> Iterator[tuple[str, str, str]]:
    """(path, module name, format id) of all that a row, recipe or not, names in a model of ``layers`` layers."""
    for path, name in matrices(layers):
        part = part_of(fmt, path, layers) if fmt.parts else fmt.id if name in fmt.targets else None
        if part is not None:
            yield path, name, part


def read(path: Path, known: Mapping[str, Format]) -> Format:
    """The recipe in a JSON file: ``{"name": "mine", "parts": {"lm_head": "a16w8-torchao", …}}``, ``kv``, ``dtype`` (the
    base dtype: bf16 or fp16) and ``note`` if it has them; it runs in any suite. With ``"format": id`` in place of
    ``parts`` it is that row under its own name: what a search (lowbit/auto) found can be one format as it is.

    Raises LowbitError for a file that can't be read or says something else, and what ``make`` raises.
    """
    expected = 'expected {"name": …, "parts": {pattern: format id, …}}'
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LowbitError(f"recipe {path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise LowbitError(f"recipe {path}: no JSON: {error}; {expected}") from error
    name, parts = (document.get("name"), document.get("parts")) if isinstance(document, dict) else (None, None)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.]*", name):
        raise LowbitError(f"recipe {path}: {expected}, the name of letters, digits, _ and ., got name {name!r}")
    if single := document.get("format"):
        if parts is not None:
            raise LowbitError(f"recipe {path}: it has format and parts; expected one of them")
        if single not in known:
            raise LowbitError(f"recipe {path}: {unknown_format(str(single), known)}")
        return replace(known[single], name=name, suite="quick")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise LowbitError(f"recipe {path}: {expected}, got parts {parts!r}")
    note, kv, dtype = (str(document.get(word, "")) for word in ("note", "kv", "dtype"))
    return make(Recipe(name, parts, suite="quick", note=note, kv=kv, dtype=dtype), known)
