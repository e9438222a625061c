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


def fitting(shape: Geometry, length: int, module: Module) -> tuple[list[AttentionPlan], str]:
    """The ways to launch attention over a cache of ``length`` positions that suit ``module``'s device, the best first,
    and in words why a better one does not.

    A cluster lies within one of a GPU's processing clusters (GPCs), some of which may have less than 16 working
    multiprocessors. Clusters of 16 blocks are for devices that hold those of all KV heads at once.
    """
    found, refused = [], ""
    for plan in shape.attention(length):
        if plan.splits > SPLITS:
            grid, threads = (shape.kv_heads, plan.splits), ATTENTION_WARPS * 32
            fit = module.clusters(plan.kernel, grid, threads, shared_bytes=plan.shared_bytes, cluster=plan.splits)
            if fit < shape.kv_heads:
                refused += f"; of {shape.kv_heads} clusters of {plan.splits}, {plan.ahead}, this device holds {fit}"
                continue
        found.append(plan)
    return found, refused


def words(shape: Geometry, plan: AttentionPlan) -> str:
    """What attention reads, and how."""
    return f"KV cache in {shape.kv or str(shape.dtype).removeprefix('torch.')}, {plan}"
