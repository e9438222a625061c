"""Which errors of a library cost one case, and which the whole process."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent


def own_frames(error: BaseException, count: int = 5) -> list[str]:
    """Where in lowbit's files an error came by, innermost last: ``lowbit/truth.py:94 measure: ref = …``.

    The last ``count`` of them: what a library's message (out of memory) leaves open.
    """
    found = []
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(PACKAGE):
            found.append(f"{path.relative_to(PACKAGE.parent).as_posix()}:{frame.lineno} {frame.name}: {frame.line}")
    return found[-count:]


def is_device_fault(error: BaseException) -> bool:
    """True for an error after which nothing works in this process: a CUDA fault, not an out-of-memory."""
    text = str(error)
    return not is_out_of_memory(error) and any(
        word in text for word in ("CUDA error", "cudaError", "CUDA driver error", "Triton Error [CUDA]")
    )


def is_out_of_memory(error: BaseException) -> bool:
    """True where the device's or the host's memory did not do; torch has no class of its own for the host's."""
    texts = ("DefaultCPUAllocator: can't allocate", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)
