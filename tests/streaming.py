"""A small Llama whose linears are streams of the decode kernels, beside the same weights in fp32."""

from __future__ import annotations

import torch
from tiny import model
from torch import nn

from lowbit import generate, native_step
from lowbit.kernels import runner, weights
from lowbit.kernels.batch_step import BatchStep
from lowbit.kernels.quantizer import quantize


def build(name, length, device="cpu", kv="", batch=1, **changes):
    """(streamed model, the same weights in fp32, a decoder of the streamed one, its native step)."""
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    streamed, exact = model(dtype, **changes).to(device), model(torch.float32, **changes).to(device)
    for path, linear in list(streamed.named_modules()):
        if isinstance(linear, nn.Linear):
            exact.get_submodule(path).weight.data = weights.dequantize(quantize(linear.weight.detach(), name))
    exact.model.embed_tokens.weight.data = streamed.model.embed_tokens.weight.detach().float()
    native_step.attach(streamed, name)
    decoder = generate.Decoder(streamed, batch, length, dtype, kv=kv)
    kind = runner.NativeStep if batch == 1 else BatchStep
    step = kind(streamed, decoder.cache, decoder.token, decoder.position)
    return streamed, exact, decoder, step
