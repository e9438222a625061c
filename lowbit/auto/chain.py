"""Seconds of one product of a decoded token, per linear, in one format: as it runs inside a compiled step.

lowbit/products.py times a library's kernel by itself, in its own best way; a search asks what a product costs in the
mode and base dtype that the mixed model will decode in. A real step reads every weight once, so a product's weights
come from memory and not from a cache. That is copied here: several linears of one shape, with weights of their own, are
multiplied one after the other, each waiting for the one before, compiled as one call under the mode that decodes.
Weights are random: no kernel looks at them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import backends, compilers, measure, process_state, regional
from lowbit.device import Device
from lowbit.formats import Format
from lowbit.formats.row import LINEARS
from lowbit.quantized import TORCH_DTYPES

BYTES = 512 * 2**20
"""Of 16-bit weights per shape: in 4 bits still more than any card's L2 cache (H200 50 MB, B200 126 MB)."""

COPIES = 8
"""Linears of one shape at most, as Inductor takes seconds for more: small ones stay in a cache, and decide nothing."""

ROUND_S = 0.01
ROUNDS = 5


def product_s(fmt: Format, dtype: str, mode: str, device: Device, config: Any) -> Mapping[str, float]:
    """Seconds of one product [1, K] × [N, K] by the linear's name, head included; each shape is measured once.

    A linear that the format does not name, as lm_head in most rows, is quantized too: recipes can.
    """
    times: dict[tuple[int, int], float] = {}
    found: dict[str, float] = {}
    for shape in backends.shapes(replace(fmt, targets=(*LINEARS, "lm_head")), config):
        key = shape.n, shape.k
        if key not in times:
            copies = 1 if shape.name == "lm_head" else copies_of(shape.n, shape.k, config.num_hidden_layers)
            times[key] = _chain_s(fmt, shape, copies, dtype, mode, device)
        found[shape.name] = times[key]
    return found


def copies_of(n: int, k: int, layers: int) -> int:
    """Linears that are multiplied in a row: no more than the model has."""
    return min(layers, COPIES, max(1, -(-BYTES // (2 * n * k))))


@torch.no_grad()
def _chain_s(fmt: Format, shape: backends.Shape, copies: int, dtype: str, mode: str, device: Device) -> float:
    chain = make_chain(fmt, shape, copies, TORCH_DTYPES[dtype], device)
    x = torch.randn(1, 1, shape.k, generator=torch.Generator().manual_seed(0)).to(device.torch, TORCH_DTYPES[dtype])
    nought = torch.zeros((), device=x.device, dtype=x.dtype)
    for tensor in (x, nought):
        torch._dynamo.mark_static_address(tensor)
    with process_state.preserved_state(), measure.cpu_threads(device):
        call = compiled(chain, mode, device, fmt.inductor)
        return time_call(lambda: call(x, nought), device) / copies


def compiled(chain: nn.ModuleList, mode: str, device: Device, inductor: Mapping[str, Any]) -> Callable[..., Tensor]:
    """``run_chain`` of x and nought, compiled and replayed as the mode's step is.

    ``regional`` on a GPU replays one CUDA graph of its own, so no call takes tensor subclasses apart.
    """
    row = compilers.find(mode)
    call = compilers.compile_call(run_chain, "default" if row.regional else mode, device, inductor)

    def run(x: Tensor, nought: Tensor) -> Tensor:
        return call(chain, x, nought)

    return regional.GraphedCall(run) if row.regional and device.kind == "cuda" else run


def make_chain(fmt: Format, shape: backends.Shape, copies: int, dtype: torch.dtype, device: Device) -> nn.ModuleList:
    """``copies`` modules, each with a quantized linear of this shape under its name in a Llama."""
    generator = torch.Generator(device.torch).manual_seed(0)
    chain = nn.ModuleList()
    for _ in range(copies):
        weight = torch.randn(shape.n, shape.k, generator=generator, device=device.torch, dtype=torch.float32) * 0.02
        linear = nn.Linear(shape.k, shape.n, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        chain.append(nn.ModuleDict({shape.name: linear}))
    backends.get(fmt.backend).quantize(chain, replace(fmt, targets=(shape.name,)), dtype)
    return chain.eval()


def run_chain(chain: Any, x: Tensor, nought: Tensor) -> Tensor:
    """Product after product, each of an x that waits for the one before: [1, 1, K], [] -> [1, 1, K].

    ``nought`` is 0, which the compiler must not know: Inductor folds ``product * 0`` to 0 and leaves the product out.
    """
    for owner in chain:
        for linear in owner.values():
            x = x + linear(x)[..., :1] * nought
    return x


def time_call(call: Callable[[], object], device: Device) -> float:
    """Seconds of a call: the least of a few rounds, as what disturbs only adds; after three that compile and record."""
    for _ in range(3):
        call()
    once = _rounds_s(call, 1, device)
    calls = max(1, round(ROUND_S / max(once, 1e-7)))
    return min(_rounds_s(call, calls, device) for _ in range(ROUNDS))


def _rounds_s(call: Callable[[], object], calls: int, device: Device) -> float:
    measure.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    measure.synchronize(device)
    return (time.perf_counter() - started) / calls
