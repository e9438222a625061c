"""What attention in the native step needs to know of its cache and its device: asked once, when a step is made."""

from __future__ import annotations

from typing import Any

from lowbit.errors import LowbitError
from lowbit.kernels.geometry import ATTENTION_WARPS, CHUNK, KV_CODES, SPLITS, AttentionPlan, Geometry
from lowbit.kernels.launch import Module


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


def choose(shape: Geometry, length: int, module: Module) -> tuple[AttentionPlan, str]:
    """How attention over a cache of ``length`` positions is launched on ``module``'s device, and that in words.

    A cluster lies within one of a GPU's processing clusters (GPCs), which differ in how many multiprocessors work. Of
    16 blocks it is taken only where all KV heads' run at once; else 8 blocks per KV head, and the words say so.
    """
    plan, cache = shape.attention(length), f"KV cache in {shape.kv or str(shape.dtype).removeprefix('torch.')}"
    if plan.splits == SPLITS:
        return plan, f"{cache}, {plan}"
    grid, threads = (shape.kv_heads, plan.splits), ATTENTION_WARPS * 32
    fit = module.clusters(plan.kernel, grid, threads, shared_bytes=plan.shared_bytes, cluster=plan.splits)
    if fit >= shape.kv_heads:
        return plan, f"{cache}, {plan}"
    narrow = shape.attention(length, SPLITS)
    return narrow, f"{cache}, {narrow}: of {shape.kv_heads} clusters of {plan.splits} this device holds {fit}"
