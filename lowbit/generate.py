"""Greedy generation over a static KV cache: prefill, decode_one_token and the dependent loop that decode cases time.

Everything a decode step reads lies at a fixed address (weights, cache, token, position), so that one CUDA graph can
replay it, and nothing in the loop waits for the device. The model is transformers' LlamaForCausalLM, its linears
possibly replaced by a backend's; cache and masks are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from lowbit.errors import LowbitError

Step = Callable[[Tensor, Tensor], Tensor]
"""(token [B, 1], position [1]) -> next token [B, 1]."""
PrefillStep = Callable[[Tensor], Tensor]
"""ids [B, S] -> next token [B, 1]."""

WARMUP_STEPS = 3
"""Steps until a compiled step only replays: CUDA graph trees compile and run in the first, record in the second."""

CACHE_MULTIPLE = 16
"""Cache lengths are rounded up to this: fused attention pads a mask whose rows are not 16-byte aligned, every layer."""


def make_cache(model: Any, batch: int, length: int, dtype: torch.dtype | None = None) -> Any:
    """A static KV cache for ``batch`` sequences of at least ``length`` tokens, allocated now, on the model's device.

    Keys and values: [batch, kv_heads, length rounded up to 16, head_dim] per layer. ``dtype`` is that of the
    activations; None takes it from the final norm, which no format quantizes. Allocated before anything is compiled,
    because the cache marks its tensors as static addresses for CUDA graphs only outside a compiled region.
    """
    config = model.config
    if length > config.max_position_embeddings:
        raise LowbitError(
            f"a context of {length} tokens does not fit the model: its config allows {config.max_position_embeddings} "
            "(max_position_embeddings); take a workload with a shorter context"
        )
    norm = model.model.norm.weight
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = StaticCache(config, max_cache_len=-(-length // CACHE_MULTIPLE) * CACHE_MULTIPLE)
    cache.early_initialization(
        batch_size=batch,
        num_heads=config.num_key_value_heads,
        head_dim=head_dim,
        dtype=dtype or norm.dtype,
        device=norm.device,
    )
    return cache


def prefill(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Take the prompt into an empty cache. ids: [B, S] -> next token: [B, 1]. The head sees only the last position."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # [B, 1, V]
    return _pick(logits)


def decode_one_token(model: Any, token: Tensor, position: Tensor, cache: Any) -> Tensor:
    """One greedy step. token: [B, 1], position: [1] int64 on the device -> next token: [B, 1]."""
    return _pick(decode_logits(model, token, position, cache))


def decode_logits(model: Any, token: Tensor, position: Tensor, cache: Any) -> Tensor:
    """The logits of one step. token: [B, 1], position: [1] int64 on the device -> [B, 1, V]."""
    logits: Tensor = model(
        input_ids=token, position_ids=position.view(1, 1), past_key_values=cache, use_cache=True
    ).logits
    return logits


def _pick(logits: Tensor) -> Tensor:
    # [B, 1, V] -> [B, 1]; greedy
    return logits.argmax(dim=-1)


def _begin_step(tensor: Tensor) -> None:
    if tensor.is_cuda:  # only there are CUDA graphs; elsewhere the call would import Inductor for nothing
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


@torch.no_grad()
def decode(
    step: Step, token: Tensor, position: Tensor, new_tokens: int, on_step: Callable[[], object] | None = None
) -> Tensor:
    """``new_tokens`` dependent greedy steps -> the tokens they gave, [B, new_tokens].

    ``token`` [B, 1] and ``position`` [1] are updated in place on the device, so that every step reads the same
    addresses; the copy also takes the step's output out of the CUDA graph's pool before the next replay overwrites
    it. ``on_step`` is called after each step has been issued (record an event there; it must not synchronise).
    """
    tokens = torch.empty(token.shape[0], new_tokens, dtype=token.dtype, device=token.device)
    for index in range(new_tokens):
        _begin_step(token)
        token.copy_(step(token, position))
        position.add_(1)
        tokens[:, index : index + 1].copy_(token)
        if on_step is not None:
            on_step()
    return tokens


def check_finite(values: Tensor, source: str) -> None:
    """Raise LowbitError unless all ``values`` (logits, or what follows from them) are finite. Waits for the device."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise LowbitError(
            f"NaN/Inf logits from {source}: expected finite values, got {bad} of {values.numel()} that are not; "
            "the format overflows in this dtype or its kernel is broken here: leave it out with -k, or try another "
            "base dtype or library version"
        )


class Decoder:
    """A model with its cache, and the prefill and decode steps of one batch size, ready to be timed.

    ``compile_step`` and ``compile_prefill`` turn a step into a compiled one (None leaves it eager). Both steps are
    closures over model and cache with static shapes, fit for ``torch.compile(fullgraph=True, dynamic=False)``; one
    compile serves every step and every round. A round is ``reset(); prefill(ids); decode(n)``.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        *,
        dtype: torch.dtype | None = None,
        compile_step: Callable[[Step], Step] | None = None,
        compile_prefill: Callable[[PrefillStep], PrefillStep] | None = None,
    ) -> None:
        self.model = model
        self.length = length
        self.cache = make_cache(model, batch, length, dtype)
        device = self.cache.layers[0].keys.device
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        for buffer in (self.token, self.position):
            torch._dynamo.mark_static_address(buffer)  # else every CUDA graph replay copies them first
        cache = self.cache

        def step(token: Tensor, position: Tensor) -> Tensor:
            return decode_one_token(model, token, position, cache)

        def prefill_step(ids: Tensor) -> Tensor:
            return prefill(model, cache, ids)

        self.step: Step = compile_step(step) if compile_step else step
        self.prefill_step: PrefillStep = compile_prefill(prefill_step) if compile_prefill else prefill_step
        self._used = 0  # tokens in the cache, counted on the host

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the cache, keeping its addresses. Untimed: it writes the whole cache."""
        self.cache.reset()
        self._used = 0

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """ids: [B, S] on the device -> the first token, [B, 1], valid until the next call. Needs an empty cache."""
        if self._used:
            raise LowbitError(f"prefill expects an empty cache, got one with {self._used} tokens: call reset() first")
        self._reserve(ids.shape[1])
        _begin_step(ids)
        self.token.copy_(self.prefill_step(ids))
        self.position.fill_(ids.shape[1])
        return self.token

    def decode(self, new_tokens: int, on_step: Callable[[], object] | None = None) -> Tensor:
        """``new_tokens`` dependent steps from where the cache stands -> [B, new_tokens]."""
        self._reserve(new_tokens)
        return decode(self.step, self.token, self.position, new_tokens, on_step)

    @torch.no_grad()
    def check_finite(self, source: str) -> None:
        """One eager, untimed step whose logits must be finite; LowbitError names ``source`` otherwise."""
        self._reserve(1)
        check_finite(decode_logits(self.model, self.token, self.position, self.cache), source)
        self.position.add_(1)

    def _reserve(self, tokens: int) -> None:
        # writing past the end of a static cache is out of bounds: a device-side assert on a GPU
        if self._used + tokens > self.length:
            raise LowbitError(
                f"the KV cache holds {self.length} tokens: {self._used} used, {tokens} more asked; "
                "make the decoder longer or call reset()"
            )
        self._used += tokens
