"""What the decode kernels (cuda/) are compiled for: a Llama's shape and a weight format, and which they can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from lowbit import roofline
from lowbit.errors import LowbitError
from lowbit.kernels.stream import GROUP, LAYOUTS, TILE, stage_columns

MOST_SEQUENCES = 8
"""The columns of an mma."""
NEEDED_SM = (9, 0)
"""Bulk copies into shared memory and programmatic dependent launch."""
BLOCKS = 128
"""Thread blocks of a product: divides the row tiles of Llama-3's matrices; an H200 has 132 multiprocessors."""
BATCH_TILES = 14
"""Row tiles whose sums a block of a product keeps at a time."""
MOST_HIDDEN = BLOCKS * BATCH_TILES * TILE
"""Rows of o and down with one sequence: a block reads its part of the residual once, for one batch of row tiles."""
BATCH_WARPS = 14
"""Consumer warps of a product of several sequences at most: 16 would leave their sums too few registers."""
RING_BYTES = 220 * 1024
"""Shared memory of a product: more than half of a multiprocessor's, so that two products never share one."""
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024
"""Of a multiprocessor of SM90, and what each block on it costs beside its own."""
MAX_RING, PLANE_GAP = 48, 64
"""Stages of a ring at most; bytes between the two planes of x's digits (cuda/product.cu)."""
ATTENTION_WARPS, CHUNK = 8, 16
"""Attention: warps of a block, a template's argument; positions of a chunk (cuda/attention.cu says the same)."""
SPLITS = 8
"""Blocks of a cluster of attention, which is one KV head's: as many as every device allows (cuda/attention.cu says the
same). An H200 does not hold all of 8 larger clusters at once (docs/kernels.md). Several sequences have smaller ones."""
SHORT_WARPS = 4
FEW_POSITIONS = SPLITS * SHORT_WARPS * CHUNK
"""Warps of a block of one sequence's attention over so few positions at most: merged sooner, and the products beside it
have more memory and registers (docs/kernels.md)."""
SHORT_CACHE = SPLITS * ATTENTION_WARPS * CHUNK
"""Up to this length of the cache every warp of SPLITS blocks has one chunk, and a block fits beside a product's."""
CLUSTERED = 16
"""Blocks for one KV head of all sequences together: 8 KV heads then fill 128 multiprocessors."""


KV_CODES = {"": 0, "int8": 1, "fp8": 2}
"""What the KV cache may hold, by lowbit.kvcache's names -> cuda/attention.cu's; the first are 16 bits."""
AHEAD = {"": 3, "int8": 4, "fp8": 4}
"""Chunks per warp on their way over a long cache: as large a block that a multiprocessor, which limits, has but one."""


Unmet = tuple[Literal["capability", "shape"], str]
"""(kind, reason)."""


class AttentionPlan(NamedTuple):
    """How attention is launched: chunks per warp on their way, shared memory of each of its blocks in bytes, how many
    blocks a cluster has and how many warps a block."""

    stages: int
    shared_bytes: int
    splits: int = SPLITS
    warps: int = ATTENTION_WARPS

    @property
    def kernel(self) -> str:
        return f"attention_kernel<{self.stages}, {self.warps}>"

    def __str__(self) -> str:
        return f"{self.splits} blocks per KV head, {self.stages} chunk{'s' * (self.stages > 1)} ahead"


