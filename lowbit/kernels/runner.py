"""The decode step of a Llama at batch 1 as one CUDA graph of lowbit's own kernels (cuda/).

The runner reads the model's streams, its norms, its embedding table and a transformers StaticCache; it writes the
cache, the token and the position, so that a graph replay is a whole greedy step and nothing waits for the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.kernels import nvrtc
from lowbit.kernels.geometry import ATTENTION_THREADS, BLOCKS, MAX_SPLITS, Geometry
from lowbit.kernels.launch import Module
from lowbit.kernels.stream import TILE, Stream
from lowbit.kernels.stream_modules import StreamLinear, StreamPart

PRODUCTS = {
    "qkv": "product_kernel<HIDDEN, true, TO_ACT>",
    "o": "product_kernel<QDIM, false, ADD_RESIDUAL>",
    "gate_up": "product_kernel<HIDDEN, true, SILU_MUL>",
    "down": "product_kernel<INTER, false, ADD_RESIDUAL>",
    "head": "product_kernel<HIDDEN, true, TO_LOGITS>",
}
KERNELS = (*PRODUCTS.values(), "attention_kernel", "embed_kernel")


# -- launching ---------------------------------------------------------------------------------------------------------


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    # pointers and 32-bit integers, in the order of cuda/*.cu
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int}
    listed = [(field[2:], types[field[0]]) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


_Product = _structure(
    "Product",
    "p:weights p:row_scale p:x p:norm p:out p:best p:arrived p:token p:position p:history "
    "i:tiles i:rows i:ring i:batch",
)
_Embed = _structure("Embed", "p:table p:token p:x")
_Attention = _structure("Attention", "p:qkv p:keys p:values p:rope p:position p:partial p:arrived p:out i:length")
_Unpack = _structure("Unpack", "p:weights p:row_scale p:out i:row0 i:rows i:k i:half i:bf16_out")


def _fill(kind: type[ctypes.Structure], **values: Tensor | int | None) -> ctypes.Structure:
    return kind(**{name: v.data_ptr() if isinstance(v, Tensor) else v for name, v in values.items()})


@lru_cache(maxsize=32)
def load(shape: Geometry, device: int, progress: Callable[[str], None] | None = None) -> Module:
    """The kernels for this shape, compiled or from the cache, on this device."""
    major, minor = torch.cuda.get_device_capability(device)
    source = nvrtc.read_sources("ptx", "common", "product", "attention")
    with torch.cuda.device(device):
        binary = nvrtc.compile_source(
            source, KERNELS, shape.macros(), f"sm_{major}{minor}a", folder=nvrtc.cache_folder(), progress=progress
        )
        return Module(binary)


_ANY_SHAPE = {"hidden": 1024, "inter": 1024, "heads": 8, "kv_heads": 8, "head_dim": 128, "eps": 1e-5}
"""The kernel that unpacks a stream depends on no model's shape, but its source wants one."""


@lru_cache(maxsize=32)
def _unpacker(format: str, ku: int, device: int) -> Module:
    major, minor = torch.cuda.get_device_capability(device)
    source = nvrtc.read_sources("ptx", "common", "unpack")
    macros = Geometry(format, **_ANY_SHAPE).macros()  # type: ignore[arg-type]
    name, arch = f"unpack_kernel<{ku}>", f"sm_{major}{minor}a"
    with torch.cuda.device(device):
        return Module(nvrtc.compile_source(source, (name,), macros, arch, folder=nvrtc.cache_folder()))


