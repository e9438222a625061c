"""The process-wide state that compiling and quantizing touch, and what Dynamo counted.

``preserved_state`` is put around every case: it gives Inductor's, Dynamo's and gemlite's settings back as they were.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class _Setting(NamedTuple):
    owner: Any
    name: str


def _flags() -> list[_Setting]:
    """Plain attributes that quantizers, compilers and users' code flip: read by getattr, restored by setattr."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    settings = [_Setting(cudnn, name) for name in ("enabled", "benchmark", "deterministic")]
    # fp32_precision stands for allow_tf32 since torch 2.9; reading the old name after the new was set is an error
    mkldnn: Any = torch.backends.mkldnn
    owners = (torch.backends, matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    settings += [_Setting(owner, "fp32_precision") for owner in owners]
    settings += [
        _Setting(matmul, name)
        for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    ]
    core, config, utils, quantizers = (
        sys.modules.get(f"gemlite.{name}")
        for name in ("core", "triton_kernels.config", "triton_kernels.utils", "quant_utils")
    )
    if core is not None:
        names = ("GEMLITE_TRITON_CONFIG_CACHE", "GEMLITE_ACC_DTYPE", "GEMLITE_USE_TMA", "GEMLITE_ENABLE_PTX_FP4_PACK")
        settings += [_Setting(core, name) for name in (*names, "GEMLITE_FAST_NVFP4")]
        settings.append(_Setting(core.GemLiteLinearTriton, "PACKING_BITWIDTH"))
    if config is not None:
        settings += [_Setting(config, name) for name in ("WARP_SPECIALIZE", "GEMLITE_FAST_GEMV_ACC")]
        settings += [_Setting(config.AUTOTUNE, name) for name in vars(config.AUTOTUNE) if name.isupper()]
        settings.append(_Setting(config.KERNEL_CACHE, "ENABLE"))
    if utils is not None:
        settings += [_Setting(utils, name) for name in ("GEMLITE_USE_NATIVE_ATOMIC_BFP16", "get_closest_m")]
    if quantizers is not None:
        settings.append(_Setting(quantizers, "GEMLITE_ENABLE_PTX_FP4_PACK"))  # set_ptx_fp4_pack sets core's and this
    return [setting for setting in settings if hasattr(setting.owner, setting.name)]


def configs() -> list[Any]:
    """Inductor's, Dynamo's and AOTAutograd's settings."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    return [torch._inductor.config, torch._dynamo.config, torch._functorch.config]


# Said by torch while it compiles other libraries' tensors and modules; nothing that a user of lowbit can mend.
_COMPILE_NOISE = (
    r".*does not implement _stable_hash_for_caching",
    r"bf16 and fp16 are mixed in the scheduler node",
)


@contextmanager
def preserved_state() -> Iterator[None]:
    """Give back, at the end, every process-wide setting that a case may have changed, and forget its compiled code.

    Covers Inductor's, Dynamo's and AOTAutograd's configs, default dtype and device, determinism, matmul and cudnn
    flags, and gemlite's settings if it is loaded. What gemlite's kernels have tuned stays, being a memory of
    measurements and no setting.
    """
    saved_configs = [(config, config.get_config_copy()) for config in configs()]
    flags = [(setting, _copied(getattr(*setting))) for setting in _flags()]
    dtype, precision = torch.get_default_dtype(), _matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    reset_counters()
    try:
        with warnings.catch_warnings():
            for message in _COMPILE_NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        torch._dynamo.reset()
        for config, saved in saved_configs:
            _restore_config(config, saved)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if precision is not None and _matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)  # before the flags, which it moves too
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        for setting, value in flags:
            if getattr(*setting) != value:
                setattr(*setting, value)


def _matmul_precision() -> str | None:
    """torch.get_float32_matmul_precision(); None after somebody set fp32_precision, when torch refuses to say."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _restore_config(config: Any, saved: Mapping[str, Any]) -> None:
    now = config.get_config_copy()
    for name, value in saved.items():
        if name in now and now[name] != value:
            setattr(config, name, value)


class Counters(NamedTuple):
    """Since the last reset. ``recompiles`` counts compiles of code that had been compiled before."""

    graph_breaks: int
    recompiles: int


def reset_counters() -> None:
    """Start counting graph breaks and recompiles anew, and forget compiled code."""
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    dynamo.clear_compilation_metrics()


def counters() -> Counters:
    """Graph breaks and recompiles since ``reset_counters`` (or the start of ``preserved_state``)."""
    import torch._dynamo.utils as dynamo

    recompiles = sum(1 for compiled in dynamo.get_compilation_metrics() if compiled.recompile_reason)
    return Counters(sum(dynamo.counters["graph_break"].values()), recompiles)


def cudagraph_skips() -> int:
    """How often, since the last reset, Inductor gave up its CUDA graphs (it only logs that): 0 or the mode is a lie."""
    import torch._dynamo.utils as dynamo

    return int(dynamo.counters["inductor"]["cudagraph_skips"])


def compiled_graphs() -> int:
    """How many graphs Dynamo has compiled since the last reset: 1 for a whole step; under ``regional`` 1 for
    all layers, and 1 for a quantized head."""
    import torch._dynamo.utils as dynamo

    return int(dynamo.counters["stats"]["unique_graphs"])


def compiled_anew() -> int:
    """How many graphs Inductor has compiled since the last reset, for they were not in its cache on disk."""
    import torch._dynamo.utils as dynamo

    counted = dynamo.counters["inductor"]
    return int(counted["fxgraph_cache_miss"] + counted["fxgraph_cache_bypass"])
