"""Streams back to matrices: what the products with many tokens, and the proofs, multiply with."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.arguments import Unpack, fill
from lowbit.kernels.geometry import Geometry
from lowbit.kernels.launch import Module, compile_module
from lowbit.kernels.stream import TILE
from lowbit.kernels.stream_modules import StreamPart

_ANY_SHAPE = {"hidden": 1024, "inter": 1024, "heads": 8, "kv_heads": 8, "head_dim": 128, "eps": 1e-5}
"""The kernel that unpacks a stream depends on no model's shape, but its source wants one."""


@lru_cache(maxsize=32)
def _unpacker(format: str, ku: int, device: int) -> Module:
    macros = Geometry(format, **_ANY_SHAPE).macros()  # type: ignore[arg-type]
    return compile_module(("ptx", "common", "decode", "unpack"), (f"unpack_kernel<{ku}>",), macros, device)


def unpack(part: StreamPart, dtype: torch.dtype) -> Tensor:
    """The rows of a stream that one linear owns, dequantized: [rows, k] fp16 or bf16 on the stream's device."""
    out = torch.empty(part.rows, part.stream.k, dtype=dtype, device=part.stream.data.device)
    return unpack_into(part, out)


def unpack_into(part: StreamPart, out: Tensor) -> Tensor:
    """The same into ``out`` [rows, k], contiguous fp16 or bf16; one launch, nothing allocated. Returns ``out``."""
    stream = part.stream
    if out.dtype not in (torch.float16, torch.bfloat16):
        raise LowbitError(f"streams are dequantized to fp16 or bf16, not to {out.dtype}")
    if out.shape != (part.rows, stream.k) or not out.is_contiguous():
        raise LowbitError(
            f"expected a contiguous matrix [{part.rows}, {stream.k}] to dequantize to, got {list(out.shape)}"
        )
    argument = fill(
        Unpack,
        weights=stream.data,
        row_scale=stream.row_scale,
        out=out,
        row0=part.row0,
        rows=part.rows,
        k=stream.k,
        half=part.half,
        bf16_out=int(out.dtype is torch.bfloat16),
    )
    module = _unpacker(stream.format, stream.ku, stream.data.device.index or 0)
    tiles = -(-(part.row0 % TILE + part.rows) // (TILE // 2 if part.half else TILE))
    bits = 2 if stream.layout.bits == 3 else stream.layout.bits  # a thread for 16 bytes of the first plane
    threads = tiles * stream.k * TILE * bits // 8 // 16
    module.launch(f"unpack_kernel<{stream.ku}>", (-(-threads // 256), 1), 256, argument)
    return out
