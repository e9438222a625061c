"""One linear's product alone: microseconds and bytes per second of every library's kernel at a Llama's shapes.

A decode case says how fast a whole step is; this says where. The weights of one linear are made several times over, and
the calls go through them in turn, so that they come from memory and not from a cache, as they do in a model. On a GPU
the round is replayed as one CUDA graph, so that what is timed is the device and not Python.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lowbit import backends, compilers, process_state, truth
from lowbit.backends import NoTruth, Shape
from lowbit.backends.coverage import storage_bytes, tensors_of
from lowbit.ceilings import event_seconds, wall_seconds
from lowbit.contenders import Contender, RsrLinear
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import Format
from lowbit.graphs import recording
from lowbit.kernels.modules import NativeLinear, PackedModule
from lowbit.kernels.stream_product import StreamProduct
from lowbit.measure import cpu_threads, synchronize

BATCHES = (1, 2, 4, 8)
SPREAD_BYTES = 256 << 20
"""Of weights that a round goes through on a GPU: five times an H200's second-level cache."""
MAX_COPIES = 32
MAX_COMPILED = 8
"""Copies in a round that is compiled as one; Inductor takes seconds for more."""

Rounds = Callable[..., object]


@dataclass(frozen=True)
class Timing:
    """One product at one batch. ``us`` per call, the median; ``gb_s`` counts weight as stored, x and y, once each.

    ``cached``: all copies of the weight together fit a cache, so ``gb_s`` may exceed what memory gives. ``how``: ``CUDA
    graph``, ``eager``, ``compiled``. ``error``: the relative error against the product with the dequantized weight;
    None where the library does not give that back.
    """

    contender: str
    product: str
    n: int
    k: int
    batch: int
    us: float
    gb_s: float
    share: float
    weight_bytes: int
    copies: int
    cached: bool
    how: str
    kernel: str | None = None
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For pytest-benchmark's extra_info."""
        return asdict(self)


# -- one contender at one shape ----------------------------------------------------------------------------------------


