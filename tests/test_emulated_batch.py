"""The kernels for 2 to 8 sequences, their own source run on the CPU: each sequence against the same weights in fp32."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedModule, unmet
from streaming import build

from lowbit.kernels import batch, runner

pytestmark = pytest.mark.skipif(unmet() is not None, reason=str(unmet()))
FORMATS = batch.FORMATS
LENGTH = 64


@pytest.fixture
def emulate(monkeypatch, kernels_folder):
    """The runner's kernels, by the emulator."""

    def load(shape, device, progress=None):
        return EmulatedModule(kernels_folder, runner.sources(shape), runner.kernels(shape), shape.macros())

    monkeypatch.setattr(runner, "load", load)


@torch.no_grad()
def held_against(exact, decoder, step, count, bound):
    """Every sequence has tokens of its own; logits, the token handed out and its history are each sequence's."""
    batch = decoder.token.shape[0]
    tokens = (torch.arange(batch).unsqueeze(1) * 97 + torch.arange(count) * 31) % 512
    want = exact(tokens, use_cache=False).logits
    decoder.position.zero_()
    for place in range(count):
        decoder.token.copy_(tokens[:, place : place + 1])
        step.launch()
        for one in range(batch):
            error = float((step.logits[one] - want[one, place]).norm() / want[one, place].norm())
            assert error < bound, (place, one, error)
        assert torch.equal(decoder.token, step.logits.argmax(-1, keepdim=True))
        assert torch.equal(step.history[:, place + 1], decoder.token[:, 0])
        assert int(decoder.position) == place + 1


@pytest.mark.parametrize("name", FORMATS)
def test_8_sequences_of_every_format(emulate, name):
    _, exact, decoder, step = build(name, LENGTH, batch=8)
    held_against(exact, decoder, step, 3, 2e-2 if name == "bf16" else 2e-3)
