"""CUDA C++ compiled at first use by NVRTC, and kept on disk: no CUDA toolkit is needed.

NVRTC, its headers and cuda-bindings come with torch's own CUDA wheels. What is compiled is kept as a cubin under
``~/.cache/lowbit/kernels``, by the hash of source, options, target and NVRTC's version; a later process loads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError

SOURCES = Path(__file__).with_name("cuda")


def read_sources(*names: str) -> str:
    """Files of ``cuda/``, one after another: NVRTC takes one text."""
    return "\n".join((SOURCES / f"{name}.cu").read_text() for name in names)


@dataclass(frozen=True)
class Binary:
    """A compiled source: ``cubin``, the mangled name of every kernel asked for, and ptxas' report ("" if cached)."""

    cubin: bytes
    names: Mapping[str, str]
    log: str = ""

    def resources(self) -> dict[str, tuple[int, int]]:
        """Registers and spilled bytes of each kernel, by mangled name; empty when it came from the cache."""
        pattern = r"entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        return {name: (int(used), int(spilled)) for name, spilled, used in re.findall(pattern, self.log, re.DOTALL)}


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise LowbitError(
            f"lowbit's CUDA kernels are compiled by NVRTC through cuda-bindings, which can't be imported ({error}); "
            "CUDA builds of torch bring both; else: pip install cuda-bindings nvidia-cuda-nvrtc nvidia-cuda-runtime"
        ) from error
    return nvrtc


@cache
def _headers() -> str:
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found is None:
        raise LowbitError(
            "the headers of the CUDA runtime (cuda_fp16.h) are not there; CUDA builds of torch bring them; "
            "else: pip install nvidia-cuda-runtime"
        )
    return str(found)


def version() -> tuple[int, int]:
    """NVRTC's version. Raises LowbitError where there is none."""
    major, minor = checked(_nvrtc().nvrtcVersion(), "asking its version")
    return int(major), int(minor)


def available() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        version()
        _headers()
    except (LowbitError, RuntimeError) as error:  # cuda-bindings raises RuntimeError where the library is not found
        return str(error)
    return None


def checked(result: tuple[Any, ...], doing: str, who: str = "NVRTC") -> Any:
    """What a function of cuda-bindings gave behind its code. Raises LowbitError if the code is not success."""
    code, *values = result
    if int(code):
        raise LowbitError(f"{who} failed while {doing}: {code.name}")
    return values[0] if len(values) == 1 else values


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where cubins are kept."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "kernels"


def compile_source(
    source: str,
    kernels: Sequence[str],
    macros: Mapping[str, object],
    arch: str,
    *,
    folder: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Binary:
    """The CUDA C++ ``source`` for ``arch`` ("sm_90a"), with ``kernels`` instantiated (C++ name expressions).

    ``folder`` keeps the result; None compiles anew and gives ptxas' report. Raises LowbitError with the compiler's
    words.
    """
    options = [f"-D{name}={value}" for name, value in sorted(macros.items())] + ["--std=c++17", f"-arch={arch}"]
    parts = [source, *kernels, *options, ".".join(map(str, version()))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    if folder is not None and (kept := _read(folder / key)) is not None:
        return kept
    if progress is not None:
        progress(f"compiling lowbit's kernels for {arch}, once")
    binary = _compile(source, kernels, [*options, f"-I{_headers()}", "--ptxas-options=-v"])
    if folder is not None:
        _write(folder / key, binary)
    return binary


def _compile(source: str, kernels: Sequence[str], options: Sequence[str]) -> Binary:
    nvrtc = _nvrtc()
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"lowbit.cu", 0, [], []), "creating a program")
    try:
        for kernel in kernels:
            checked(nvrtc.nvrtcAddNameExpression(program, kernel.encode()), f"naming {kernel}")
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), "reading its log")
        checked(nvrtc.nvrtcGetProgramLog(program, log), "reading its log")
        report = log.decode(errors="replace").rstrip("\0 \n")
        if int(code):
            raise LowbitError(f"NVRTC could not compile lowbit's kernels with {' '.join(options)}:\n{report}")
        names = {
            kernel: checked(nvrtc.nvrtcGetLoweredName(program, kernel.encode()), f"finding {kernel}").decode()
            for kernel in kernels
        }
        cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), "reading the cubin")
        checked(nvrtc.nvrtcGetCUBIN(program, cubin), "reading the cubin")
        return Binary(cubin, names, report)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(path: Path) -> Binary | None:
    try:
        names = json.loads(path.with_suffix(".json").read_text())
        cubin = path.with_suffix(".cubin").read_bytes()
    except (FileNotFoundError, ValueError):
        return None  # not there, or a process died while writing: compiled again
    return Binary(cubin, names["kernels"]) if names["bytes"] == len(cubin) else None


def _write(path: Path, binary: Binary) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = json.dumps({"kernels": dict(binary.names), "bytes": len(binary.cubin)})
    for suffix, content in ((".cubin", binary.cubin), (".json", names.encode())):
        partial = path.with_suffix(f"{suffix}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path.with_suffix(suffix))
