"""Which implementation runs an operation: GPU kernels register themselves here, the PyTorch reference is always there.

    register("linear", "nvrtc gemv", supports=lambda problem: …, impl=lambda x, packed, dtype: …)

The first registered kernel that supports a problem runs it. ``chosen`` says which one that is, ``used`` which ones
ran, so that a row can tell whether it was measured on a fast kernel or on the reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.errors import LowbitError, unknown
from lowbit.kernels.weights import Packed

OPERATIONS = ("linear", "dequantize", "embedding")
REFERENCE = "PyTorch reference"


class Problem(NamedTuple):
    """What a kernel is asked to do: a matrix [n, k] in ``format`` times ``rows`` vectors of ``dtype``.

    ``dtype`` is that of the output (and of x). ``rows`` is 0 for ``dequantize``. ``capability`` is None but on CUDA.
    """

    format: str
    n: int
    k: int
    rows: int
    dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None


Implementation = Callable[[Any, Packed, torch.dtype], Tensor]
"""(x [rows, k] or ids [rows] or None, the weight, dtype of the result) -> [rows, n] or [rows, k] or [n, k]."""


class Kernel(NamedTuple):
    name: str
    supports: Callable[[Problem], bool]
    impl: Implementation


_registered: dict[str, list[Kernel]] = {operation: [] for operation in OPERATIONS}
_used: Counter[tuple[str, str, str]] = Counter()
_forced: list[str] = []


def register(operation: str, name: str, supports: Callable[[Problem], bool], impl: Implementation) -> None:
    """Offer a kernel for an operation. ``supports`` must answer fast and without waiting for the device.

    Registering a name again replaces that kernel. Raises LowbitError on an unknown operation.
    """
    if operation not in _registered:
        raise unknown("operation", operation, OPERATIONS)
    kernels = _registered[operation]
    place = next((index for index, kernel in enumerate(kernels) if kernel.name == name), len(kernels))
    kernels[place : place + 1] = [Kernel(name, supports, impl)]


def unregister(operation: str, name: str) -> None:
    """Take a kernel back. Raises LowbitError if there is none of this name."""
    kernels = _registered[operation]
    if name not in (kernel.name for kernel in kernels):
        raise unknown(f"kernel for {operation}", name, [kernel.name for kernel in kernels])
    kernels[:] = [kernel for kernel in kernels if kernel.name != name]


@lru_cache(maxsize=16)
def _capability(index: int | None) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return major, minor


def problem(packed: Packed, rows: int, dtype: torch.dtype) -> Problem:
    """The problem of this weight on the device where it lies."""
    device = packed.codes.device
    capability = _capability(device.index) if device.type == "cuda" else None
    return Problem(packed.format, packed.n, packed.k, rows, dtype, device.type, capability)


def select(operation: str, asked: Problem) -> Kernel | None:
    """The kernel that runs this problem; None: the reference does. Raises LowbitError if a forced one can't."""
    wanted = _forced[-1] if _forced else None
    if wanted == REFERENCE:
        return None
    for kernel in _registered[operation]:
        if (wanted is None or kernel.name == wanted) and kernel.supports(asked):
            return kernel
    if wanted is not None:
        raise LowbitError(f"{wanted} was forced, but does not do {operation} for {asked}")
    return None


def chosen(operation: str, asked: Problem) -> str:
    """The name of what runs this problem."""
    kernel = select(operation, asked)
    return kernel.name if kernel else REFERENCE


def run(operation: str, asked: Problem, x: Tensor | None, packed: Packed, reference: Callable[[], Tensor]) -> Tensor:
    """Run a problem by the kernel that is chosen for it, and count that it ran."""
    kernel = select(operation, asked)
    _used[operation, packed.format, kernel.name if kernel else REFERENCE] += 1
    return kernel.impl(x, packed, asked.dtype) if kernel else reference()


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Run everything by this kernel, ``REFERENCE`` for none; a problem that it can't do is an error. Nests."""
    known = {kernel.name for kernels in _registered.values() for kernel in kernels} | {REFERENCE}
    if name not in known:
        raise unknown("kernel", name, known)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def used() -> dict[tuple[str, str, str], int]:
    """How often (operation, format, kernel) ran since ``forget_used``; a replayed CUDA graph counts nothing."""
    return dict(_used)


def forget_used() -> None:
    """Start counting anew."""
    _used.clear()
