"""CUDA graphs that are recorded while Python collects no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, **how: Any) -> Iterator[None]:
    """As ``torch.cuda.graph(graph, **how)``, with the garbage collector off meanwhile.

    A graph that nobody holds any more but a cycle of Python objects ends when that is collected, at any allocation; its
    end inside another's recording breaks that one off (CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, on an H200 with torch
    2.11). A second decoder, made after the first was dropped, is enough.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **how):
            yield
    finally:
        if collected:
            gc.enable()
