"""``--profile``: where a case's time and memory go, as files for other tools and as its longest kernels.

Per case a folder with ``trace.json.gz`` (chrome://tracing, Perfetto), ``memory.pickle`` (pytorch.org/memory_viz; GPU
only), ``inductor/`` (graphs, IR and generated code of each compile), ``trace/`` (what ``tlparse`` reads) and
``kernels.json``. A profiled run is slower and compiles anew: its figures are never kept, compared or accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.backends import coverage
from lowbit.cases import Case
from lowbit.device import Device
from lowbit.kernel_times import LINEAR, Kernel, longest, triton_bytes
from lowbit.record import Record

STEPS = 8
"""Decoded steps, or passes of a prefill, under the profiler: a trace of 8B's eager steps has 10 MB."""

SHOWN = 10
"""Kernels that go into the record; kernels.json has all."""

MEMORY_EVENTS = 200_000
"""Allocations and frees that the snapshot remembers, the newest."""

LINEARS = ("_proj", "lm_head")
"""How the names of a Llama's linears end, whatever library they are of."""


@dataclass
class Profiler:
    """Writes a folder per case under ``root``. One case at a time: ``recording`` around it, ``take`` inside."""

    device: Device
    root: Path

    def __post_init__(self) -> None:
        self._result: dict[str, Any] | None = None

    def folder(self, case: Case) -> Path:
        return self.root / re.sub(r"[^\w.-]+", "-", f"{case.kind}-{case.id}")

    @contextmanager
    def recording(self, case: Case, record: Record) -> Iterator[None]:
        """From before the case's first call: allocations and compiles. What ``take`` found goes into ``record.info``.

        To be used inside ``process_state.preserved_state``, which gives Inductor's settings back.
        """
        folder = self.folder(case)
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            if case.mode != "eager":
                stack.enter_context(_compile_artefacts(folder, self.device))
            if self.device.kind == "cuda":
                stack.enter_context(_memory_history(folder / "memory.pickle"))
            yield
        if self._result is not None:
            record.info["profile"], self._result = self._result, None

    def take(self, case: Case, model: nn.Module, call: Callable[[int], object], batch: int, steps: int = STEPS) -> None:
        """Profile ``call(steps)``, warm by now: decoded steps of ``batch`` tokens, or passes of a prefill."""
        folder, cuda = self.folder(case), self.device.kind == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
        with ExitStack() as stack:
            if case.mode == "eager":  # in a compiled step a hook would break the graph
                stack.enter_context(_named_linears(model))
            profile = stack.enter_context(torch.profiler.profile(activities=activities, acc_events=True))
            call(steps)
            if cuda:
                torch.cuda.synchronize(self.device.torch)
        profile.export_chrome_trace(str(folder / "trace.json.gz"))
        kernels = longest(profile.events(), "cuda" if cuda else "cpu", triton_bytes(folder / "inductor"))
        self._result = describe(kernels, folder, steps * (batch if case.kind == "decode" else 1))
        rows = [asdict(kernel) for kernel in kernels]
        (folder / "kernels.json").write_text(json.dumps({"case": case.name, **self._result, "kernels": rows}, indent=1))


def describe(kernels: list[Kernel], folder: Path, units: int) -> dict[str, Any]:
    """For a record's info: the longest kernels, times in µs per unit (a decoded token, or a whole prefill)."""
    return {
        "folder": str(folder),
        "units": units,
        "kernels_us": sum(kernel.us for kernel in kernels) / units,
        "distinct": len(kernels),
        "kernels": [
            {"name": kernel.name, "calls": kernel.calls / units, "us": kernel.us / units, "gb_s": kernel.gb_s}
            for kernel in kernels[:SHOWN]
        ],
    }


@contextmanager
def _named_linears(model: nn.Module) -> Iterator[None]:
    """Mark, in the profile, the forward of each linear with the bytes of its weights."""
    handles: list[Any] = []
    open_marks: list[Any] = []

    def name(module: nn.Module, size: int) -> None:
        def enter(*_: object) -> None:
            mark: Any = torch.profiler.record_function(f"{LINEAR}{size}")
            mark.__enter__()
            open_marks.append(mark)

        def leave(*_: object) -> None:
            open_marks.pop().__exit__(None, None, None)

        handles.extend([module.register_forward_pre_hook(enter), module.register_forward_hook(leave)])

    for path, module in model.named_modules():
        if path.endswith(LINEARS):
            name(module, coverage.storage_bytes(coverage.tensors_of(module)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _compile_artefacts(folder: Path, device: Device) -> Iterator[None]:
    """Let Inductor write its debug folder, and Dynamo the log that tlparse reads, for the compiles inside.

    Inductor writes no debug folder for a graph that it finds in a cache (torch 2.13, _inductor/debug.py), so the caches
    of graphs are left out; those of kernels' binaries are not. ``benchmark_kernel`` lets it note each Triton kernel's
    bytes, ``enable_kernel_profile`` names the C++ kernels in the profile; neither changes what is computed.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._logging import _internal as logs

    settings: Any = inductor
    settings.trace.enabled, settings.trace.debug_dir = True, str(folder / "inductor")
    settings.fx_graph_cache = functorch.enable_autograd_cache = False
    if device.kind == "cuda":
        settings.benchmark_kernel = True
    else:
        settings.cpp.enable_kernel_profile = True
    handler = logs.LazyTraceHandler(str(folder / "trace"))
    handler.setFormatter(logs.TorchLogsFormatter(trace=True))
    logs.trace_log.addHandler(handler)
    try:
        yield
    finally:
        logs.trace_log.removeHandler(handler)
        handler.close()


@contextmanager
def _memory_history(path: Path) -> Iterator[None]:
    """The allocator's history of what happens inside, with Python's stacks, as a snapshot file; also of a failure."""
    memory: Any = torch.cuda.memory
    memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
    try:
        yield
    finally:
        memory._dump_snapshot(str(path))
        memory._record_memory_history(enabled=None)
