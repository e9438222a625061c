"""The decode step of a Llama at batch 1 as one CUDA graph of lowbit's own kernels (cuda/).

The runner reads the model's streams, its norms, its embedding table and a transformers StaticCache; it writes the
cache, the token and the position, so that a graph replay is a whole greedy step and nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.graphs import recording
from lowbit.kernels import attention_plan, batch, product_launch
from lowbit.kernels.arguments import Attention, Embed, fill
from lowbit.kernels.geometry import RING_BYTES, Geometry
from lowbit.kernels.launch import Launch, Module, compile_module
from lowbit.kernels.modules import NativeEmbedding, NativeLinear
from lowbit.kernels.stream import Stream
from lowbit.kernels.stream_modules import StreamLinear
from lowbit.kernels.weights import Packed

PRODUCTS = {
    "qkv": "product_kernel<HIDDEN, true, TO_ACT>",
    "o": "product_kernel<QDIM, false, ADD_RESIDUAL>",
    "gate_up": "product_kernel<HIDDEN, true, SILU_MUL>",
    "down": "product_kernel<INTER, false, ADD_RESIDUAL>",
    "head": "product_kernel<HIDDEN, true, TO_LOGITS>",
}
"""Of one sequence; batch.PRODUCTS are those of several."""
CODES = {"int": 0, "e4m3": 1, "e2m1": 2}
SCALES = {torch.float16: 0, torch.float32: 1, torch.float8_e8m0fnu: 2, torch.float8_e4m3fn: 3}
"""Kinds of an embedding's codes and of their scales, as cuda/embedding.cu counts them."""


def kernels(shape: Geometry) -> tuple[str, ...]:
    """All that a module of this shape holds."""
    products = PRODUCTS.values() if shape.batch == 1 else batch.kernels(shape)
    return (*products, *shape.attentions, "embed_kernel")


def sources(shape: Geometry) -> tuple[str, ...]:
    """The files of cuda/ that they are compiled from."""
    return (*product_launch.sources(shape.batch), "attention", "embedding")


Pick = Callable[[Tensor], Tensor]
"""logits [1, 1, vocabulary] -> the next token [1, 1]."""

_loaded: dict[tuple[Geometry, int], Module] = {}


def load(shape: Geometry, device: int, progress: Callable[[str], None] | None = None) -> Module:
    """The kernels for this shape, compiled or from the cache, on this device; once per process."""
    if (shape, device) not in _loaded:
        files = ("ptx", *sources(shape))
        _loaded[shape, device] = compile_module(files, kernels(shape), shape.macros(), device, progress)
    return _loaded[shape, device]


def unstreamed(model: Any) -> str | None:
    """Why the step can't take this model's modules, or None: every linear streamed, activations of one dtype."""
    dtype = None
    for path, module in model.named_modules():
        if isinstance(module, StreamLinear):
            found = Geometry.of(model.config, module.format).dtype
            if found is not (dtype := dtype or found):
                return f"{path} wants activations in {found}, others in {dtype}"
        elif isinstance(module, nn.Linear | NativeLinear):
            return f"{path} is a {type(module).__name__} without a stream"
    kept = model.model.norm.weight.dtype
    if kept is not dtype:
        return f"its norms are in {kept}, its streams want {dtype}"
    return None


def lookup(packed: Packed) -> dict[str, Any]:
    """What the embedding's kernel is told of a packed table, as fields of Embed."""
    row, tensors = packed.row, packed.tensors()
    if row.kind not in CODES or row.scale not in SCALES:
        raise LowbitError(f"the native step looks up no table packed as {packed.format}: leave it in 16 bits")
    tensors["table"] = tensors.pop("codes")
    values = {"bits": row.bits, "group": row.group_size or packed.k, "offset": row.offset, "step": row.step}
    return {**tensors, **values, "code_kind": CODES[row.kind], "scale_kind": SCALES[row.scale]}


def stream_of(linear: nn.Module, where: str) -> Stream:
    if not isinstance(linear, StreamLinear):
        raise LowbitError(f"the native step needs streamed weights, but {where} is a {type(linear).__name__}")
    return linear.part.stream


