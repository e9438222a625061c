"""One format on the device: built from the master, proven to be quantized, with what making it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit import attention, backends, measure, roofline
from lowbit.backends import coverage
from lowbit.device import MIB, Device
from lowbit.errors import LowbitError
from lowbit.formats import Format, Unmet
from lowbit.formats.row import KV_FORMATS, TABLES
from lowbit.hostmodel import HostModel
from lowbit.workloads import Workload

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Quantized:
    """One format made from the master: the model on the device and what making it took."""

    format: Format
    dtype: str
    model: LlamaForCausalLM
    coverage: coverage.Coverage
    quantize_s: float = 0.0
    quantize_peak_mib: float | None = None
    start_mib: float | None = None


def build(host: HostModel, fmt: Format, device: Device, tokens: Tensor | None = None) -> Quantized:
    """The model in this format on the device, from the untouched master, layer by layer; waits for the device.

    A format with ``calibration_windows`` needs ``tokens`` [windows, window] (lowbit.calibration): the whole
    model goes to the device in the base dtype, the backend's ``calibrate(model, fmt, tokens)`` leaves what it learns
    with the linears, and only then are they quantized.

    Raises LowbitError if the device has none of the format's dtypes or a calibrated one gets no tokens, CoverageError
    if fewer linears are quantized than the format says.
    """
    dtype = device.dtype_for(fmt)
    if dtype is None:
        raise LowbitError(f"{fmt.id} needs one of {', '.join(fmt.dtypes)}; {device.name} has none of them")
    backend: Any = backends.get(fmt.backend)

    def transform(module: torch.nn.Module) -> None:
        backend.quantize(module, fmt, TORCH_DTYPES[dtype])

    if fmt.calibration_windows:
        if tokens is None:
            raise LowbitError(f"{fmt.id} is calibrated: build() needs tokens, which lowbit.calibration gives")
        model = host.build(device.torch, TORCH_DTYPES[dtype])
        backend.calibrate(model, fmt, tokens)
        transform(model)
    else:
        tables, stored = [name for name in TABLES if name in fmt.targets], fmt.backend == "checkpoint"
        model = host.build(device.torch, TORCH_DTYPES[dtype], transform, tables=tables, packed=stored)
    if fmt.kv == "fp8_attn":
        attention.install(model)
    measure.synchronize(device)
    return Quantized(fmt, dtype, model, coverage.inspect(model, fmt))


def needed_mib(fmt: Format, config: Any, workload: Workload | None = None, scratch_mib: float = 0.0) -> float:
    """About what a case takes at least, in MiB: weights as stored, KV cache, and the larger of one layer yet to be
    quantized and ``scratch_mib``, what the case needs beside the finished model.

    A calibrated format has all of its layers there before the first is quantized.
    """
    needed = backends.estimate_mib(fmt, config) + max(_plain_mib(fmt, config), scratch_mib)
    if workload is not None:
        needed += kv_bytes_per_token(fmt, config) * workload.batch * workload.context_tokens / MIB
    return needed


def _plain_mib(fmt: Format, config: Any) -> float:
    """What of the layers is there in 16 bits while the format is made."""
    layers = config.num_hidden_layers if fmt.calibration_windows else int(fmt.quantized)
    mib: float = roofline.linear_parameters(config) / config.num_hidden_layers * layers * 2 / MIB
    return mib


def kv_bytes_per_token(fmt: Format, config: Any) -> float:
    """What one position of one sequence takes in the format's KV cache, scales included."""
    bits, extra = KV_FORMATS.get(fmt.kv, (16, 0))
    return roofline.kv_bytes_per_token(config, 1) * (bits + extra / roofline.head_dim(config)) / 8


def too_large(
    fmt: Format,
    config: Any,
    workload: Workload | None,
    device: Device,
    held_mib: float = 0.0,
    *,
    scratch_mib: float = 0.0,
) -> Unmet | None:
    """Why the case can't fit the device now, in exact figures, or None. ``held_mib`` are ours and freed before,
    ``scratch_mib`` is what scoring takes (0: the case is another)."""
    unmet = measure.memory_fits(device, needed_mib(fmt, config, workload, scratch_mib), held_mib)
    if unmet is None:
        return None
    weights = "quantized weights" if fmt.quantized else "weights"
    if scratch_mib > _plain_mib(fmt, config):
        parts = f"{weights} and scoring"
    else:
        parts = f"{weights}, KV cache and one 16-bit layer" if fmt.quantized else f"{weights} and KV cache"
    return Unmet(unmet.kind, f"{parts}: {unmet.reason}")
