"""Format: what one row of the format tables says, and the words that rows share. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lowbit.errors import LowbitError, unknown

EVERY_MODE = (
    "eager",
    "default",
    "reduce-overhead",
    "max-autotune-no-cudagraphs",
    "max-autotune",
    "regional",
    "native",
)
"""Compile modes; lowbit/compilers.py says what each is."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linears of a Llama decoder layer, 224 in Llama-3.1-8B; lm_head stays as it is unless a row names it."""

TABLES = ("embed_tokens", "lm_head")
"""The two matrices outside the decoder layers, [vocabulary, hidden]; one matrix where the model ties them."""

TABLE_PATHS = ("model.embed_tokens", "lm_head")

KV_FORMATS: dict[str, tuple[int, int]] = {"int8": (8, 16), "fp8": (8, 16), "int4": (4, 32), "fp8_attn": (8, 16)}
"""What a KV cache can hold -> bits of a number, bits of scale and zero per head and token."""

Suite = Literal["quick", "nightly", "full"]
UnmetKind = Literal["capability", "package", "shape", "memory"]


class Unmet(NamedTuple):
    """Why a case can't run here: a fixed kind, and the exact requirement ("needs SM89 (fp8), this is SM80")."""

    kind: UnmetKind
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass(frozen=True)
class Format:
    """One row: what a linear's weight and activation become, by which library.

    ``id`` is ``<name>-<backend>``, e.g. ``a16w4_g128-torchao``: activation bits, weight bits, ``_g`` group size.
    ``dtypes`` are the base dtypes (activations, norms, head) in order of preference; the first one that the device
    has is taken. ``inductor`` are Inductor flags that this row's generated kernels need to be fast,
    ``cuda_matmul_inductor`` further ones on a GPU for products of more than one token (prefill, batches); they are set
    for its compile only. ``options`` are the scheme's own;
    five of them others read: ``pads_k_to`` (the kernel stores K rounded up to it), ``waits_for_host`` (what in a
    forward pass waits for the host, so that no CUDA graph can hold it), ``compiled_min_rows`` (tokens per forward pass
    that its compiled CUDA kernel asks for), ``cpu_compiler_lacks`` (what torch.compile knows on a GPU alone) and
    ``kernel_bound`` (the relative error that its kernel is known to reach, where that is more than rounding:
    lowbit/truth.py). ``calibration_windows`` are those of text that are run through
    the unquantized model first (lowbit/calibration.py), 0 for most. ``fast`` is False for a reference row: right, but
    not a path anybody would serve. ``packages`` must be installed beside the library's own. ``suite`` is the smallest
    suite that measures the row: the formats of a first choice are in ``quick``, further group sizes and variants in
    ``nightly``, reference rows in ``full``. ``modes`` are the compile modes that it is measured under; empty: every one
    of the suite. ``parts`` make the row a recipe (lowbit/formats/recipes.py): module path pattern -> id of the format
    that what it names gets. ``kv`` is what the KV cache holds, one of KV_FORMATS; empty: the base dtype. ``slow`` says
    why its decode is slower than bf16's, where a profile or the library's source shows it (docs/findings.md).
    """

    name: str
    backend: str
    scheme: str
    activation_bits: float
    weight_bits: float
    group_size: int | None = None
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    targets: tuple[str, ...] = LINEARS
    inductor: Mapping[str, Any] = field(default_factory=dict)
    cuda_matmul_inductor: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    fast: bool = True
    suite: Suite = "quick"
    modes: tuple[str, ...] = ()
    note: str = ""
    calibration_windows: int = 0
    parts: Mapping[str, str] = field(default_factory=dict)
    kv: str = ""
    slow: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.backend}"

    @property
    def is_baseline(self) -> bool:
        """True for the unquantized row that speed-ups and quality are taken against."""
        return self.id == "bf16-torch"

    @property
    def quantized(self) -> bool:
        return self.weight_bits < 16

    @property
    def selectors(self) -> frozenset[str]:
        """Extra ``-k`` words: the library, ``A16W4`` and vLLM's ``W4A16``, ``int4`` or ``fp8``, the group size."""
        weight, activation = f"w{self.weight_bits:g}", f"a{self.activation_bits:g}"
        words = {self.id, self.name, self.backend, activation + weight, weight + activation, *self.keywords}
        if self.group_size:
            words.add(f"g{self.group_size}")
        return frozenset(words | {word.upper() for word in (activation + weight, weight + activation)})


def row(name: str, backend: str, scheme: str, bits: tuple[float, float], *keywords: str, **fields: Any) -> Format:
    """One row: ``bits`` are those of activation and weight, ``keywords`` further words for ``-k``."""
    return Format(name, backend, scheme, bits[0], bits[1], keywords=keywords, **fields)


BF16: dict[str, Any] = {"dtypes": ("bf16",)}
CUDA: dict[str, Any] = {"devices": ("cuda",)}
FP16_FIRST: dict[str, Any] = {"dtypes": ("fp16", "bf16")}
"""gemlite's and bitsandbytes' int8 kernels work in fp16; in bf16 they cast or accumulate elsewhere."""

LISTED = 12
"""Of the table's formats, in an error that names some."""


def table_of(rows: Iterable[Format]) -> dict[str, Format]:
    """The rows by their ids. Raises LowbitError for two of one id."""
    table: dict[str, Format] = {}
    for one in rows:
        if table.setdefault(one.id, one) is not one:
            raise LowbitError(f"lowbit/formats has two rows {one.id}: give one of them another name")
    return table


def unknown_format(got: str, known: Mapping[str, Format]) -> LowbitError:
    """The error for a format that is not in the table: the nearest of it, by a word for ``-k`` or by spelling."""
    if len(known) <= LISTED:
        return unknown("format", got, known)
    near = [name for name, one in known.items() if got.lower() in {word.lower() for word in one.selectors}]
    near = near or difflib.get_close_matches(got, known, LISTED, 0.5) or list(known)
    shown = ", ".join(near[:LISTED])
    return LowbitError(
        f"unknown format {got!r}; of {len(known)} the nearest: {shown}; all of them: python -m lowbit formats"
    )