def unpack(part: StreamPart, dtype: torch.dtype) -> Tensor:
    """The rows of a stream that one linear owns, dequantized: [rows, k] fp16 or bf16 on the stream's device."""
    stream = part.stream
    if dtype not in (torch.float16, torch.bfloat16):
        raise LowbitError(f"streams are dequantized to fp16 or bf16, not to {dtype}")
    out = torch.empty(part.rows, stream.k, dtype=dtype, device=stream.data.device)
    argument = _fill(
        _Unpack,
        weights=stream.data,
        row_scale=stream.row_scale,
        out=out,
        row0=part.row0,
        rows=part.rows,
        k=stream.k,
        half=part.half,
        bf16_out=int(dtype is torch.bfloat16),
    )
    module = _unpacker(stream.format, stream.ku, stream.data.device.index or 0)
    tiles = -(-(part.row0 % TILE + part.rows) // (TILE // 2 if part.half else TILE))
    threads = tiles * stream.k * TILE * stream.layout.bits // 8 // 16
    module.launch(f"unpack_kernel<{stream.ku}>", (-(-threads // 256), 1), 256, argument)
    return out


# -- the step ----------------------------------------------------------------------------------------------------------


def _stream_of(linear: nn.Module, where: str) -> Stream:
    if not isinstance(linear, StreamLinear):
        raise LowbitError(f"the native step needs streamed weights, but {where} is a {type(linear).__name__}")
    return linear.part.stream


@dataclass(eq=False)
class _Launch:
    kernel: str
    grid: tuple[int, int]
    threads: int
    argument: ctypes.Structure
    shared_bytes: int = 0
    overlap: bool = True


class NativeStep:
    """One greedy step: reads ``token`` [1, 1] and ``position`` [1] (int64 on the device), runs, writes both.

    ``cache`` is the StaticCache that the prefill filled, ``history`` [length] int64 gets the token of every position,
    ``logits`` [vocabulary] fp32 are the last step's. Calling it replays one CUDA graph; the first call captures it.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        token: Tensor,
        position: Tensor,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        format = _stream_of(model.lm_head, "lm_head").format
        self.shape = shape = Geometry.of(model.config, format)
        self.token, self.position = token, position
        device = token.device
        keys = cache.layers[0].keys
        if token.numel() != 1 or keys.shape[0] != 1:
            raise LowbitError(f"the native step decodes one sequence (batch 1), got a cache of batch {keys.shape[0]}")
        if keys.dtype != shape.dtype:
            raise LowbitError(f"the native step of {format} keeps keys and values in {shape.dtype}, got {keys.dtype}")
        self.length = keys.shape[2]
        self.module = load(shape, device.index or 0, progress)
        self._buffers(model, device)
        self._launches = list(self._plan(model, cache))
        self._graph: torch.cuda.CUDAGraph | None = None

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
        self.best, self.arrived = empty(1, torch.int64), empty(1 + shape.kv_heads, torch.int32)
        per_pass = ATTENTION_THREADS // 32 * (32 // (shape.head_dim // 16))
        self.splits = max(1, min(MAX_SPLITS, -(-self.length // per_pass)))
        self.partial = empty(self.splits * shape.heads * (shape.head_dim + 2), torch.float32)
        places = torch.arange(self.length, device=device).unsqueeze(0)
        cos, sin = model.model.rotary_emb(self.residual, places)  # [1, length, head_dim] fp32, llama3 scaling included
        half = shape.head_dim // 2
        self.rope = torch.stack([cos[0, :, :half], sin[0, :, :half]], -1).float().contiguous()

    def _plan(self, model: Any, cache: Any) -> Iterator[_Launch]:
        shape, body = self.shape, model.model
        table = body.embed_tokens.weight
        if table.dtype != shape.dtype:
            raise LowbitError(
                f"the native step of {shape.format} wants an embedding in {shape.dtype}, got {table.dtype}"
            )
        self._kept = [table, *(layer.keys for layer in cache.layers), *(layer.values for layer in cache.layers)]
        embed = _fill(_Embed, table=table, token=self.token, x=self.residual)
        yield _Launch("embed_kernel", (-(-shape.hidden // 256), 1), 256, embed, overlap=False)
        for index, layer in enumerate(body.layers):
            attention, mlp = layer.self_attn, layer.mlp
            where = f"layer {index}'s"
            yield self._product(
                "qkv", _stream_of(attention.q_proj, f"{where} q_proj"), self.residual, self.qkv, layer.input_layernorm
            )
            yield self._attention(cache.layers[index])
            yield self._product("o", _stream_of(attention.o_proj, f"{where} o_proj"), self.attended, self.residual)
            yield self._product(
                "gate_up",
                _stream_of(mlp.gate_proj, f"{where} gate_proj"),
                self.residual,
                self.activated,
                layer.post_attention_layernorm,
            )
            yield self._product("down", _stream_of(mlp.down_proj, f"{where} down_proj"), self.activated, self.residual)
        yield self._product("head", _stream_of(model.lm_head, "lm_head"), self.residual, self.logits, body.norm)

    def _product(self, name: str, stream: Stream, x: Tensor, out: Tensor, norm: Any = None) -> _Launch:
        shape = self.shape
        if stream.format != shape.format:
            raise LowbitError(
                f"the native step runs one weight format, {shape.format}, but {name} is {stream.format}: mixed recipes "
                "run in another mode"
            )
        weight = None if norm is None else norm.weight
        if weight is not None:
            if weight.dtype != shape.dtype:
                raise LowbitError(f"the native step of {shape.format} wants norms in {shape.dtype}, got {weight.dtype}")
            self._kept.append(weight)
        ring, batch, shared = shape.shared(stream.k, stream.tiles)
        head = name == "head"
        argument = _fill(
            _Product,
            weights=stream.data,
            row_scale=stream.row_scale,
            x=x,
            norm=weight,
            out=out,
            best=self.best if head else None,
            arrived=self.arrived if head else None,
            token=self.token if head else None,
            position=self.position if head else None,
            history=self.history if head else None,
            tiles=stream.tiles,
            rows=stream.rows,
            ring=ring,
            batch=batch,
        )
        return _Launch(PRODUCTS[name], (min(BLOCKS, stream.tiles), 1), shape.threads, argument, shared)

    def _attention(self, layer: Any) -> _Launch:
        argument = _fill(
            _Attention,
            qkv=self.qkv,
            keys=layer.keys,
            values=layer.values,
            rope=self.rope,
            position=self.position,
            partial=self.partial,
            arrived=self.arrived[1:],
            out=self.attended,
            length=self.length,
        )
        return _Launch("attention_kernel", (self.shape.kv_heads, self.splits), ATTENTION_THREADS, argument)

    def launch(self) -> None:
        """The step's kernels, one by one, on the current stream."""
        for one in self._launches:
            self.module.launch(
                one.kernel, one.grid, one.threads, one.argument, shared_bytes=one.shared_bytes, overlap=one.overlap
            )

    def capture(self) -> None:
        """Record the step as a CUDA graph; the token, position and cache stay as they are."""
        for kernel in {one.kernel for one in self._launches}:
            self.module.function(kernel)  # loading is not allowed while a graph is captured
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.launch()

    def __call__(self) -> None:
        """One step."""
        if self._graph is None:
            self.capture()
        assert self._graph is not None
        self._graph.replay()
