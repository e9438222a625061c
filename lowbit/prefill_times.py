"""How long a prompt takes, for ``python -m lowbit step``: in bf16 by PyTorch, and in a low-bit format, by the model's
modules and by the native prefill, whole and in its parts. Lines as native_step prints them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit import compilers, generate
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.kernels.prefill import NativePrefill
from lowbit.kernels.recorded import Work
from lowbit.native_times import replayed_us
from lowbit.regional import GraphedCall

ROUNDS, REPLAYS = 7, 5
"""Timed prompts, of which the median counts; graph replays per timing of a part."""
REFERENCE = "bf16-torch"

Line = dict[str, Any]


def check(lengths: Sequence[int], config: Any) -> None:
    """Raise LowbitError for prompts that the model has no room for."""
    limit = config.max_position_embeddings - 1
    if lengths and max(lengths) > limit:
        raise LowbitError(f"--prefill: expected prompts of up to {limit} tokens for this model, got {max(lengths)}")


def prompt(tokens: int, config: Any, where: torch.device) -> Tensor:
    """[1, tokens], the same every time."""
    ids: Tensor = torch.arange(tokens, device=where).unsqueeze(0) * 7919 % config.vocab_size
    return ids


@torch.no_grad()
def milliseconds(where: torch.device, call: Callable[..., object], *args: Any) -> float:
    """Median ms of a call that has run twice before: once to warm up, once to be recorded."""

    def once() -> float:
        wait(where)
        started = time.perf_counter()
        call(*args)
        wait(where)
        return (time.perf_counter() - started) * 1e3

    once(), once()
    return round(statistics.median(once() for _ in range(ROUNDS)), 2)


def wait(where: torch.device) -> None:
    """For the device."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def reference(host: Any, here: Device, lengths: Sequence[int], compiled: bool) -> Iterator[Line]:
    """bf16-torch by length: eager, the same as a CUDA graph, and, if wished, compiled as reduce-overhead does."""
    model = host.build(here.torch, torch.bfloat16, lambda module: None)
    ways: dict[str, Callable[[Any], Any]] = {"eager_ms": lambda call: call, "graph_ms": GraphedCall}
    if compiled:
        ways["compiled_ms"] = lambda call: compilers.compile_call(call, "reduce-overhead", here, {})
    for tokens in lengths:
        ids = prompt(tokens, host.config, here.torch)
        line: Line = {"format": REFERENCE, "what": "prefill", "tokens": tokens}
        for name, compiler in ways.items():
            decoder = generate.Decoder(model, 1, tokens + 1, torch.bfloat16)
            decoder.compile_prefill(compiler)
            line[name] = milliseconds(here.torch, decoder.prefill, ids)
        yield line


def fastest(line: Line) -> float:
    """ms of the fastest way that a line names."""
    return float(min(value for name, value in line.items() if name.endswith("_ms")))


def of_format(
    model: Any, name: str, dtype: torch.dtype, where: torch.device, against: dict[int, float]
) -> Iterator[Line]:
    """A streamed model: its modules, the native prefill launched, and as a graph.

    ``against``: ms of the reference by length. ``times_bf16``: the fastest way over it. ``differ``: of ROUNDS replays,
    how many gave other logits, in any bit, than the launches one by one.
    """
    for tokens, reference_ms in against.items():
        ids = prompt(tokens, model.config, where)
        decoder = generate.Decoder(model, 1, tokens + 1, dtype)
        line: Line = {"format": name, "what": "prefill", "tokens": tokens}
        line["modules_ms"] = milliseconds(where, decoder.prefill, ids)
        decoder.run_natively(ids, name)
        native, step = decoder.native_prefill, decoder.native
        assert native is not None
        assert step is not None
        line["launched_ms"] = milliseconds(where, _launch, native, ids)
        first = step.logits.clone()
        line["graph_ms"] = milliseconds(where, native, ids)
        replays = [_logits(native, ids) for _ in range(ROUNDS)]
        line["differ"] = sum(not torch.equal(logits, first) for logits in replays)
        yield line | {"times_bf16": round(fastest(line) / reference_ms, 2)}
        _launch(native, ids)  # what a part reads, those before it leave
        for found in parts(native, tokens):
            yield {"format": name, "what": "part", "tokens": tokens} | found


def _launch(native: NativePrefill, ids: Tensor) -> None:
    """Without a graph: a length's first prompt has none."""
    native.forget()
    native(ids)


def _logits(native: NativePrefill, ids: Tensor) -> Tensor:
    native(ids)
    return native.step.logits.clone()


def parts(native: NativePrefill, tokens: int) -> Iterator[Line]:
    """Each sort of work by itself, all its calls of a prompt one behind the other in a graph, with its rate."""
    sorts: dict[str, list[Work]] = {}
    for work in native.plan(tokens):
        sorts.setdefault(f"{work.kind} {work.of}".strip(), []).append(work)
    for name, works in sorts.items():
        us = replayed_us([work.call for work in works], REPLAYS)
        moved, operations = sum(work.moved for work in works), sum(work.operations for work in works)
        line: Line = {"us": round(us / len(works), 2), "calls": len(works), "ms": round(us / 1e3, 3)}
        if moved:
            line["gb_s"] = round(moved / us / 1e3)
        if operations:
            line["tflop_s"] = round(operations / us / 1e6, 1)
        yield line | {"of": name}
