"""Every format of the suite, one row each. A new format is one row here and nothing else.

A row names what is stored and computed (activation bits, weight bits, group size), which library does it, and what it
needs. The library's own file under ``lowbit/backends`` turns the row's ``scheme`` into quantized modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lowbit.errors import unknown

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linears of a Llama decoder layer, 224 in Llama-3.1-8B; lm_head stays as it is unless a row names it."""

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
    has is taken. ``inductor`` are Inductor flags that this row's generated kernels need to be fast, ``cuda_inductor``
    further ones on a GPU; they are set for its compile only. ``options`` are the scheme's own;
    three of them others read: ``pads_k_to`` (the kernel stores K rounded up to it), ``waits_for_host`` (what in a
    forward pass waits for the host, so that no CUDA graph can hold it) and ``compiled_min_rows`` (tokens per forward
    pass that its compiled CUDA kernel asks for). ``fast`` is False for a reference row: right, but not a path anybody
    would serve.
    """

    name: str
    backend: str
    scheme: str
    activation_bits: int
    weight_bits: float
    group_size: int | None = None
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    targets: tuple[str, ...] = LINEARS
    inductor: Mapping[str, Any] = field(default_factory=dict)
    cuda_inductor: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    fast: bool = True
    note: str = ""

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
        weight, activation = f"w{self.weight_bits:g}", f"a{self.activation_bits}"
        words = {self.id, self.name, self.backend, activation + weight, weight + activation, *self.keywords}
        if self.group_size:
            words.add(f"g{self.group_size}")
        return frozenset(words | {word.upper() for word in (activation + weight, weight + activation)})


def _row(name: str, backend: str, scheme: str, bits: tuple[int, float], *keywords: str, **fields: Any) -> Format:
    return Format(name, backend, scheme, bits[0], bits[1], keywords=keywords, **fields)


# Dequantize-in-the-epilogue int8 and fp8 matvecs are only fused into one kernel when Inductor may lower an M=1 product
# to a reduction, which it does under coordinate descent tuning alone (torch/_inductor/decomposition.py, mm).
FUSED_MATVEC = {"coordinate_descent_tuning": True}
# Fuses the two scales into the int8 product; torchao sets it process-wide (recommended_inductor_config_setter).
FUSED_INT8 = {**FUSED_MATVEC, "force_fuse_int_mm_with_mul": True}

BF16: dict[str, Any] = {"dtypes": ("bf16",)}
CUDA: dict[str, Any] = {"devices": ("cuda",)}
FP16_FIRST: dict[str, Any] = {"dtypes": ("fp16", "bf16")}
"""gemlite's and bitsandbytes' int8 kernels work in fp16; in bf16 they cast or accumulate elsewhere."""

FORMATS: dict[str, Format] = {
    row.id: row
    for row in (
        _row("bf16", "torch", "cast", (16, 16), "bfloat16", **BF16),
        _row("fp16", "torch", "cast", (16, 16), "float16", dtypes=("fp16",)),
        _row(
            *("a16w8", "torchao", "int8_weight_only", (16, 8), "int8", "int8wo"),
            inductor=FUSED_MATVEC,
            # Else Inductor turns what is no fused matvec into aten._weight_int8pack_mm (fx_passes/quantization.py); its
            # CUDA kernel took 7,879 ms for a prefill of 512 tokens of 8B on an H200 (eager: 40 ms), and 57 ms per
            # decoded token without the flag above. fp16 does not match that pattern, but overflows: the products are
            # summed before the scale is applied.
            cuda_inductor={"pattern_matcher": False},
        ),
        _row(
            *("a8w8", "torchao", "int8_dynamic", (8, 8), "int8", "dynamic"),
            inductor=FUSED_INT8,
            # torch._int_mm on CUDA: "self.size(0) needs to be greater than 16" (2.11); eager torchao goes round it
            options={"compiled_min_rows": 17},
        ),
        _row(
            *("a16w4_g128", "torchao", "int4_weight_only", (16, 4), "int4", "int4wo"),
            group_size=128,
            options={"pads_k_to": 1024},
            note="tile_packed_to_4d on CUDA (K padded to 1024), the prototype's opaque packing on a CPU",
            **BF16,
        ),
        _row(
            *("a16w8_fp8", "torchao", "fp8_weight_only", (16, 8), "fp8", "float8"),
            inductor=FUSED_MATVEC,
            note="a decoded token's products are fused matvecs; other products dequantize first",
        ),
        _row("a8w8_fp8", "torchao", "fp8_dynamic_row", (8, 8), "fp8", "float8", "dynamic", **BF16, **CUDA),
        _row("a16w8", "gemlite", "A16W8_INT8", (16, 8), "int8", **FP16_FIRST, **CUDA),
        _row("a16w4_g128", "gemlite", "A16W4_HQQ_INT", (16, 4), "int4", "hqq", group_size=128, **FP16_FIRST, **CUDA),
        _row("a8w8_fp8", "gemlite", "A8W8_FP8_dynamic", (8, 8), "fp8", "float8", "dynamic", **FP16_FIRST, **CUDA),
        _row(
            *("a8w8_llmint8", "bitsandbytes", "llm_int8", (8, 8), "int8", "llm.int8", "bnb"),
            options={"threshold": 6.0, "waits_for_host": "its search for outlier columns (threshold 6.0)"},
            **FP16_FIRST,
        ),
        _row(
            *("a16w4_nf4_dq", "bitsandbytes", "nf4", (16, 4), "nf4", "int4", "bnb"),
            group_size=64,
            options={"double_quant": True},
        ),
    )
}


def find(format_id: str) -> Format:
    """The row with this id. Raises LowbitError naming the known ids."""
    try:
        return FORMATS[format_id]
    except KeyError:
        raise unknown("format", format_id, FORMATS) from None
