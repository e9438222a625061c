"""The ``regional`` compile mode: one decoder layer is compiled and serves them all, a quantized lm_head is compiled
beside it; the rest of the step stays eager.

A whole-step compile traces every layer: 32 times the same code. Dynamo would reuse one layer's code for the others but
for three things that tell layers apart, each of which costs a recompile per layer: the integer ``layer_idx``, the
list of all layers' caches that it selects from, and the cache tensors' marks as static addresses, which are guarded by
identity. So each layer is called with a cache of one layer, whose tensors are unmarked aliases of its own, at index 0.

The head is one product. In 16 bits it is the same cuBLAS call either way, and stays eager. A quantized one dequantizes
its whole weight first in many libraries' eager path: torchao's int8 head of 128256 x 4096 cost an H200 1.4 ms a token
more than the 16-bit one (a16w4_g128_head8-recipe 200.3 tok/s, a16w4_g128-torchao 275.5: docs/runs, 22 November 2026).
So it is a region of its own, compiled with the layers' options: what it is in a step compiled whole. One on a kernel of
its library's (gemlite, bitsandbytes, lowbit) is compiled too: an opaque call of the same kernel, and no list of
libraries to keep true.

On a GPU an eager step between small compiled ones waits for Python, so the step is captured as one CUDA graph, whose
replay costs what ``reduce-overhead`` costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lowbit import backends
from lowbit.errors import LowbitError
from lowbit.graphs import recording

Fn = TypeVar("Fn", bound=Callable[..., Any])


class _LayerCaches:
    """A KV cache seen one layer at a time: transformers' own cache object, holding one layer."""

    def __init__(self) -> None:
        self._views: dict[tuple[int, int], tuple[Any, Any]] = {}

    def view(self, cache: Any, index: int) -> Any:
        """The cache of layer ``index`` alone; the same object every time, its tensors shared with ``cache``."""
        layer = cache.layers[index]
        source, view = self._views.get((id(cache), index), (None, None))
        if source is not layer:
            if not getattr(layer, "is_initialized", False):
                raise LowbitError(
                    "compile mode 'regional' expects a KV cache with memory, got one that is allocated at first use: "
                    "make it with generate.make_cache()"
                )
            alias = copy.copy(layer)
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    setattr(alias, name, value.detach())  # same storage, without the static-address mark
            view = copy.copy(cache)
            view.layers = [alias]
            self._views[id(cache), index] = (layer, view)
        return view


def _routes(layers: Sequence[Any], compiled: Callable[..., Any], caches: _LayerCaches) -> dict[nn.Module, Any]:
    """Each layer's ``forward`` through ``compiled``, as layer 0 of a cache of its own."""

    def route(layer: nn.Module, index: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            view = None if past_key_values is None else caches.view(past_key_values, index)
            return compiled(layer, hidden_states, view, **kwargs)

        return forward

    return {layer: route(layer, layer.self_attn.layer_idx) for layer in layers}


@contextmanager
def _patched(layers: Sequence[Any], forwards: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Modules with these ``forward`` while inside, and every layer as layer 0. A module may keep a ``forward`` of its
    own on the instance, as gemlite's do."""
    indices = [layer.self_attn.layer_idx for layer in layers]
    kept = {module: vars(module).get("forward") for module in forwards}
    try:
        for layer in layers:
            layer.self_attn.layer_idx = 0
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for layer, index in zip(layers, indices, strict=True):
            layer.self_attn.layer_idx = index
        for module, own in kept.items():
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def _is_plain(module: nn.Module) -> bool:
    """True for a linear that is what the unquantized rows leave: an nn.Linear with a floating-point parameter."""
    return backends.get("torch").is_quantized(module)


def _run_layer(layer: nn.Module, hidden_states: Tensor, cache: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, hidden_states, past_key_values=cache, **kwargs)


def compile_layers(
    fn: Fn, layers: Sequence[Any], options: Mapping[str, Any], *, graph: bool, head: nn.Module | None = None
) -> Fn:
    """``fn`` with its decoder ``layers`` run through one compiled layer, and its ``head`` compiled if it is quantized;
    nothing of it outlasts a call.

    ``options`` are Inductor's. With ``graph`` the whole of ``fn`` is captured as a CUDA graph at its second call.
    Without ``head`` the model's lm_head stays eager, whatever it is.
    """
    kinds = {type(layer) for layer in layers}
    if len(kinds) != 1:
        raise LowbitError(
            f"compile mode 'regional' expects layers of one class, got {sorted(k.__name__ for k in kinds)}"
        )
    forwards = _routes(layers, _compile(_run_layer, options), _LayerCaches())
    if head is not None and not _is_plain(head):
        forwards[head] = _compile(head.forward, options)

    def step(*args: Any) -> Any:
        with _patched(layers, forwards):
            return fn(*args)

    return cast(Fn, GraphedCall(step) if graph else step)


def _compile(call: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(
        call, backend="inductor", options=dict(options), fullgraph=True, dynamic=False
    )
    return compiled


class GraphedCall:
    """A function of tensors on one GPU, replayed as a CUDA graph from its second call on.

    The first call of a shape runs (and compiles, and lets kernels tune themselves), the second records and replays.
    Arguments marked as static addresses (``torch._dynamo.mark_static_address``) are read where they are; others are
    copied in. The result is overwritten by the next call.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._warm: set[tuple[object, ...]] = set()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: tuple[object, ...] = ()
        self._inputs: list[Tensor] = []
        self._output: Any = None

    def __call__(self, *args: Tensor) -> Any:
        shapes = tuple((arg.shape, arg.dtype) for arg in args)
        if shapes not in self._warm:
            self._warm.add(shapes)
            return self._fn(*args)
        key = (shapes, *(arg.data_ptr() for arg in args if _is_static(arg)))
        if self._graph is None or key != self._recorded:
            self._graph = self._record(args)
            self._recorded = key
        for mine, theirs in zip(self._inputs, args, strict=True):
            if mine is not theirs:
                mine.copy_(theirs)
        self._graph.replay()
        return self._output

    def _record(self, args: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        """Raises LowbitError where the function does what no CUDA graph can hold; the device stays usable."""
        self._inputs = [arg if _is_static(arg) else arg.clone() for arg in args]
        graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            with recording(graph, pool=pool, capture_error_mode="thread_local"):
                self._output = self._fn(*self._inputs)
        except Exception as error:
            _leave_capture(pool, stream)
            raise LowbitError(
                f"the step can't be recorded as one CUDA graph: {_first_cause(error)}; its warm-up call ran, so take "
                "mode eager, or reduce-overhead, which leaves out of its graphs what they can't hold"
            ) from error
        return graph


def _leave_capture(pool: Any, stream: torch.cuda.Stream) -> None:
    """After a failed capture: torch leaves its side stream current and the allocator filling the graph's pool.

    Raises what the device raises if it was more than the capture that failed.
    """
    torch.cuda.set_stream(stream)
    for give_back in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):  # torch did so itself, as some versions do
            give_back(stream.device_index, pool)
    torch.cuda.synchronize()


def _first_cause(error: BaseException) -> str:
    """The first line of what broke the capture, without "CUDA error", which would mean a lost device."""
    if "previous error during capture" in str(error) and error.__context__ is not None:  # the capture's end, told last
        error = error.__context__
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line.removeprefix('CUDA error: ')}"


def _is_static(tensor: Tensor) -> bool:
    return getattr(tensor, "_dynamo_static_input_type", None) is not None
