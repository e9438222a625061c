"""What each kernel of a native decode step takes by itself, on the GPU that the step runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lowbit import backends
from lowbit.ceilings import event_seconds
from lowbit.formats import Format
from lowbit.graphs import recording
from lowbit.kernels import batch, runner

POSITION, REPLAYS = 128, 20
"""Where in the cache the step stands, and graph replays per timing. The head's kernel counts positions on: a cache
must reach REPLAYS + 1 beyond."""

LINEARS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "head": ("lm_head",),
}
"""The linears of each product kernel."""


def operations(step: Any, model: Any) -> dict[str, tuple[int, float, float]]:
    """Each kind of kernel by itself, all its calls of a token one behind the other in a graph: calls, µs per call and
    GB/s of weights (0: it reads none)."""
    names = {kernel: name for made in (runner.PRODUCTS, batch.PRODUCTS) for name, kernel in made.items()}
    read = _bytes_read(model)
    found = {}
    for kernel in dict.fromkeys(one.kernel for one in step.plan):
        calls = [one for one in step.plan if one.kernel == kernel]
        us = _time([one.launch for one in calls], step) / len(calls)
        name = names.get(kernel, kernel.split("_kernel")[0])
        found[name] = len(calls), us, read.get(name, 0) / len(calls) / us / 1e3
    return found


def product_s(found: Mapping[str, tuple[int, float, float]], fmt: Format, config: Any) -> dict[str, float]:
    """Seconds per linear, by its name, of what ``operations`` found; a shared kernel's are split by rows."""
    rows = {shape.name: shape.n for shape in backends.shapes(fmt, config)}
    return {
        name: found[kernel][1] * 1e-6 * rows[name] / sum(rows[other] for other in names)
        for kernel, names in LINEARS.items()
        for name in names
    }


def _bytes_read(model: Any) -> dict[str, int]:
    """Of a whole token, by product: the stream of its first linear is that of all."""
    products = {linears[0]: name for name, linears in LINEARS.items()}
    found = dict.fromkeys(LINEARS, 0)
    for path, module in model.named_modules():
        name = products.get(path.rpartition(".")[2])
        if name is not None:
            found[name] += module.part.stream.data.numel()
    return found


def attention_us(step: Any, context: int) -> float:
    """µs per call of attention where the cache holds ``context`` positions, all calls of a token in one graph."""
    calls = [one.launch for one in step.plan if one.kernel.startswith("attention")]
    return _time(calls, step, context) / len(calls)


def _time(calls: list[Callable[[], None]], step: Any, position: int = POSITION) -> float:
    """µs of all calls, in one graph."""
    step.position.fill_(position)
    return replayed_us(calls, REPLAYS)


@torch.no_grad()
def replayed_us(calls: Sequence[Callable[[], object]], replays: int) -> float:
    """µs of all calls together, in one graph that is replayed so often."""
    graph = torch.cuda.CUDAGraph()
    with recording(graph):
        for call in calls:
            call()
    graph.replay()

    def run() -> None:
        for _ in range(replays):
            graph.replay()

    return event_seconds(run) * 1e6 / replays
