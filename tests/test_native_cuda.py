"""The decode kernels on the GPU they are written for. Skipped elsewhere: no other machine can run them."""

from __future__ import annotations

import pytest
import torch
from tiny import model
from torch import nn

from lowbit import generate
from lowbit.kernels import geometry, nvrtc, runner, stream_modules, weights
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.stream import LAYOUTS

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
pytestmark = pytest.mark.skipif(
    CAPABILITY != geometry.NEEDED_SM or nvrtc.available() is not None,
    reason=f"needs a GPU of compute capability 9.0 and NVRTC, found {CAPABILITY}",
)
LENGTH = 400


@pytest.fixture(params=sorted(LAYOUTS))
def made(request):
    name = request.param
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    plain = model(dtype).cuda()
    exact = model(torch.float32).cuda()
    for path, linear in list(plain.named_modules()):
        if isinstance(linear, nn.Linear):
            packed = quantize(linear.weight.detach(), name)
            exact.get_submodule(path).weight.data = weights.dequantize(packed)
    exact.model.embed_tokens.weight.data = plain.model.embed_tokens.weight.detach().float()

    def packed_of(linear):
        return quantize(linear.weight.detach(), name) if isinstance(linear, nn.Linear) else None

    stream_modules.attach(plain, packed_of)
    decoder = generate.Decoder(plain, 1, LENGTH, dtype)
    step = runner.NativeStep(plain, decoder.cache, decoder.token, decoder.position)
    return plain, exact, decoder, step


def test_streams_are_dequantized_exactly(made):
    plain, exact, _, _ = made
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "lm_head"):
        want = exact.get_submodule(path).weight
        dtype = plain.model.embed_tokens.weight.dtype
        assert torch.equal(plain.get_submodule(path).dequantize(dtype), want.to(dtype)), path


@torch.no_grad()
def test_logits_are_those_of_the_same_weights_in_fp32_at_every_position(made):
    _, exact, decoder, step = made
    count = LENGTH - 16
    tokens = torch.arange(count, device="cuda") * 31 % 512
    want = exact(tokens.unsqueeze(0), use_cache=False).logits[0]
    decoder.position.zero_()
    bound = 2e-2 if step.shape.dtype is torch.bfloat16 else 5e-3
    for place in range(count):
        decoder.token.fill_(int(tokens[place]))
        step()
        error = (step.logits - want[place]).norm() / want[place].norm()
        assert error < bound, (place, float(error))
        assert int(decoder.token) == int(step.logits.argmax())
        assert int(decoder.position) == place + 1


@torch.no_grad()
def test_the_same_prompt_gives_the_same_bits_every_time(made):
    _, _, decoder, step = made
    ids = torch.arange(24, device="cuda").unsqueeze(0)
    runs = []
    for _ in range(30):
        decoder.prefill(ids)
        for _ in range(200):
            step()
        runs.append((step.history.clone(), step.logits.clone()))
    assert all(torch.equal(history, runs[0][0]) and torch.equal(logits, runs[0][1]) for history, logits in runs)
