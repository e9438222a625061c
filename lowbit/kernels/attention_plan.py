"""Whether attention over a long cache runs by clusters of 16 blocks: asked of the device once, when a step is made."""

from __future__ import annotations

from lowbit.kernels.geometry import ATTENTION_WARPS, SPLITS, AttentionPlan, Geometry
from lowbit.kernels.launch import Module


def choose(shape: Geometry, length: int, module: Module) -> tuple[AttentionPlan, str]:
    """How attention over a cache of ``length`` positions is launched on ``module``'s device, and that in words.

    A cluster lies within one of a GPU's processing clusters (GPCs), which differ in how many multiprocessors work. Of
    16 blocks it is taken only where all KV heads' run at once; else 8 blocks per KV head, and the words say so.
    """
    plan = shape.attention(length)
    if plan.splits == SPLITS:
        return plan, str(plan)
    grid, threads = (shape.kv_heads, plan.splits), ATTENTION_WARPS * 32
    fit = module.clusters(plan.kernel, grid, threads, shared_bytes=plan.shared_bytes, cluster=plan.splits)
    if fit >= shape.kv_heads:
        return plan, str(plan)
    narrow = shape.attention(length, SPLITS)
    return narrow, f"{narrow}: of {shape.kv_heads} clusters of {plan.splits} this device holds {fit}"
