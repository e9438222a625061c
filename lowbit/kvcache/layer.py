"""One layer of a quantized KV cache, behind the face of transformers' static one; it imports that library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.kvcache import decode, encode
from lowbit.quiet import quiet_import

cache_utils: Any = quiet_import("transformers.cache_utils")


class PackedLayer(cache_utils.StaticLayer):  # type: ignore[misc]  # transformers is untyped to us
    """One layer's static cache. Each part of ``encode`` is a tensor [batch, kv_heads, max_cache_len, …] of its own."""

    def __init__(self, name: str, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.name = name
        self.cumulative_length: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states like these: [batch, kv_heads, any, head_dim]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.cumulative_length = self.cumulative_length.to(self.device)
        for side, states in (("key", key_states), ("value", value_states)):
            like = encode(self.name, states.new_zeros(1, 1, 1, states.shape[-1]))
            for part, tensor in zip(_part_names(side), like, strict=False):
                shape = (self.batch_size, self.num_heads, self.max_cache_len, tensor.shape[-1])
                setattr(self, part, torch.zeros(shape, dtype=tensor.dtype, device=self.device))
        if not torch.compiler.is_compiling():
            for tensor in [*_stored(self, "key"), *_stored(self, "value"), self.cumulative_length]:
                torch._dynamo.mark_static_address(tensor)  # else no CUDA graph: they are written in place
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take in the states of S more tokens, [B, H, S, D] -> all keys and values, [B, H, max_cache_len, D].

        For ``fp8_attn``: codes and scales as they are stored.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        positions = torch.arange(tokens, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(tokens)
        found = []
        for side, states in (("key", key_states), ("value", value_states)):
            stored = _stored(self, side)
            for tensor, new in zip(stored, encode(self.name, states), strict=True):
                tensor.index_copy_(2, positions, new)
            found.append(stored if self.name == "fp8_attn" else decode(self.name, stored, self.dtype))
        return found[0], found[1]


def _part_names(side: str) -> tuple[str, str, str]:
    return f"{side}s", f"{side}_scale", f"{side}_zero"  # ``keys`` and ``values`` are the codes: others look there


def _stored(layer: Any, side: str) -> tuple[Tensor, ...]:
    return tuple(getattr(layer, name) for name in _part_names(side) if hasattr(layer, name))
