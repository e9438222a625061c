"""A prompt through a Llama with streamed weights: dequantize a matrix, multiply by cuBLAS, our own kernels between.

    layers x [ RMSNorm, qkv, RoPE + KV append, attention, o, residual + RMSNorm, gate_up, SiLU, down, residual ]

Matrices that share x are unpacked by one launch and multiplied by one product, into memory that all layers share; gate
and up stay woven by 8 rows, as their stream is, and SiLU reads them so. Only the last position goes beyond the last
layer's attention: the decode step's own kernels take it from there to the token, with the weights as they are packed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import LowbitError
from lowbit.kernels import unpacking
from lowbit.kernels.arguments import Norm, Rope, Silu, fill
from lowbit.kernels.geometry import Geometry
from lowbit.kernels.launch import Module, compile_module
from lowbit.kernels.recorded import RecordedRuns, Work
from lowbit.kernels.runner import NativeStep
from lowbit.kernels.stream import TILE, Stream
from lowbit.kernels.stream_modules import StreamPart

KERNELS = ("norm_kernel", "rope_kernel", "silu_kernel")
THREADS = 256
"""Of a block of theirs; cuda/prefill.cu says the same."""
NORM_SHARED_BYTES = 128
ROOM = 256
"""Buffers are made for a multiple of this many tokens."""

_loaded: dict[tuple[Geometry, int], Module] = {}


def load(shape: Geometry, device: int, progress: Callable[[str], None] | None = None) -> Module:
    """The kernels for this shape, compiled or from the cache, on this device; once per process."""
    if (shape, device) not in _loaded:
        sources = ("ptx", "common", "prefill")
        _loaded[shape, device] = compile_module(sources, KERNELS, shape.macros(), device, progress)
    return _loaded[shape, device]


class NativePrefill:
    """Takes a prompt into the cache of a NativeStep, whose token, position, logits and history it leaves as steps do;
    of a BatchStep as many prompts of one length as it has sequences, whose tokens are rows of the same products.

    ``prefill(ids)`` with ids [B, S]; the cache's length bounds S. The second prompt of a length is recorded as a CUDA
    graph, and replayed from then on.
    """

    def __init__(
        self,
        step: NativeStep,
        model: Any,
        cache: Any,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.step, self.shape = step, step.shape
        self._body, self._layers = model.model, cache.layers
        self._device, self._sequences = step.token.device, step.shape.batch
        self._module = load(step.shape, self._device.index or 0, progress)
        own = weakref.proxy(self)  # no cycle: dropped, its graphs end at once and not inside another's recording
        self._runs = RecordedRuns(lambda tokens: own.launch(tokens))
        self.room = 0
        self._attended = self._scratch = torch.empty(0)

    @staticmethod
    def takes(cache: Any, dtype: torch.dtype) -> bool:
        """Whether this cache holds keys and values as the kernels write them, not codes with scales."""
        return all(layer.keys.dtype == dtype for layer in cache.layers)

    def _streams(self, layer: Any) -> dict[str, Stream]:
        linears = {
            "qkv": layer.self_attn.q_proj,
            "o": layer.self_attn.o_proj,
            "gate_up": layer.mlp.gate_proj,
            "down": layer.mlp.down_proj,
        }
        return {name: linear.part.stream for name, linear in linears.items()}

    def _make_room(self, tokens: int) -> None:
        """Memory for prompts of so many tokens together: activations of one layer, and the largest unpacked matrix."""
        shape, room = self.shape, -(-tokens // ROOM) * ROOM
        self._runs.forget()  # they read the memory that goes

        def empty(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=self._device)

        self.residual = self.normed = self.projected = self.qkv = self.both = self.activated = torch.empty(0)
        self.residual = empty(room, shape.hidden, dtype=torch.float32)
        self.normed, self.projected = empty(room, shape.hidden), empty(room, shape.hidden)
        self.qkv = empty(room, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        self.both, self.activated = empty(room, 2 * shape.inter), empty(room, shape.inter)
        if not self.room:
            streams = [stream for layer in self._body.layers for stream in self._streams(layer).values()]
            self._scratch = empty(max(stream.rows * stream.k for stream in streams))
        self.room = room

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> None:
        """ids [B, S] on the device. Raises LowbitError if they are not the sequences that the cache has room for."""
        if ids.dim() != 2 or ids.shape[0] != self._sequences or not 1 <= ids.shape[1] <= self.step.length:
            prompts = "one prompt" if self._sequences == 1 else f"{self._sequences} prompts"
            raise LowbitError(
                f"the native prefill takes {prompts} of 1 to {self.step.length} tokens (the KV cache's length), "
                f"got {list(ids.shape)}"
            )
        if ids.numel() > self.room:
            self._make_room(ids.numel())
        self.residual[: ids.numel()].copy_(self._body.embed_tokens(ids).flatten(0, 1))
        self._runs(ids.shape[1])

    def forget(self) -> None:
        """Record anew: after the step's ``pick`` was changed."""
        self._runs.forget()

    @property
    def recorded(self) -> list[int]:
        """Lengths of prompts that are replayed from a graph."""
        return self._runs.recorded

    def launch(self, tokens: int) -> None:
        """The works of a prompt on the current stream; its embedded tokens are in ``residual``."""
        for work in self.plan(tokens):
            work.call()

    def plan(self, tokens: int) -> Iterator[Work]:
        """What is done for a prompt of so many tokens, or several, in order."""
        layers, rows = list(self._body.layers), tokens * self._sequences
        for index, layer in enumerate(layers):
            streams = self._streams(layer)
            yield self._norm(layer.input_layernorm, rows, adds=index > 0)
            yield from self._product("qkv", streams, lambda: self.normed, self.qkv[:rows])
            yield self._rope(self._layers[index], tokens)
            if index + 1 == len(layers):
                yield Work("attention", "the last token", lambda: self._attend(layers[-1].self_attn, tokens, 1))
                break
            yield Work("attention", "", self._attending(layer.self_attn, tokens))
            yield from self._product("o", streams, lambda: self._attended, self.projected[:rows])
            yield self._norm(layer.post_attention_layernorm, rows, adds=True)
            yield from self._product("gate_up", streams, lambda: self.normed, self.both[:rows])
            yield self._silu(rows)
            yield from self._product("down", streams, lambda: self.activated, self.projected[:rows])
        yield Work("last", "the last token", lambda: self._finish(tokens))

    def _launching(self, kernel: str, blocks: int, argument: Any, shared_bytes: int = 0) -> Callable[[], None]:
        def call() -> None:
            self._module.launch(kernel, (blocks, 1), THREADS, argument, shared_bytes=shared_bytes)

        return call

    def _norm(self, norm: Any, tokens: int, *, adds: bool) -> Work:
        added = self.projected if adds else None
        argument = fill(Norm, residual=self.residual, added=added, weight=norm.weight, out=self.normed)
        return Work("norm", "", self._launching("norm_kernel", tokens, argument, NORM_SHARED_BYTES))

    def _rope(self, layer: Any, tokens: int) -> Work:
        argument = fill(
            Rope,
            qkv=self.qkv,
            keys=layer.keys,
            values=layer.values,
            rope=self.step.rope,
            length=self.step.length,
            tokens=tokens,
        )
        rotate = self._launching("rope_kernel", tokens * self._sequences, argument)

        def call() -> None:
            rotate()
            self._keys, self._values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]

        return Work("rope", "", call)

    def _silu(self, tokens: int) -> Work:
        pieces = tokens * self.shape.inter // 8
        argument = fill(Silu, both=self.both, out=self.activated, pieces=pieces)
        return Work("silu", "", self._launching("silu_kernel", -(-pieces // THREADS), argument))

    def _product(self, name: str, streams: dict[str, Stream], x: Callable[[], Tensor], out: Tensor) -> Iterator[Work]:
        """Unpack a matrix [rows, k], multiply x [tokens, k] by it into out [tokens, rows]."""
        stream, tokens = streams[name], out.shape[0]
        part = StreamPart(stream, stream.rows, row0=0)
        weight = self._scratch[: part.rows * stream.k].view(part.rows, stream.k)
        share = part.rows / (stream.tiles * TILE)
        moved = int(share * stream.data.numel()) + weight.nbytes
        yield Work("unpack", name, lambda: unpacking.unpack_into(part, weight), moved=moved)
        operations = 2 * tokens * weight.numel()
        yield Work("gemm", name, lambda: torch.mm(x()[:tokens], weight.t(), out=out), operations=operations)

    def _attending(self, attention: Any, tokens: int) -> Callable[[], None]:
        return lambda: self._attend(attention, tokens, tokens)

    def _attend(self, attention: Any, tokens: int, last: int) -> None:
        """The ``last`` queries over all keys of each prompt: -> self._attended [B · last, heads · head_dim]."""
        shape, count = self.shape, self._sequences
        width = shape.heads * shape.head_dim
        rows = self.qkv[: tokens * count].view(count, tokens, -1)[:, tokens - last :, :width]
        queries = rows.view(count, last, shape.heads, shape.head_dim).transpose(1, 2)
        found = functional.scaled_dot_product_attention(
            queries,
            self._keys,
            self._values,
            is_causal=last > 1,
            scale=attention.scaling,
            enable_gqa=shape.heads != shape.kv_heads,
        )
        self._attended = found.transpose(1, 2).reshape(count * last, width)

    def _finish(self, tokens: int) -> None:
        count = self._sequences
        last = self.residual[: tokens * count].view(count, tokens, -1)[:, -1]
        self.step.residual.copy_(last.view_as(self.step.residual))
        self.step.attended.copy_(self._attended.view_as(self.step.attended))
        # behind the copies: what follows is launched early, which it may be behind a kernel alone
        self.step.position.fill_(tokens - 1)
        self.step.finish()
