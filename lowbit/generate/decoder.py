"""Generation over a static KV cache: prefill, decode_one_token and the dependent loop that decode cases time; greedy
unless a ``pick`` is given.

Everything a decode step reads lies at a fixed address (weights, cache, token, position), so that one CUDA graph can
replay it, and nothing in the loop waits for the device. The model is transformers' LlamaForCausalLM, its linears
possibly replaced by a backend's; cache and masks are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit import kvcache, roofline
from lowbit.errors import LowbitError
from lowbit.generate.proof import check_finite, prove
from lowbit.kernels.batch_step import BatchStep
from lowbit.kernels.prefill import NativePrefill
from lowbit.kernels.runner import NativeStep
from lowbit.quiet import quiet_import

Step = Callable[[Tensor, Tensor], Tensor]
"""(token [B, 1], position [1]) -> next token [B, 1]."""
PrefillStep = Callable[[Tensor], Tensor]
"""ids [B, S] -> next token [B, 1]."""
Pick = Callable[[Tensor], Tensor]
"""logits [B, 1, V] -> next token [B, 1]."""

CACHE_MULTIPLE = 16
"""Cache lengths are rounded up to this: fused attention pads a mask whose rows are not 16-byte aligned, every layer."""


def make_cache(model: Any, batch: int, length: int, dtype: torch.dtype | None = None, kv: str = "") -> Any:
    """A static KV cache for ``batch`` sequences of at least ``length`` tokens, allocated now, on the model's device.

    Keys and values: [batch, kv_heads, length rounded up to 16, head_dim] per layer. ``dtype`` is that of the
    activations; None takes it from the final norm, which no format quantizes. ``kv``: what the cache holds instead, as
    Format.kv. Allocated before anything is compiled: only then does it mark its tensors as static for CUDA graphs.
    """
    config = model.config
    if length > config.max_position_embeddings:
        raise LowbitError(
            f"a context of {length} tokens does not fit the model: its config allows {config.max_position_embeddings} "
            "(max_position_embeddings); take a workload with a shorter context"
        )
    norm = model.model.norm.weight
    cache = quiet_import("transformers").StaticCache(
        config, max_cache_len=-(-length // CACHE_MULTIPLE) * CACHE_MULTIPLE
    )
    if kv:
        kvcache.pack(cache, kv)
    cache.early_initialization(
        batch_size=batch,
        num_heads=config.num_key_value_heads,
        head_dim=roofline.head_dim(config),
        dtype=dtype or norm.dtype,
        device=norm.device,
    )
    return cache


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token: logits [B, 1, V] -> [B, 1]."""
    return logits.argmax(dim=-1)


def prefill(model: Any, cache: Any, ids: Tensor, pick: Pick = greedy) -> Tensor:
    """Take the prompt into an empty cache. ids: [B, S] -> next token: [B, 1]. The head sees only the last position."""
    return pick(prefill_logits(model, cache, ids))


