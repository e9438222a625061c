"""A profile's events -> how long each kernel took, how often it ran, and what it read where that can be said.

Pure: it reads the events of ``torch.profiler`` by their attributes alone. On a GPU a kernel is what the card ran
(copies and memsets too); on a CPU it is an operator's own time, or a C++ kernel that Inductor wrote.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINEAR = "lowbit.linear:"
"""Begins the name of a mark around a linear's forward; the bytes of its weights follow."""

OPERATOR = re.compile(r"::|(^|_)cpp_")
"""Names of CPU events that do work; the others are Dynamo's and the profiler's own brackets."""

TRITON = re.compile(r"async_compile\.triton\('(\w+)'")
BYTES = re.compile(r"'kernel_num_gb': ([\d.e+-]+)")


@dataclass
class Kernel:
    """All calls of one kernel in a profile: microseconds, count.

    ``read_bytes`` over ``read_us`` are what is known of its reading, see ``longest``; None where nothing is.
    """

    name: str
    us: float = 0.0
    calls: int = 0
    read_bytes: float | None = None
    read_us: float = 0.0

    @property
    def gb_s(self) -> float | None:
        """10^9 bytes per second, over the calls whose bytes are known."""
        return self.read_bytes / self.read_us / 1e3 if self.read_bytes is not None and self.read_us else None

    def read(self, size: float, us: float) -> None:
        self.read_bytes, self.read_us = (self.read_bytes or 0.0) + size, self.read_us + us


@dataclass
class _Mark:
    """One forward of a linear: its kernels, as (name, µs)."""

    size: float
    parts: list[tuple[str, float]] = field(default_factory=list)


def longest(events: Iterable[Any], kind: str, triton: Mapping[str, float]) -> list[Kernel]:
    """Every kernel of a profile, the longest first. ``kind`` is "cuda" or "cpu"; ``triton`` the bytes per call by name.

    Bytes are known of two sorts. A Triton kernel of Inductor's: its inputs and outputs, each once, as Inductor counts
    them. The longest kernel of a marked linear's forward: the linear's weights, over the time of all kernels of that
    forward, so that a pass that dequantizes first is not left out.
    """
    kernels: dict[str, Kernel] = {}
    marks: dict[int, _Mark] = {}
    for event in events:
        if kind == "cpu":
            work = [(event.name, event.self_cpu_time_total)] if _is_operator(event) else []
            of_linear = work
        elif _on_card(event):
            work, of_linear = ([] if event.is_user_annotation else [(event.name, event.time_range.elapsed_us())]), []
        else:
            work, of_linear = [], [(kernel.name, kernel.duration) for kernel in event.kernels]
        for name, us in work:
            kernel = kernels.setdefault(name, Kernel(name))
            kernel.us, kernel.calls = kernel.us + us, kernel.calls + 1
        if of_linear:
            _attribute(event, of_linear, marks)
    _count_linears(kernels, marks.values())
    for name, size in triton.items():
        if name in kernels:
            kernels[name].read(size * kernels[name].calls, kernels[name].us)
    return sorted(kernels.values(), key=lambda kernel: -kernel.us)


def _count_linears(kernels: Mapping[str, Kernel], marks: Collection[_Mark]) -> None:
    inside: dict[str, float] = {}
    for name, us in (part for mark in marks for part in mark.parts):
        inside[name] = inside.get(name, 0.0) + us
    for mark in marks:  # by its time in all of them: in a single one a hiccup could make a view the longest
        name = max((name for name, _ in mark.parts), key=inside.__getitem__)
        if name in kernels:
            kernels[name].read(mark.size, sum(us for _, us in mark.parts))


def _is_operator(event: Any) -> bool:
    return not event.is_user_annotation and not _on_card(event) and OPERATOR.search(event.name) is not None


def _on_card(event: Any) -> bool:
    return bool(event.device_type.name == "CUDA")


def _attribute(event: Any, work: list[tuple[str, float]], marks: dict[int, _Mark]) -> None:
    owner = event
    while owner is not None and not owner.name.startswith(LINEAR):
        owner = owner.cpu_parent
    if owner is not None and owner is not event:
        mark = marks.setdefault(owner.id, _Mark(float(owner.name.removeprefix(LINEAR))))
        mark.parts.extend(work)


def triton_bytes(folder: Path) -> dict[str, float]:
    """Bytes per call of the Triton kernels in an Inductor debug folder; a name with two figures is left out."""
    found: dict[str, set[float]] = {}
    for path in sorted(folder.rglob("output_code.py")):
        _, *rest = TRITON.split(path.read_text())
        for name, source in zip(rest[::2], rest[1::2], strict=True):
            size = BYTES.search(source)
            if size is not None:
                found.setdefault(name, set()).add(float(size[1]) * 1e9)
    return {name: sizes.pop() for name, sizes in found.items() if len(sizes) == 1}
