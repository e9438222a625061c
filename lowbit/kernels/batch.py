"""What the kernels for 2 to 8 sequences (cuda/batch_x.cu, cuda/batch.cu) are launched with: slices of K, memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from lowbit.errors import LowbitError
from lowbit.kernels import geometry
from lowbit.kernels.geometry import BLOCKS, MAX_RING, RING_BYTES, Geometry, Unmet
from lowbit.kernels.stream import LAYOUTS, TILE, stage_columns

PRODUCTS = {
    "qkv": "batch_kernel<HIDDEN, true, TO_ACT>",
    "o": "batch_kernel<QDIM, false, PARTS>",
    "gate_up": "batch_kernel<HIDDEN, true, SILU_MUL>",
    "down": "batch_kernel<INTER, false, PARTS>",
    "head": "batch_kernel<HIDDEN, true, TO_LOGITS>",
}
SLICED = ("o", "down")
"""Products that read 16-bit activations and cut K; the others get x ready (cuda/batch_x.cu)."""
SLICES = (0, 1, 2, 4)
"""Of K that there may be; 0: nothing was cut yet."""
NORMALIZE = "normalize_kernel<{}>"
"""By how many slices it adds to the residual first."""
NORM_THREADS, NORM_SHARED_BYTES = 512, 128
"""Of a block of normalize_kernel."""


class Plan(NamedTuple):
    """A product's: thread blocks, slices of K that they are dealt to, stages in the ring, tiles whose sums are kept."""

    blocks: int
    slices: int
    ring: int
    turns: int
    shared_bytes: int


def slices(format: str, k: int) -> int:
    """Into how many parts o and down cut K; cuda/batch_x.cu says the same."""
    chunks = k // stage_columns(format, k)
    if chunks % 4 == 0:
        return 4
    return 2 if chunks % 2 == 0 else 4 if chunks >= 12 else 1


def kernels(shape: Geometry) -> tuple[str, ...]:
    """Products and norms of a module of this shape; a product before may be of another format, and cut K otherwise."""
    return (*PRODUCTS.values(), *(NORMALIZE.format(count) for count in SLICES))


def x_bytes(shape: Geometry, n: int) -> int:
    """Of n columns of x, as a block holds them."""
    columns, layout = (shape.batch + 1) // 2 * 2, LAYOUTS[shape.format]
    return 2 * n * shape.batch + (n // layout.sum_columns(shape.batch) * columns * 8 if layout.integer else 0)


def turns_kept(ring: int, warps: int, chunks: int) -> int:
    """Tiles of ``chunks`` stages whose sums must have places of their own, at least; no more are ever in use.

    Sums of a tile are kept until the warp that counted the last of its stages has read them. A warp is at stage i only
    if all stages up to i - ring were released. A stage is released before its sums are stored, let alone read: but its
    warp's next stage, ``warps`` later, is released after all that. So all stages up to i - ring - warps are done, sums
    and tile, when stage i's are stored, and the ring + warps - 1 stages before i may be open. In memory's order too:
    what was read comes before its warp's next arrival on ``empty``, which the producer acquires before it arrives on
    ``full`` of stage i, which every lane of that stage's warp acquires. tests/test_batch_turns.py tries every order of
    small cases.
    """
    return 1 - -(ring + warps - 1) // chunks


def plan(shape: Geometry, name: str, k: int, tiles: int) -> Plan:
    """How a product of ``tiles`` row tiles is launched. Raises LowbitError if x and a ring do not fit a block."""
    ku = stage_columns(shape.format, k)
    count = slices(shape.format, k) if name in SLICED else 1
    chunks, stage = k // ku, LAYOUTS[shape.format].stage_bytes(ku)
    shares = min(BLOCKS // count, tiles)
    of_block, most, least = -(-tiles // shares), -(-chunks // count), chunks // count
    columns = (shape.batch + 1) // 2 * 2
    x = x_bytes(shape, most * ku)
    for ring in range(MAX_RING // shape.warps * shape.warps, 0, -shape.warps):
        turns = min(of_block, turns_kept(ring, shape.warps, least))
        sums = turns * most * 16 * columns * 4
        total = ring * stage + x + sums + shape.warps * 64 + (2 * MAX_RING + 1) * 8 + turns * 4
        if total <= RING_BYTES:
            return Plan(shares * count, count, ring, turns, total)
    raise LowbitError(
        f"{shape.batch} sequences of K={k} ({x} bytes of x in a block) leave no room for a ring of {shape.warps} "
        f"stages of {stage} bytes in {RING_BYTES} bytes"
    )


def unmet(
    config: Any, format: str, capability: tuple[int, int] | None, sequences: int = 1, kv: str = ""
) -> Unmet | None:
    """As geometry.unmet, which it asks first; 2 to 8 sequences need room for their x."""
    why = geometry.unmet(config, format, capability, sequences, kv)
    if why is not None or sequences == 1:
        return why
    shape = Geometry.of(config, format, kv, sequences)
    try:
        for name in PRODUCTS:
            plan(shape, name, shape.inter if name == "down" else shape.hidden, shape.hidden // TILE)
    except LowbitError as error:
        return "shape", str(error)
    return None