def prefill_logits(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """The logits of a prompt's last position: ids [B, S] -> [B, 1, V]."""
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits


def decode_one_token(model: Any, token: Tensor, position: Tensor, cache: Any, pick: Pick = greedy) -> Tensor:
    """One step. token: [B, 1], position: [1] int64 on the device -> next token: [B, 1]."""
    return pick(decode_logits(model, token, position, cache))


def decode_logits(model: Any, token: Tensor, position: Tensor, cache: Any) -> Tensor:
    """The logits of one step. token: [B, 1], position: [1] int64 on the device -> [B, 1, V]."""
    logits: Tensor = model(
        input_ids=token, position_ids=position.view(1, 1), past_key_values=cache, use_cache=True
    ).logits
    return logits


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


class Decoder:
    """A model with its cache, and the prefill and decode steps of one batch size, ready to be compiled and timed.

    Both steps are closures over model and cache with static shapes, fit for ``torch.compile(fullgraph=True,
    dynamic=False)``; one compile serves every step and every round. A round is ``prefill(ids); decode(n)``. Gradients
    are off inside every method: a caller's own no_grad or inference mode is neither needed nor in the way.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        dtype: torch.dtype | None = None,
        pick: Pick = greedy,
        kv: str = "",
    ) -> None:
        """``length`` is the context that a round may reach; ``dtype`` and ``kv`` as in make_cache."""
        self.model = model
        self.length = length
        self.cache = cache = make_cache(model, batch, length, dtype, kv)
        device = cache.layers[0].keys.device
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        for buffer in (self.token, self.position):
            torch._dynamo.mark_static_address(buffer)  # else every CUDA graph replay copies them first
        self._used = 0  # tokens in the cache, counted on the host
        self._prompt_tokens = 0

        def step(token: Tensor, position: Tensor) -> Tensor:
            return decode_one_token(model, token, position, cache, pick)

        def prefill_step(ids: Tensor) -> Tensor:
            return prefill(model, cache, ids, pick)

        self._native: NativeStep | None = None
        self._native_prefill: NativePrefill | None = None
        self._pick = pick
        self._step: Step = step
        self._prefill_step: PrefillStep = prefill_step

    @property
    def used(self) -> int:
        """Tokens in the cache, counted on the host."""
        return self._used

    @property
    def native(self) -> NativeStep | None:
        """The native step, once ``run_natively`` was called."""
        return self._native

    @property
    def native_prefill(self) -> NativePrefill | None:
        """The native prefill, once ``run_natively`` was called; None too over a cache that is not in 16 bits."""
        return self._native_prefill

    def compile(self, compiler: Callable[[Step], Step]) -> None:
        """Decode with ``compiler(step)`` from now on; the prefill stays as it is."""
        self._step = compiler(self._step)

    @torch.no_grad()
    def run_natively(
        self, ids: Tensor, source: str, progress: Callable[[str], None] | None = None, *, greedily: bool = False
    ) -> None:
        """Prefill and decode with lowbit's own kernels from now on: CUDA graphs, one per prompt length, one per token.

        The model holds streamed weights (lowbit.backends.native on SM90). A step after the prompt ``ids`` [B, S], and
        the prompt itself, are held against the eager ones first: LowbitError naming ``source`` if their logits differ
        by more than the dtype explains. ``greedily`` as in pick_natively; a decoder whose ``pick`` is greedy is so
        anyhow. Over a quantized KV cache the prefill stays as it is.
        """
        self._rewind(0)
        self._reserve(ids.shape[1])
        of_prompt = prefill_logits(self.model, self.cache, ids).flatten().double()
        first = self.prefill(ids).clone()
        pick = None if greedily or self._pick is greedy else self._pick
        make = NativeStep if len(ids) == 1 else BatchStep
        native = make(self.model, self.cache, self.token, self.position, progress, pick)
        of_step = decode_logits(self.model, self.token, self.position, self.cache).flatten().double()
        self.prefill(ids)
        self.token.copy_(first)  # a pick that draws has drawn another one
        native.launch()
        prove(native, of_step, source, "step")
        if NativePrefill.takes(self.cache, native.shape.dtype):
            native_prefill = NativePrefill(native, self.model, self.cache, progress=progress)
            native_prefill(ids)
            prove(native, of_prompt, source, "prefill")
            self._native_prefill = native_prefill
        native.capture()
        self._native = native

    @torch.no_grad()
    def pick_natively(self, greedily: bool) -> None:
        """Whether the native step takes its own arg max or asks this decoder's ``pick``: recorded anew."""
        if self._native is None:
            raise LowbitError("pick_natively() is for a decoder that runs natively: call run_natively() first")
        self._native.pick = None if greedily else self._pick
        self._native.capture()
        if self._native_prefill is not None:
            self._native_prefill.forget()

    def compile_prefill(self, compiler: Callable[[PrefillStep], PrefillStep]) -> None:
        """Prefill with ``compiler(prefill_step)`` from now on; decode stays as it is."""
        self._prefill_step = compiler(self._prefill_step)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Start a round: ids [B, S] on the device -> the first token [B, 1], valid until the next call."""
        self._rewind(0)
        self._reserve(ids.shape[1])
        self._prompt_tokens = ids.shape[1]
        if self._native_prefill is not None:
            self._native_prefill(ids)
            self._rewind(self._prompt_tokens)
            return self.token
        _begin_step(ids)
        self.token.copy_(self._prefill_step(ids))
        self.position.fill_(self._prompt_tokens)
        return self.token

    def decode(self, new_tokens: int, on_step: Callable[[], object] | None = None) -> Tensor:
        """``new_tokens`` dependent steps from where the cache stands -> [B, new_tokens]; see the function."""
        begin = self._used
        self._reserve(new_tokens)
        if self._native is None:
            return decode(self._step, self.token, self.position, new_tokens, on_step)
        for _ in range(new_tokens):
            self._native()
            if on_step is not None:
                on_step()
        return self._native.history[..., begin + 1 : begin + 1 + new_tokens].view(len(self.token), -1).clone()

    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        """A whole round: ids [B, S] -> the first token and the ``new_tokens`` after it, [B, 1 + new_tokens]."""
        first = self.prefill(ids).clone()
        return torch.cat([first, self.decode(new_tokens)], dim=1)

    @torch.no_grad()
    def again(self, new_tokens: int) -> Tensor:
        """Decode from the prompt's end once more, without its prefill: [B, new_tokens], from the token at hand."""
        self._rewind(self._prompt_tokens)
        self.position.fill_(self._prompt_tokens)
        return self.decode(new_tokens)

    @torch.no_grad()
    def check_finite(self, ids: Tensor, source: str) -> None:
        """An eager prefill and one step: LowbitError naming ``source`` if the step's logits aren't finite. Untimed."""
        self._rewind(0)
        self._reserve(ids.shape[1] + 1)
        token = prefill(self.model, self.cache, ids)
        self.position.fill_(ids.shape[1])
        check_finite(decode_logits(self.model, token, self.position, self.cache), source)

    @torch.no_grad()
    def check_length(self, source: str) -> None:
        """LowbitError unless the cache's own count of its tokens is ours: a graph that replays nothing is very fast."""
        lengths = {int(layer.cumulative_length) for layer in self.cache.layers}
        if self._native is not None:  # its kernels count positions on the device, and nothing else
            lengths = {int(self.position)}
        if lengths != {self._used}:
            raise LowbitError(
                f"{source}: the KV cache should hold {self._used} tokens after its steps, its layers count "
                f"{', '.join(map(str, sorted(lengths)))}: the compiled step does not do what the eager one does"
            )

    def _rewind(self, tokens: int) -> None:
        # Only the lengths: what lies behind them is masked, and zeroing all keys and values would be timed as prefill
        lengths = [layer.cumulative_length for layer in self.cache.layers]
        torch._foreach_zero_(lengths)
        if tokens:
            torch._foreach_add_(lengths, tokens)
        self._used = tokens

    def _reserve(self, tokens: int) -> None:
        # writing past the end of a static cache is out of bounds: on a GPU a fault that poisons the process
        if self._used + tokens > self.length:
            raise LowbitError(
                f"the KV cache holds {self.length} tokens: {self._used} used, {tokens} more asked; "
                "make the Decoder longer, or start again with prefill()"
            )
        self._used += tokens