class NativeStep:
    """One step: reads ``token`` [1, 1] and ``position`` [1] (int64 on the device), runs, writes both.

    ``cache`` is the StaticCache that the prefill filled, of 16 bits or of lowbit.kvcache's int8 or fp8 (``kv`` says
    which, ``attention`` how it is read), ``history`` [length] int64 gets the token of every position, ``logits``
    [vocabulary] fp32 are the last step's. Calling it replays one CUDA graph; the first call captures it.
    ``pick`` chooses the token from logits [1, 1, vocabulary] instead of arg max, by operations that a graph can hold.
    Linears may be of several weight formats, as a recipe mixes them, if their activations have one dtype.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        token: Tensor,
        position: Tensor,
        progress: Callable[[str], None] | None = None,
        pick: Pick | None = None,
    ) -> None:
        self.kv = attention_plan.held(cache)
        self.shape = Geometry.of(model.config, stream_of(model.lm_head, "lm_head").format, self.kv, token.numel())
        self.token, self.position, self.pick = token, position, pick
        device = token.device
        keys = cache.layers[0].keys
        self._check_batch(keys.shape[0])
        self.length = keys.shape[2]
        self._modules: dict[str, Module] = {}
        self._kept: list[Tensor] = []
        self._device, self._progress = device.index or 0, progress
        self._expect(cache.layers[0].dtype if self.kv else keys.dtype, "keys and values")
        self._buffers(model, device)
        self.attention = attention_plan.words(self.shape, self.length)
        self._attending = self.shape.attention(self.length)  # one for all layers
        self.plan = list(self._plan(model, cache))
        self._graph: torch.cuda.CUDAGraph | None = None

    def _check_batch(self, of_cache: int) -> None:
        if (self.shape.batch, of_cache) != (1, 1):
            raise LowbitError(f"NativeStep decodes one sequence (batch 1), got a cache of batch {of_cache}: BatchStep")

    def _module(self, format: str) -> Module:
        if format not in self._modules:
            self._modules[format] = load(replace(self.shape, format=format), self._device, self._progress)
        return self._modules[format]

    def _expect(self, dtype: torch.dtype, what: str) -> None:
        if dtype != self.shape.dtype:
            raise LowbitError(f"the native step of {self.shape.format} wants {what} in {self.shape.dtype}, got {dtype}")

    def _check_format(self, name: str, shape: Geometry) -> None:
        if shape.dtype != self.shape.dtype:
            raise LowbitError(
                f"the native step keeps activations in one dtype, {self.shape.dtype} beside a head in "
                f"{self.shape.format}, but {name} is {shape.format}: bf16 weights stand with bf16 alone"
            )

    def _buffers(self, model: Any, device: torch.device) -> None:
        shape = self.shape
        queries, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self.residual = empty(shape.hidden, torch.float32)
        self.qkv = empty(queries + 2 * kv, shape.dtype)
        self.attended, self.activated = empty(queries, shape.dtype), empty(shape.inter, shape.dtype)
        self.logits = empty(model.config.vocab_size, torch.float32)
        self.history = empty(self.length + 1, torch.int64)
        self.best, self.arrived = empty(1, torch.int64), empty(1, torch.int32)
        places = torch.arange(self.length, device=device).unsqueeze(0)
        cos, sin = model.model.rotary_emb(self.residual, places)  # [1, length, head_dim] fp32, llama3 scaling included
        half = shape.head_dim // 2
        self.rope = torch.stack([cos[0, :, :half], sin[0, :, :half]], -1).float().contiguous()

    def _plan(self, model: Any, cache: Any) -> Iterator[Launch]:
        body = model.model
        self._cache = cache
        yield self._embedding(body.embed_tokens)
        for index, layer in enumerate(body.layers):
            attention, mlp = layer.self_attn, layer.mlp
            where = f"layer {index}'s"
            yield self._product(
                "qkv", stream_of(attention.q_proj, f"{where} q_proj"), self.residual, self.qkv, layer.input_layernorm
            )
            yield self._attention(cache.layers[index])
            yield self._product("o", stream_of(attention.o_proj, f"{where} o_proj"), self.attended, self.residual)
            yield self._product(
                "gate_up",
                stream_of(mlp.gate_proj, f"{where} gate_proj"),
                self.residual,
                self.activated,
                layer.post_attention_layernorm,
            )
            yield self._product("down", stream_of(mlp.down_proj, f"{where} down_proj"), self.activated, self.residual)
        yield self._product("head", stream_of(model.lm_head, "lm_head"), self.residual, self.logits, body.norm)

    def _embedding(self, table: Any) -> Launch:
        if isinstance(table, NativeEmbedding):
            named = lookup(table.packed)
            self._kept += [tensor for tensor in named.values() if isinstance(tensor, Tensor)]
        else:
            self._expect(table.weight.dtype, "an embedding")
            self._kept.append(table.weight)
            named = {"table": table.weight, "bits": 16, "group": self.shape.hidden}
        argument = fill(Embed, token=self.token, x=self.residual, **named)
        grid = -(-self.shape.hidden // 256), self.shape.batch
        return Launch(self._module(self.shape.format), "embed_kernel", grid, 256, argument, overlap=False)

    def _multiplying(self, name: str, stream: Stream, x: Tensor, out: Tensor) -> product_launch.Fields:
        """The arguments that a product has for any number of sequences; the head hands out tokens."""
        handed = ("best", "arrived", "token", "position", "history")
        found = product_launch.operands(stream, x, out)
        return found | {field: getattr(self, field) for field in handed if name == "head"}

    def _product(self, name: str, stream: Stream, x: Tensor, out: Tensor, norm: Any = None) -> Launch:
        shape = replace(self.shape, format=stream.format)
        self._check_format(name, shape)
        weight = None if norm is None else norm.weight
        if weight is not None:
            self._expect(weight.dtype, "norms")
            self._kept.append(weight)
        room = shape.beside(self._attending) if name in ("qkv", "o") else RING_BYTES
        fields = self._multiplying(name, stream, x, out) | {"norm": weight}
        return product_launch.alone(self._module(stream.format), PRODUCTS[name], shape, stream, fields, room)

    def _attention(self, layer: Any) -> Launch:
        held = {"keys": layer.keys, "values": layer.values}
        if self.kv:
            held |= {"key_scale": layer.key_scale, "value_scale": layer.value_scale}
        own = {"qkv": self.qkv, "rope": self.rope, "position": self.position, "out": self.attended}
        argument = fill(Attention, **held, **own, length=self.length)
        plan, module = self._attending, self._module(self.shape.format)
        grid = self.shape.batch * self.shape.kv_heads, plan.splits
        return Launch(module, plan.kernel, grid, plan.warps * 32, argument, plan.shared_bytes, cluster=plan.splits)

    def launch(self) -> None:
        """The step's kernels, one by one, on the current stream; then ``pick``, if it is not greedy."""
        self._launch_from(0)

    def finish(self) -> None:
        """What a step does behind its last attention: ``attended`` and ``residual`` become the next token."""
        last = max(place for place, one in enumerate(self.plan) if one.kernel.startswith("attention"))
        self._launch_from(last + 1)

    def _launch_from(self, first: int) -> None:
        for one in self.plan[first:]:
            one.launch()
        if self.pick is not None:  # the head has put its arg max there, and advanced the position
            self.token.copy_(self.pick(self.logits.view(self.shape.batch, 1, -1)))
            self.history.index_copy_(-1, self.position, self.token.view(self.history[..., :1].shape))

    def capture(self) -> None:
        """Record the step as a CUDA graph; the token, position and cache stay as they are.

        Again after ``pick`` was changed: a graph holds the operations of the one that it was recorded with.
        """
        for one in self.plan:
            one.module.function(one.kernel)  # loading is not allowed while a graph is captured
        self._graph = torch.cuda.CUDAGraph()
        with recording(self._graph):
            self.launch()

    def __call__(self) -> None:
        """One step."""
        if self._graph is None:
            self.capture()
        assert self._graph is not None
        self._graph.replay()
