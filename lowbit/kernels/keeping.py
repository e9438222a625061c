"""Where packed weights lie on a GPU: together, apart from what comes and goes while a model is quantized.

torch's allocator puts a tensor into any freed block that is large enough. Weights that are packed one by one would so
land in pieces of what the 16-bit weights before them have left, and each keeps the whole piece from the card: int4 of
the 8B shape then holds 5,926 MiB instead of 4,920 (measured on an H200, torch 2.11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_pool: ContextVar[Any] = ContextVar("pool", default=None)


@contextmanager
def kept_together(device: torch.device) -> Iterator[None]:
    """Inside, ``room`` and ``keep`` give all tensors one memory pool of their own. It ends with the last of them."""
    pool = None
    if device.type == "cuda":
        with torch.cuda.device(device):
            pool = torch.cuda.MemPool()
    token = _pool.set(pool)
    try:
        yield
    finally:
        _pool.reset(token)


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor in the pool of the ``kept_together`` around, on a GPU. In no pool elsewhere."""
    pool = _pool.get()
    if pool is None or device.type != "cuda":
        return torch.empty(shape, dtype=dtype, device=device)
    return _in_pool(pool, device, lambda: torch.empty(shape, dtype=dtype, device=device))


def keep(tensor: Tensor) -> Tensor:
    """The tensor in the pool of the ``kept_together`` around: a copy, on a GPU. Itself elsewhere."""
    pool = _pool.get()
    if pool is None or not tensor.is_cuda:
        return tensor
    return _in_pool(pool, tensor.device, tensor.clone)


def _in_pool(pool: Any, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """A tensor made in the pool. Where the card is full, once more after the free blocks outside the pool are the
    card's again: torch does that by itself everywhere but inside a pool (seen on an H200, torch 2.11: a head of
    502 MiB found no room beside 1.9 GiB of free blocks)."""
    try:
        with torch.cuda.use_mem_pool(pool, device):
            return make()
    except torch.OutOfMemoryError:
        pass  # its traceback holds frames: the second try is outside
    torch.cuda.empty_cache()
    with torch.cuda.use_mem_pool(pool, device):
        return make()
