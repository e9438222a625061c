"""The decode step of 2 to 8 sequences at one position, as one CUDA graph of lowbit's own kernels (cuda/batch.cu).

    embed -> layers x [ normalize, qkv, RoPE+attention+KV append, o, normalize, gate_up+SiLU, down ]
          -> normalize, head+arg max

o and down leave their sums by slices of K; the normalize that follows adds them to the residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import batch, product_launch
from lowbit.kernels.arguments import Normalize, fill
from lowbit.kernels.geometry import MOST_SEQUENCES
from lowbit.kernels.launch import Launch
from lowbit.kernels.runner import NativeStep, stream_of
from lowbit.kernels.stream import LAYOUTS, Stream


class BatchStep(NativeStep):
    """As NativeStep, with ``token`` [B, 1]; ``logits`` [B, vocabulary], ``history`` [B, length + 1].

    All sequences stand at the one ``position`` [1]. ``pick`` gets logits [B, 1, vocabulary] and gives tokens [B, 1].
    """

    def _check_batch(self, of_cache: int) -> None:
        count = self.shape.batch
        if count != of_cache or not 2 <= count <= MOST_SEQUENCES:
            raise LowbitError(
                f"BatchStep decodes 2 to {MOST_SEQUENCES} sequences, got {count} tokens and a cache of {of_cache} "
                "sequences"
            )

    def _buffers(self, model: Any, device: torch.device) -> None:
        super()._buffers(model, device)
        count = self.shape.batch

        def empty(*size: int, like: Tensor) -> Tensor:
            return torch.zeros(*size, dtype=like.dtype, device=device)

        self.residual, self.qkv, self.attended, self.activated, self.logits, self.history = (
            empty(count, one.numel(), like=one)
            for one in (self.residual, self.qkv, self.attended, self.activated, self.logits, self.history)
        )
        self.best = empty(count, like=self.best)
        self.parts = empty(max(batch.SLICES), count, self.shape.hidden, like=self.residual)
        largest = max(batch.x_bytes(replace(self.shape, format=name), self.shape.hidden) for name in LAYOUTS)
        self.x = torch.zeros(largest, dtype=torch.uint8, device=device)

    def _plan(self, model: Any, cache: Any) -> Iterator[Launch]:
        body, added = model.model, 0
        self._cache = cache
        yield self._embedding(body.embed_tokens)
        for index, layer in enumerate(body.layers):
            qkv, o, gate_up, down = (
                stream_of(getattr(owner, name), f"layer {index}'s {name}")
                for owner, names in ((layer.self_attn, ("q_proj", "o_proj")), (layer.mlp, ("gate_proj", "down_proj")))
                for name in names
            )
            yield self._normalize(layer.input_layernorm, qkv, added)
            yield self._several("qkv", qkv, self.x, self.qkv)
            yield self._attention(cache.layers[index])
            yield self._several("o", o, self.attended, self.parts)
            yield self._normalize(layer.post_attention_layernorm, gate_up, batch.slices(o.format, o.k))
            yield self._several("gate_up", gate_up, self.x, self.activated)
            yield self._several("down", down, self.activated, self.parts)
            added = batch.slices(down.format, down.k)
        head = stream_of(model.lm_head, "lm_head")
        yield self._normalize(body.norm, head, added)
        yield self._several("head", head, self.x, self.logits)

    def _normalize(self, norm: Any, stream: Stream, added: int) -> Launch:
        """For the product with ``stream``, whose format says how x is laid out; ``added`` parts of the residual."""
        self._expect(norm.weight.dtype, "norms")
        self._kept.append(norm.weight)
        argument = fill(Normalize, residual=self.residual, parts=self.parts, norm=norm.weight, x=self.x)
        kernel, grid = batch.NORMALIZE.format(added), (self.shape.batch, 1)
        return Launch(self._module(stream.format), kernel, grid, batch.NORM_THREADS, argument, batch.NORM_SHARED_BYTES)

    def _several(self, name: str, stream: Stream, x: Tensor, out: Tensor) -> Launch:
        shape = replace(self.shape, format=stream.format)
        self._check_format(name, shape)
        fields = self._multiplying(name, stream, x, out) | {"length": self.history.shape[-1]}
        return product_launch.several(self._module(stream.format), name, shape, stream, fields)
