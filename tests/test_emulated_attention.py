"""Attention's own source, run on the CPU: one token over caches of every length and format, against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import EmulatedModule, unmet

from lowbit import kvcache
from lowbit.kernels.arguments import Attention, fill
from lowbit.kernels.geometry import AHEAD, ATTENTION_WARPS, SHORT_CACHE, SHORT_WARPS, SPLITS, Geometry

pytestmark = pytest.mark.skipif(unmet() is not None, reason=str(unmet()))
WIDE = {"heads": 4, "kv_heads": 1, "head_dim": 128}
MIDDLE = {"heads": 4, "kv_heads": 1, "head_dim": 64}
ODD = {"heads": 6, "kv_heads": 2, "head_dim": 128}
SMALL = {"heads": 16, "kv_heads": 2, "head_dim": 32}
LONGEST = 10320


def shape_of(name="int8", kv="", heads=WIDE):
    return Geometry(name, hidden=4096, inter=768, eps=1e-5, **heads, kv=kv)


@pytest.fixture
def compiled(kernels_folder):
    def module(shape):
        return EmulatedModule(kernels_folder, ("common", "attention"), shape.attentions, shape.macros())

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


class Side:
    """Keys or values as a cache holds them: numbers of 16 bits, or lowbit.kvcache's codes and scales."""

    def __init__(self, kv, x):
        self.kv, self.dtype = kv, x.dtype
        self.parts = [part.contiguous() for part in kvcache.encode(kv, x)] if kv else [x]

    def numbers(self):
        return kvcache.decode(self.kv, self.parts, torch.float32).double() if self.kv else self.parts[0].double()

    def copies(self):
        return [part.clone() for part in self.parts]

    def check(self, before, position, new, exact):
        """Only the position was written, with ``new`` [heads, dim]; ``exact``: in every bit, else to a rounding."""
        for held, old in zip(self.parts, before, strict=True):
            old[:, position] = held[:, position]
            assert torch.equal(held.view(torch.uint8), old.view(torch.uint8)), "a step writes its own position alone"
        want = Side(self.kv, new.to(self.dtype))
        if exact:
            assert all(torch.equal(held[:, position], part) for held, part in zip(self.parts, want.parts, strict=True))
        found, wanted = self.numbers()[:, position], want.numbers()
        step = 0.09 if self.kv == "fp8" else 0.01  # of the largest: one code, or one rounding
        assert float((found - wanted).abs().max()) <= step * float(wanted.abs().max())


class Step:
    """Attention of one token at ``position`` over a random cache, and what it must give."""

    def __init__(self, shape, length, position, spread=1.0):
        torch.manual_seed(position)
        self.shape, self.length, self.position = shape, length, position
        kv, dim, dtype = shape.kv_heads, shape.head_dim, shape.dtype
        rows = torch.exp(spread * torch.randn(2, kv, length, 1)) if spread != 1.0 else torch.ones(2, kv, length, 1)
        self.keys, self.values = (Side(shape.kv, (torch.randn(kv, length, dim) * rows[i]).to(dtype)) for i in range(2))
        self.qkv = torch.randn(shape.heads + 2 * kv, dim).to(dtype)
        self.rope = rotation(length, dim)
        self.out = torch.full((shape.heads, dim), math.nan, dtype=dtype)

    def run(self, module, plan):
        heads, kv = self.shape.heads, self.shape.kv_heads
        before = self.keys.copies(), self.values.copies()
        at = torch.tensor([self.position])
        named = {"keys": self.keys.parts[0], "values": self.values.parts[0]}
        if self.shape.kv:
            named |= {"key_scale": self.keys.parts[1], "value_scale": self.values.parts[1]}
        argument = fill(Attention, qkv=self.qkv, rope=self.rope, position=at, out=self.out, length=self.length, **named)
        module.launch(
            plan.kernel,
            (kv, SPLITS),
            plan.warps * 32,
            argument,
            shared_bytes=plan.shared_bytes,
            cluster=SPLITS,
        )
        key = rotated(self.qkv[heads : heads + kv], self.rope, self.position)
        self.keys.check(before[0], self.position, key, exact=self.position == 0)  # which turns by no angle
        self.values.check(before[1], self.position, self.qkv[heads + kv :], exact=True)

    def error(self):
        """||difference|| / ||expected||, from what the cache now holds."""
        shape = self.shape
        query = rotated(self.qkv[: shape.heads], self.rope, self.position)
        group = shape.heads // shape.kv_heads
        keys, values = (
            side.numbers()[:, : self.position + 1].repeat_interleave(group, 0) for side in (self.keys, self.values)
        )
        scores = torch.einsum("hd,hpd->hp", query, keys) / shape.head_dim**0.5
        want = torch.einsum("hp,hpd->hd", scores.softmax(-1), values)
        return float((self.out.double() - want).norm() / want.norm())


