"""Which errors of a library cost one case, and which the whole process."""

from __future__ import annotations

import torch


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
