"""Compile modes, and the process-wide state that compiling and quantizing touch.

``preserved_state`` is put around every case: it gives Inductor's, Dynamo's and gemlite's settings back as they were.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from lowbit.backends import native
from lowbit.errors import LowbitError, unknown
from lowbit.formats import Format, Unmet, rows_of
from lowbit.quiet import quiet_import

if TYPE_CHECKING:
    from lowbit.device import Device

Fn = TypeVar("Fn", bound=Callable[..., Any])


@dataclass(frozen=True)
class Mode:
    """One way to run a decode step.

    ``inductor`` is the mode of torch.compile whose options are taken (None: not compiled). ``regional`` compiles the
    decoder layer once for all layers and leaves the rest eager. ``cuda_graph`` says that a GPU replays the whole step
    as CUDA graphs: Inductor's, or one of our own in ``regional``.
    """

    name: str
    inductor: str | None
    cuda_graph: bool = False
    regional: bool = False
    note: str = ""


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("eager", None, note="not compiled"),
        Mode("default", "default", note="whole step"),
        Mode("reduce-overhead", "reduce-overhead", cuda_graph=True, note="whole step, CUDA graphs"),
        Mode("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs", note="whole step, kernels searched"),
        Mode("max-autotune", "max-autotune", cuda_graph=True, note="whole step, kernels searched, CUDA graphs"),
        Mode("native", None, cuda_graph=True, note="lowbit's own kernels, one CUDA graph per token"),
        Mode("regional", "default", cuda_graph=True, regional=True, note="one layer compiled for all, one CUDA graph"),
    )
}


def find(mode: str) -> Mode:
    """The mode of this name. Raises LowbitError naming the known ones."""
    try:
        return MODES[mode]
    except KeyError:
        raise unknown("compile mode", mode, MODES) from None


def unmet(mode: str, device: Device, fmt: Format, rows: int | None = None) -> Unmet | None:
    """Why this mode can't run on this device with this format, at ``rows`` tokens per forward pass, or None."""
    row = find(mode)
    if row.name == "native" and device.kind != "cuda":
        return Unmet("capability", f"needs cuda (lowbit's own kernels), this is {device.kind}")
    if row.inductor is None:
        return None
    for own in (row for row in rows_of(fmt) if row.backend == "lowbit"):
        if reason := _uncompiled(mode, device, own):
            return Unmet("capability", reason)
    if device.kind == "cuda":
        waits = fmt.options.get("waits_for_host")
        if row.cuda_graph and waits:
            # Inductor would leave its CUDA graphs out with a log line, and measure the default mode under this name
            return Unmet("capability", f"{mode} needs CUDA graphs, which can't hold {waits}: it waits for the host")
        least = fmt.options.get("compiled_min_rows", 0)
        if rows is not None and rows < least:
            return Unmet("shape", f"its compiled product needs {least} tokens per forward pass, this case has {rows}")
        if device.capability is not None and device.capability < (7, 5):
            return Unmet("capability", f"torch.compile needs SM75 (Triton), this is {device.sm}")
        return None
    if os.environ.get("CXX") or any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        return None
    return Unmet("package", "torch.compile on a CPU needs a C++ compiler; install g++ or set CXX")


def _uncompiled(mode: str, device: Device, fmt: Format) -> str | None:
    """Why compiling our own rows' step is no way to run it here, or None."""
    if device.kind != "cuda":
        return f"{mode} needs cuda for lowbit's rows (their kernels in its graph), this is {device.kind}"
    if native.streamed(fmt.scheme, device.capability):
        return f"{mode} compiles no streamed weights, which {device.sm} has here: mode native decodes them"
    return None


def configure_caches(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Keep compiled kernels and tuned Triton configurations across runs, under ``~/.cache/lowbit``.

    Sets TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR and TRITON_CACHE_AUTOTUNING unless the user did; returns what
    stands. Call it before the first compile; child processes inherit it.
    """
    root = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        if variable in environ:
            continue
        try:
            (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            warnings.warn(f"can't keep compiled kernels in {root / name} ({error}); set {variable}", stacklevel=2)
            continue
        environ[variable] = str(root / name)
    environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_CACHE_AUTOTUNING")
    return {name: environ[name] for name in names if name in environ}


# -- process-wide state ------------------------------------------------------------------------------------------------


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


def _configs() -> list[Any]:
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
    configs = [(config, config.get_config_copy()) for config in _configs()]
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
        for config, saved in configs:
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


# -- counting ----------------------------------------------------------------------------------------------------------


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
    """How many graphs Dynamo has compiled since the last reset: 1 for a whole step, 1 for all ``regional`` layers."""
    import torch._dynamo.utils as dynamo

    return int(dynamo.counters["stats"]["unique_graphs"])


# -- compiling ---------------------------------------------------------------------------------------------------------


def import_compiler(mode: str) -> None:
    """Import what a case under ``mode`` would import at its start: Dynamo, and Inductor unless it is eager."""
    _configs()
    if find(mode).inductor is not None:
        quiet_import("torch._inductor.compile_fx")  # warns of torch's own deprecations


def compile_call(
    fn: Fn,
    mode: str,
    device: Device,
    inductor: Mapping[str, Any],
    layers: Sequence[nn.Module] = (),
) -> Fn:
    """``fn`` compiled under ``mode`` (the compile happens at its first call), or ``fn`` itself for eager.

    ``inductor`` are the format's flags; they hold for this compile only. Static shapes, no graph break allowed.
    ``regional`` needs ``layers``, the model's decoder layers, which ``fn`` must call with a static KV cache.
    Raises LowbitError for an unknown mode.
    """
    row = find(mode)
    if row.name == "native":
        from lowbit.regional import GraphedCall

        return cast(Fn, GraphedCall(fn))
    if row.inductor is None:
        return fn
    import_compiler(mode)
    options = {**torch._inductor.list_mode_options(row.inductor), **inductor}
    if row.regional:
        from lowbit.regional import compile_layers

        if not layers:
            raise LowbitError(
                "compile mode 'regional' expects the decoder layers (layers=model.model.layers), got none"
            )
        return compile_layers(fn, layers, options, graph=row.cuda_graph and device.kind == "cuda")
    compiled: Any = torch.compile(fn, backend="inductor", options=options, fullgraph=True, dynamic=False)
    return cast(Fn, compiled)
