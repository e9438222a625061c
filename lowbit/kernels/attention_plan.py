"""What attention in the native step needs to know of its cache: asked once, when a step is made."""

from __future__ import annotations

from typing import Any

from lowbit.errors import LowbitError
from lowbit.kernels.geometry import CHUNK, KV_CODES, Geometry


def held(cache: Any) -> str:
    """What a static cache holds, one of KV_CODES. Raises LowbitError for what the kernels can't read."""
    kv = str(getattr(cache.layers[0], "name", ""))  # lowbit.kvcache's layers have one, a plain static layer has not
    if kv not in KV_CODES:
        raise LowbitError(f"the native step reads a KV cache of 16 bits, int8 or fp8, this is {kv}: take another mode")
    length = cache.layers[0].keys.shape[2]
    if kv and length % CHUNK:
        raise LowbitError(
            f"a KV cache in {kv} is read {CHUNK} positions at a time, this one has {length}: round its length up to a "
            "multiple, as lowbit.generate.make_cache does"
        )
    return kv


def words(shape: Geometry, length: int) -> str:
    """What attention over a cache of ``length`` positions reads, and how."""
    return f"KV cache in {shape.kv or str(shape.dtype).removeprefix('torch.')}, {shape.attention(length)}"
