"""Attention's own source, run on the CPU: one token over caches of every length, against the same in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import EmulatedModule, unmet

from lowbit.kernels.arguments import Attention, fill
from lowbit.kernels.geometry import ATTENTION_WARPS, SHORT_CACHE, SPLITS, Geometry
from lowbit.kernels.runner import ATTENTIONS

pytestmark = pytest.mark.skipif(unmet() is not None, reason=str(unmet()))
WIDE = {"heads": 4, "kv_heads": 1, "head_dim": 128}
MIDDLE = {"heads": 12, "kv_heads": 4, "head_dim": 64}
SMALL = {"heads": 8, "kv_heads": 2, "head_dim": 32}
LONGEST = 8224


def shape_of(name="int8", **heads):
    return Geometry(name, hidden=256, inter=768, eps=1e-5, **(heads or WIDE))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    made = {}

    def module(shape):
        if shape not in made:
            folder = tmp_path_factory.mktemp("attention")
            made[shape] = EmulatedModule(folder, ("common", "attention"), ATTENTIONS, shape.macros())
        return made[shape]

    return module


def rotation(length, dim):
    """[length, dim / 2, 2] fp32: cos and sin."""
    angle = torch.arange(length).unsqueeze(1) * 500000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.cos(), angle.sin()], -1).float().contiguous()


def rotated(x, rope, position):
    """x [heads, dim] by the position's angles, as transformers does it: halves."""
    cos, sin = rope[position, :, 0].double(), rope[position, :, 1].double()
    low, high = x.double().chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Cache:
    """Random keys and values of ``position`` tokens, and what a step must make of them."""

    def __init__(self, shape, length, position, seed=0):
        torch.manual_seed(seed)
        self.shape, self.length, self.position = shape, length, position
        kv, dim, dtype = shape.kv_heads, shape.head_dim, shape.dtype
        self.keys, self.values = (torch.randn(kv, length, dim).to(dtype) for _ in range(2))
        self.qkv = torch.randn(shape.heads + 2 * kv, dim).to(dtype)
        self.rope = rotation(length, dim)
        self.out = torch.full((shape.heads, dim), math.nan, dtype=dtype)

    def run(self, module, plan):
        heads = self.shape.heads
        before = self.keys.clone(), self.values.clone()
        at = torch.tensor([self.position])
        argument = fill(
            Attention,
            qkv=self.qkv,
            keys=self.keys,
            values=self.values,
            rope=self.rope,
            position=at,
            out=self.out,
            length=self.length,
        )
        module.launch(
            plan.kernel,
            (self.shape.kv_heads, plan.splits),
            ATTENTION_WARPS * 32,
            argument,
            shared_bytes=plan.shared_bytes,
            cluster=plan.splits,
        )
        new_key = rotated(self.qkv[heads : heads + self.shape.kv_heads], self.rope, self.position)
        new_value = self.qkv[heads + self.shape.kv_heads :]
        for held, old, new in ((self.keys, before[0], new_key), (self.values, before[1], new_value)):
            old[:, self.position] = held[:, self.position]
            assert torch.equal(held, old), "a step writes its own position alone"
            assert torch.allclose(held[:, self.position].double(), new.double(), atol=2e-2)

    def expected(self):
        shape = self.shape
        query = rotated(self.qkv[: shape.heads], self.rope, self.position)
        group = shape.heads // shape.kv_heads
        keys, values = (
            held[:, : self.position + 1].double().repeat_interleave(group, 0) for held in (self.keys, self.values)
        )
        scores = torch.einsum("hd,hpd->hp", query, keys) / shape.head_dim**0.5
        return torch.einsum("hp,hpd->hd", scores.softmax(-1), values)

    def error(self):
        want = self.expected()
        return float((self.out.double() - want).norm() / want.norm())


TURN = SPLITS * ATTENTION_WARPS * 16
"""Positions after which the warps of 8 blocks are dealt their next chunks; twice as many with 16."""


@pytest.mark.parametrize(
    ("length", "widest", "kernel", "positions"),
    [
        (SHORT_CACHE, 16, "<1, 8>", (0, 15, 16, 127, 128, 1008, 1023)),
        (LONGEST, 8, "<3, 8>", (3, TURN - 1, TURN, 3 * TURN + 5, 4 * TURN)),
        (LONGEST, 16, "<3, 16>", (0, 255, 256, 2 * TURN - 1, 2 * TURN, 6 * TURN + 9, 8200)),
    ],
)
@pytest.mark.parametrize("name", ["int8", "bf16"])
@pytest.mark.parametrize("heads", [WIDE, MIDDLE, SMALL], ids=["128", "64", "32"])
def test_a_token_sees_every_position_of_its_cache(compiled, length, widest, kernel, positions, name, heads):
    shape = shape_of(name, **heads)
    plan = shape.attention(length, widest)
    assert plan.kernel == f"attention_kernel{kernel}"
    for position in positions:
        cache = Cache(shape, length, position)
        cache.run(compiled(shape), plan)
        assert cache.error() < (8e-3 if name == "bf16" else 1e-3), position


def test_what_is_behind_the_position_has_no_weight(compiled):
    shape = shape_of()
    plan = shape.attention(LONGEST)
    clean, stale = Cache(shape, LONGEST, 700), Cache(shape, LONGEST, 700)
    stale.keys[:, 700:], stale.values[:, 700:] = 1e4, -1e4
    for cache in (clean, stale):
        cache.run(compiled(shape), plan)
    assert torch.equal(clean.out, stale.out)