@dataclass(frozen=True)
class Geometry:
    """What the kernels are compiled for. Sizes in elements; ``eps`` is RMSNorm's."""

    format: str
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    kv: str = ""
    batch: int = 1

    @classmethod
    def of(cls, config: Any, format: str, kv: str = "", batch: int = 1) -> Geometry:
        """Of a transformers LlamaConfig. ``kv`` is what the cache holds, one of KV_CODES; ``batch``: sequences."""
        return cls(
            format,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            roofline.head_dim(config),
            config.rms_norm_eps,
            kv,
            batch,
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Every K of the model."""
        return self.hidden, self.inter, self.heads * self.head_dim

    @property
    def warps(self) -> int:
        """Consumer warps of a product's block; fewer make a finer ring of stages of 8 KB, where x takes its room."""
        own = LAYOUTS[self.format]
        if self.batch == 1:
            return own.warps
        return 8 if own.stage_bytes(own.widest) >= 8192 else min(own.warps, BATCH_WARPS)

    @property
    def threads(self) -> int:
        """Of a product's block: consumers and one producer warp."""
        return self.warps * 32 + 32

    @property
    def dtype(self) -> torch.dtype:
        """Activations, norms, embedding and a KV cache of 16 bits."""
        return torch.bfloat16 if self.format == "bf16" else torch.float16

    def macros(self) -> dict[str, object]:
        """For the compiler."""
        return {
            "FORMAT": LAYOUTS[self.format].code,
            "WIDEST": LAYOUTS[self.format].widest,
            "WGROUP": LAYOUTS[self.format].group or 0,
            "ZEROED": int(LAYOUTS[self.format].zeroed),
            "HIDDEN": self.hidden,
            "INTER": self.inter,
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "EPS": f"{self.eps!r}f" if "e" in repr(self.eps) or "." in repr(self.eps) else f"{self.eps!r}.f",
            "WARPS": self.warps,
            "KV": KV_CODES[self.kv],
            "SPLITS": self.splits,
            "BATCH": self.batch,
            "WINDOW": LAYOUTS[self.format].window if self.batch == 1 else 0,
            "PACE": LAYOUTS[self.format].pace if self.batch == 1 else 0,
        }

    @property
    def splits(self) -> int:
        """Blocks of a cluster of attention: a thread per output that a block finishes, and all clusters at once."""
        outputs, found = self.heads // self.kv_heads * self.head_dim, SPLITS
        while found * self.batch > CLUSTERED and outputs // (found // 2) <= ATTENTION_WARPS * 32:
            found //= 2
        return found

    def attention(self, length: int) -> AttentionPlan:
        """How attention over a cache of ``length`` positions is launched. One stage: a warp has one chunk at most."""
        queries = self.heads // self.kv_heads
        number = 1 if self.kv else 2
        chunk = 2 * CHUNK * (self.head_dim * number + 16) + (2 * CHUNK * 2 if self.kv else 0)  # padded rows, scales
        letters = 4 * self.splits * (queries * self.head_dim // self.splits + -(-queries // 2) * 4)

        def plan(warps: int) -> AttentionPlan:
            stages = 1 if length <= self.splits * warps * CHUNK else AHEAD[self.kv]
            return AttentionPlan(stages, warps * stages * chunk + letters, self.splits, warps)

        few = self.batch == 1 and length <= FEW_POSITIONS and queries * self.head_dim <= SPLITS * SHORT_WARPS * 32
        return plan(SHORT_WARPS if few else ATTENTION_WARPS)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The kernels of every length."""
        lengths = (1, FEW_POSITIONS + 1, SHORT_CACHE + 1)
        return tuple(dict.fromkeys(self.attention(length).kernel for length in lengths))

    def beside(self, plan: AttentionPlan) -> int:
        """Shared memory for a product that is to start while this attention still runs, or the reverse.

        At 8 bits and more memory is what a product waits for, and a longer ring is worth more (docs/kernels.md).
        """
        left = SHARED_BYTES - 2 * RESERVED_BYTES - plan.shared_bytes
        return RING_BYTES if LAYOUTS[self.format].bits > 4 or plan.stages > 1 else min(RING_BYTES, left)

    def shared(self, k: int, tiles: int, room: int = RING_BYTES) -> tuple[int, int, int]:
        """Stages in the ring, row tiles per batch, bytes of shared memory for a product of ``tiles`` row tiles."""
        batch = min(BATCH_TILES, -(-tiles // min(BLOCKS, tiles)))
        ku = stage_columns(self.format, k)
        layout = LAYOUTS[self.format]
        stage = layout.stage_bytes(ku)
        digits = 2 * PLANE_GAP + ku if layout.integer else 0
        fixed = k * 2 + digits + k // layout.sum_columns() * 8 + batch * (k // ku) * 64 + 128 + 16 * MAX_RING
        ring = min(MAX_RING, (room - fixed) // stage) // self.warps * self.warps
        if not ring:
            raise LowbitError(f"a ring of {self.warps} stages of {stage} bytes and x of K={k} exceed {room} bytes")
        return ring, batch, ring * stage + fixed


def unmet(config: Any, format: str, capability: tuple[int, int] | None, batch: int = 1, kv: str = "") -> Unmet | None:
    """Why the runner can't decode this model in this weight format on this device: (kind, reason), or None."""
    if not 1 <= batch <= MOST_SEQUENCES:
        return "shape", f"the native step decodes 1 to {MOST_SEQUENCES} sequences, this case has {batch}"
    if capability is None:
        return "capability", "needs a CUDA device: the native step is a CUDA graph"
    if capability != NEEDED_SM:
        sm = f"SM{capability[0]}{capability[1]}"
        return "capability", f"needs SM90 (bulk copies, dependent launch; compiled and measured there), this is {sm}"
    if format not in LAYOUTS:
        return "capability", f"no decode kernel streams {format}; there are ones for {', '.join(LAYOUTS)}"
    if kv not in KV_CODES:
        known = ", ".join(name or "16 bits" for name in KV_CODES)
        return "capability", f"attention in the native step reads a KV cache of {known}; this one is {kv}"
    shape = Geometry.of(config, format)
    if any(k % (2 * GROUP) for k in shape.widths):
        return "shape", f"every K must be a multiple of 256, this model has {shape.widths}"
    if shape.head_dim not in (32, 64, 128):
        return "shape", f"head_dim must be 32, 64 or 128, this model has {shape.head_dim}"
    if shape.heads % shape.kv_heads or shape.heads // shape.kv_heads > 8:
        return "shape", f"at most 8 query heads share a KV head, this model has {shape.heads} over {shape.kv_heads}"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "shape", "the decode kernels add no bias"
    if shape.inter % 8 or shape.hidden % TILE or (shape.heads + 2 * shape.kv_heads) * shape.head_dim % TILE:
        return "shape", f"rows must come in tiles of {TILE}"
    if batch == 1 and shape.hidden > MOST_HIDDEN:
        few = f"{BATCH_TILES} row tiles of o and down per block with one sequence"
        return "shape", f"hidden may be at most {MOST_HIDDEN:,} ({few}), this model has {shape.hidden:,}"
    return None