class Prepared:
    """A contender's weights at one shape, several copies, on the device."""

    def __init__(self, contender: Contender, shape: Shape, device: Device) -> None:
        dtype_name = device.dtype_for(contender.format)
        if dtype_name is None:
            raise LowbitError(f"{contender.id} needs one of {', '.join(contender.format.dtypes)} on {device.name}")
        self.contender, self.shape, self.device = contender, shape, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype_name]
        self.format = replace(contender.format, targets=(shape.name,))
        self.compiled = device.kind == "cuda" and self.format.backend == "torchao"
        self.modules = [self._make(0)]
        self.weight_bytes = _weight_bytes(self.modules[0])
        if device.kind == "cuda":
            most = MAX_COMPILED if self.compiled else MAX_COPIES
            for seed in range(1, min(most, -(-SPREAD_BYTES // self.weight_bytes))):
                self.modules.append(self._make(seed))

    def _make(self, seed: int) -> nn.Module:
        generator = torch.Generator(self.device.torch).manual_seed(seed)
        where: dict[str, Any] = {"dtype": self.dtype, "device": self.device.torch}
        linear: nn.Linear = skip_init(nn.Linear, self.shape.k, self.shape.n, bias=False, **where)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            linear.weight.normal_(0, 0.02, generator=generator)
            return self.contender.make(linear.requires_grad_(False), self.format, self.dtype).eval()

    def x(self, batch: int) -> Tensor:
        """[batch, k], the same numbers every time."""
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, self.shape.k, generator=generator).to(self.device.torch, self.dtype)

    def round(self, batch: int) -> Callable[[], object]:
        """All copies' products with one x; of the decode kernels nothing but the kernel."""
        x = self.x(batch)
        calls = [module.launch if isinstance(module, StreamProduct) else module for module in self.modules]

        def run() -> list[Tensor]:
            return [call(x) for call in calls]

        if not self.compiled:
            return run
        flags = dict(self.format.inductor) | (dict(self.format.cuda_matmul_inductor) if batch > 1 else {})
        return compilers.compile_call(run, "default", self.device, flags)

    @torch.no_grad()
    def error(self, batch: int) -> float | None:
        """||y - ref|| / ||ref|| of the first copy; None if its library gives the weight back in no way."""
        module, x = self.modules[0], self.x(batch)
        weight = _dequantized(module, self.format)
        if weight is None or self.format.activation_bits < 16:
            return None
        ref = truth.product(weight.to(x.device), x)
        return float((module(x).double() - ref).norm() / ref.norm())


def _dequantized(module: nn.Module, fmt: Format) -> Tensor | None:
    if isinstance(module, RsrLinear):
        return module.weight
    backend: Any = backends.get(fmt.backend)
    try:
        return backend.dequantize(module) if hasattr(backend, "dequantize") else None
    except NoTruth:
        return None


def _weight_bytes(module: nn.Module) -> int:
    if isinstance(module, PackedModule):
        return module.packed.nbytes
    return module.nbytes if isinstance(module, RsrLinear | StreamProduct) else storage_bytes(tensors_of(module))


def measure(
    contender: Contender, shape: Shape, device: Device, read_gb_s: float, rounds: Rounds | None = None
) -> list[Timing]:
    """The contender's times at every batch, each product checked before it is timed.

    ``read_gb_s`` is the read bandwidth that ``share`` is taken of. ``rounds`` (pytest-benchmark's pedantic) is
    given the round of batch 1 too. Raises LowbitError if a product is wrong.
    """
    with torch.no_grad(), process_state.preserved_state(), cpu_threads(device):
        prepared = Prepared(contender, shape, device)
        found = [_measure(prepared, batch, read_gb_s) for batch in BATCHES]
        if rounds is not None:
            call = prepared.round(BATCHES[0])

            def target() -> None:
                call()
                synchronize(device)

            rounds(target, rounds=5, warmup_rounds=1)
    return found


def _measure(prepared: Prepared, batch: int, read_gb_s: float) -> Timing:
    contender, shape = prepared.contender, prepared.shape
    error = prepared.error(batch)
    bound = float(prepared.format.options.get("kernel_bound", truth.BOUNDS[prepared.dtype]))
    if error is not None and not error <= bound:
        raise LowbitError(
            f"{contender.id} at {shape.name} [{shape.n}, {shape.k}], batch {batch}: expected a relative error of at "
            f"most {bound:.3g} against its own dequantized weight, got {error:.3g}: the kernel is wrong here"
        )
    copies = len(prepared.modules)
    seconds, how = _seconds(prepared, prepared.round(batch))
    moved = prepared.weight_bytes + batch * (shape.n + shape.k) * prepared.dtype.itemsize
    gb_s = moved * copies / seconds / 1e9
    module = prepared.modules[0]
    return Timing(
        *(contender.id, shape.name, shape.n, shape.k, batch),
        us=seconds / copies * 1e6,
        gb_s=gb_s,
        share=gb_s / read_gb_s,
        weight_bytes=prepared.weight_bytes,
        copies=copies,
        cached=prepared.weight_bytes * copies < CACHE_BYTES,
        how=how,
        kernel=_kernel(module, prepared, batch),
        error=error,
    )


CACHE_BYTES = 64 << 20
"""What a last-level cache may hold: 50 MiB on an H200, 32 to 60 MiB on servers' CPUs."""


def _kernel(module: nn.Module, prepared: Prepared, batch: int) -> str | None:
    if isinstance(module, StreamProduct):
        return "decode kernel"
    if not isinstance(module, NativeLinear):
        return None
    backend: Any = backends.get(prepared.format.backend)
    return str(backend.kernels(module, prepared.dtype, batch)).rpartition(" (")[0]


def _seconds(prepared: Prepared, call: Callable[[], object]) -> tuple[float, str]:
    """Median seconds of a round, and how it was run."""
    how = "compiled" if prepared.compiled else "eager"
    if prepared.device.kind != "cuda":
        call()
        return _median(lambda: wall_seconds(call)), how
    if "waits_for_host" not in prepared.format.options:  # what waits for the host, no graph can hold
        call, how = _captured(call), f"{how}, CUDA graph" if prepared.compiled else "CUDA graph"
    return _median(lambda: event_seconds(call)), how


def _median(sample: Callable[[], float], passes: int = 20, budget_s: float = 0.2) -> float:
    times: list[float] = []
    while len(times) < 3 or (len(times) < passes and sum(times) < budget_s):
        times.append(sample())
    return statistics.median(times)


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels tune themselves and compile in these
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with recording(graph):
        call()
    return graph.replay