FEW = SPLITS * SHORT_WARPS * 16
"""Positions up to which half as many warps do."""
TURN = SPLITS * ATTENTION_WARPS * 16
"""Positions after which the warps of a cluster are dealt their next chunks."""


@pytest.mark.parametrize(
    ("length", "positions"),
    [
        (FEW, (0, 15, 16, 127, 128, FEW - 1)),
        (SHORT_CACHE, (0, 15, 128, 1023)),
        (LONGEST, (0, 255, TURN - 1, 2 * TURN, 5 * TURN, 10 * TURN + 8)),
    ],
    ids=["few", "short", "long"],
)
@pytest.mark.parametrize(
    ("name", "kv", "heads"),
    [
        *(("int8", kv, WIDE) for kv in AHEAD),
        *(("bf16", kv, WIDE) for kv in ("", "fp8")),
        *(("int8", kv, MIDDLE) for kv in ("int8", "fp8")),
        *(("int8", kv, SMALL) for kv in ("", "int8")),
        ("int8", "int8", ODD),
    ],
    ids=lambda value: (
        f"{value['heads'] // value['kv_heads']}x{value['head_dim']}" if isinstance(value, dict) else value or "16"
    ),
)
def test_a_token_sees_every_position_of_its_cache(compiled, length, positions, name, kv, heads):
    shape = shape_of(name, kv, heads)
    plan = shape.attention(length)
    assert plan.kernel in shape.attentions
    assert plan.stages == (1 if length <= SHORT_CACHE else AHEAD[kv])
    assert plan.warps == (SHORT_WARPS if length == FEW else ATTENTION_WARPS)
    for position in positions:
        step = Step(shape, length, position)
        step.run(compiled(shape), plan)
        assert step.error() < (8e-3 if name == "bf16" else 1e-3), position


@pytest.mark.parametrize("kv", AHEAD)
def test_what_lies_behind_the_position_has_no_weight(compiled, kv):
    shape = shape_of(kv=kv)
    plan = shape.attention(LONGEST)
    clean, stale = Step(shape, LONGEST, 700), Step(shape, LONGEST, 700)
    for side in (stale.keys, stale.values):
        side.parts[0][:, 700:] = 100 if kv else math.nan
        for scale in side.parts[1:]:
            scale[:, 700:] = math.inf
    for step in (clean, stale):
        step.run(compiled(shape), plan)
    assert clean.out.isfinite().all()
    assert torch.equal(clean.out, stale.out)


@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_codes_of_rows_of_every_size_keep_their_weight(compiled, kv, name):
    """Scales from 1e-3 to 1e3 of one another, a key of zeros, and values near fp16's end."""
    shape = shape_of(name, kv)
    step = Step(shape, SHORT_CACHE, 300, spread=2.0)
    step.run(compiled(shape), shape.attention(SHORT_CACHE))
    assert step.error() < (8e-3 if name == "bf16" else 1e-3)
    step = Step(shape, SHORT_CACHE, 0)
    step.qkv[-2] = 0
    step.qkv[-1] *= 6e4 / step.qkv[-1].abs().max()
    step.run(compiled(shape), shape.attention(SHORT_CACHE))
    assert step.out.isfinite().all()
    assert step.error() < (8e-3 if name == "bf16" else 1e-3)
