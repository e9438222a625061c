"""Compile modes: what each is, where it can run, and a call compiled under it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from lowbit import process_state
from lowbit.backends import native
from lowbit.errors import LowbitError, unknown
from lowbit.formats import Format, Unmet, head_row, rows_of
from lowbit.quiet import quiet_import

if TYPE_CHECKING:
    from lowbit.cases import Case
    from lowbit.device import Device

Fn = TypeVar("Fn", bound=Callable[..., Any])


@dataclass(frozen=True)
class Mode:
    """One way to run a decode step.

    ``inductor`` is the mode of torch.compile whose options are taken (None: not compiled). ``regional`` compiles the
    decoder layer once for all layers, and a quantized lm_head, and leaves the rest eager. ``cuda_graph`` says that a
    GPU replays the whole step as CUDA graphs: Inductor's, or one of our own in ``regional``.
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


def unmet(
    mode: str, device: Device, fmt: Format, rows: int | None = None, head_rows: int | None = None
) -> Unmet | None:
    """Why this mode can't run on this device with this format, or None: at ``rows`` tokens per forward pass, of which
    lm_head sees ``head_rows``."""
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
        if reason := _too_few(fmt, rows, head_rows):
            return Unmet("shape", reason)
        if device.capability is not None and device.capability < (7, 5):
            return Unmet("capability", f"torch.compile needs SM75 (Triton), this is {device.sm}")
        return None
    if lacks := fmt.options.get("cpu_compiler_lacks"):
        return Unmet("capability", f"{mode} needs cuda: on a CPU torch.compile lacks {lacks}")
    if os.environ.get("CXX") or any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        return None
    return Unmet("package", "torch.compile on a CPU needs a C++ compiler; install g++ or set CXX")


def case_unmet(case: Case, device: Device) -> Unmet | None:
    """``unmet`` of the case's mode, if it has one, with what its layers and its head see."""
    return None if case.mode is None else unmet(case.mode, device, case.format, case.rows, case.head_rows)


def _too_few(fmt: Format, rows: int | None, head_rows: int | None) -> str | None:
    """Why a compiled product can't take so few tokens, or None. That of ``regional``'s head neither: torchao's int8
    product waits for the host where it is eager, and the CUDA graph of the step can't hold that (docs/findings.md)."""
    least = fmt.options.get("compiled_min_rows", 0)
    if rows is not None and rows < least:
        return f"its compiled product needs {least} tokens per forward pass, this case has {rows}"
    head = head_row(fmt)
    if head is None or head_rows is None:
        return None
    least = head.options.get("compiled_min_rows", 0)
    if head_rows < least:
        return f"its compiled lm_head ({head.id}) needs {least} tokens per forward pass, this case gives it {head_rows}"
    return None


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


def import_compiler(mode: str) -> None:
    """Import what a case under ``mode`` would import at its start: Dynamo, and Inductor unless it is eager."""
    process_state.configs()
    if find(mode).inductor is not None:
        quiet_import("torch._inductor.compile_fx")  # warns of torch's own deprecations


def compile_call(
    fn: Fn,
    mode: str,
    device: Device,
    inductor: Mapping[str, Any],
    layers: Sequence[nn.Module] = (),
    head: nn.Module | None = None,
) -> Fn:
    """``fn`` compiled under ``mode`` (the compile happens at its first call), or ``fn`` itself for eager.

    ``inductor`` are the format's flags; they hold for this compile only. Static shapes, no graph break allowed.
    ``regional`` needs ``layers``, the model's decoder layers, which ``fn`` must call with a static KV cache, and also
    compiles ``head``, the model's lm_head, if that is quantized; the other modes compile all of ``fn`` without them.
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
        return compile_layers(fn, layers, options, graph=row.cuda_graph and device.kind == "cuda", head=head)
    compiled: Any = torch.compile(fn, backend="inductor", options=options, fullgraph=True, dynamic=False)
    return cast(Fn, compiled)
