"""What each scheme of torchao 0.18 needs of device, packages and shapes; read from its source, without importing it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.backends import minimum_sm, shapes
from lowbit.formats import Format, Unmet

if TYPE_CHECKING:
    from lowbit.device import Device

Need = Callable[[Format, "Device", Any], Unmet | None]

INT4_GROUPS = (32, 64, 128, 256)
CPU_INT4_GROUPS = (32, 64, 128)
"""Int4OpaqueTensor.from_hp asserts it."""


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """Why this scheme can't run here, or None."""
    need = NEEDS.get(fmt.scheme)
    return need(fmt, device, config) if need else None


def multiples(fmt: Format, config: Any, of: int, what: str) -> Unmet | None:
    """Unmet naming every target whose N or K is not a multiple of ``of``."""
    bad = [f"{shape.name} [{shape.n}, {shape.k}]" for shape in shapes(fmt, config) if shape.n % of or shape.k % of]
    return Unmet("shape", f"{what} need N and K to be multiples of {of}: {', '.join(bad)}") if bad else None


def _int4(fmt: Format, device: Device, config: Any) -> Unmet | None:
    groups = CPU_INT4_GROUPS if device.kind == "cpu" else INT4_GROUPS
    if fmt.group_size not in groups:
        where = " on a CPU" if device.kind == "cpu" else ""
        return Unmet("shape", f"int4{where} takes group {', '.join(map(str, groups))}, not {fmt.group_size}")
    return minimum_sm(device, (8, 0), "tinygemm int4")


def also_needs(fmt: Format) -> str:
    """What the wheels of lowbit's extras don't bring, for ``backends.needs``."""
    if fmt.scheme in ("int4_mslk", "fp8_int4_mslk"):
        return "mslk >= 1.0"
    if NEEDS.get(fmt.scheme) is _gemlite:
        return "gemlite < 0.6 with torchao 0.18"
    return "torchao built with its CPU kernels" if fmt.scheme == "int8_dynamic_int4" else ""


def _mslk(fmt: Format, device: Device, config: Any) -> Unmet | None:
    if reason := minimum_sm(device, (9, 0), "mslk's int4"):
        return reason
    try:
        found = version("mslk") if find_spec("mslk") else ""
    except PackageNotFoundError:
        found = ""
    if not found or int(found.split(".")[0]) < 1:
        got = f"this is {found}" if found else "it is not installed"
        return Unmet("package", f"needs mslk >= 1.0.0, {got}; PyPI has only the placeholder 0.0.0")
    return None


def _da8w4(fmt: Format, device: Device, config: Any) -> Unmet | None:
    spec = find_spec("torchao")
    folders = spec.submodule_search_locations if spec else None
    # _C.abi3.so holds the CPU kernels (torchao/__init__.py loads every _C*.so); the wheels on PyPI come without it
    built = [file for folder in folders or () for file in Path(folder).glob("_C.*so")]
    if built:
        return multiples(fmt, config, 32, "A8W4 products on a CPU")
    return Unmet(
        "package",
        "needs torchao's da8w4_linear_cpu, which its wheel has not: build it from source with USE_CPU_KERNELS=1; "
        f"a8w4_intx_g{fmt.group_size}-torchao computes the same as a reference",
    )


def _fp8_weight_only(fmt: Format, device: Device, config: Any) -> Unmet | None:
    # Triton has e5m2 on every GPU, e4m3 from SM89 on (triton/backends/nvidia/compiler.py, supported_fp8_dtypes)
    return None if fmt.options.get("e5m2") else minimum_sm(device, (8, 9), "fp8 e4m3 in Triton")


def _fp8(fmt: Format, device: Device, config: Any) -> Unmet | None:
    # _fp8_mm_compat asks for multiples of 16: otherwise the layer stays in bf16 without a word
    if reason := minimum_sm(device, (8, 9), "fp8"):
        return reason
    if fmt.group_size is None:
        return multiples(fmt, config, 16, "fp8 products")
    return multiples(fmt, config, fmt.group_size, "fp8 blocks")


def _int8(fmt: Format, device: Device, config: Any) -> Unmet | None:
    # kernel/intmm.py: otherwise the product is done on the host, in int32
    return multiples(fmt, config, 8, "cuBLAS int8 products") if device.kind == "cuda" else None


def _native_mx(fmt: Format, device: Device, config: Any) -> Unmet | None:
    name = "MXFP8" if fmt.weight_bits == 8 else "MXFP4"
    return minimum_sm(device, (10, 0), f"{name} tensor cores") or multiples(fmt, config, 32, f"{name} products")


def _mx(fmt: Format, device: Device, config: Any) -> Unmet | None:
    return None if fmt.options.get("emulated") else _native_mx(fmt, device, config)


def _nvfp4(fmt: Format, device: Device, config: Any) -> Unmet | None:
    return multiples(fmt, config, 16, "NVFP4 weights")


def _nvfp4_dynamic(fmt: Format, device: Device, config: Any) -> Unmet | None:
    return minimum_sm(device, (10, 0), "NVFP4 tensor cores") or _nvfp4(fmt, device, config)


SCALER_BLOCK = 256
"""Blocks whose scales NF4 quantizes together (NF4WeightOnlyConfig)."""


def _nf4(fmt: Format, device: Device, config: Any) -> Unmet | None:
    of = SCALER_BLOCK * (fmt.group_size or 1)
    bad = [f"{shape.name} [{shape.n}, {shape.k}]" for shape in shapes(fmt, config) if shape.n * shape.k % of]
    return Unmet("shape", f"NF4 needs N * K to be a multiple of {of}: {', '.join(bad)}") if bad else None


def _source(package: str, path: str) -> Path | None:
    """A module's file, of a package that is looked for and not imported: gemlite's import asks for the GPU."""
    spec = find_spec(package)
    files = (Path(folder) / path for folder in (spec.submodule_search_locations if spec else None) or ())
    return next((file for file in files if file.is_file()), None)


@lru_cache
def _tensors(source: Path | None) -> int | None:
    """How many tensors ``get_tensor_args`` of gemlite's linear gives in this source, or is taken to give by it."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if source else ():
        match node:
            case ast.FunctionDef(name="get_tensor_args"):
                given = (one.value for one in ast.walk(node) if isinstance(one, ast.Return))
                return next((len(value.elts) for value in given if isinstance(value, ast.List | ast.Tuple)), None)
            case ast.Assign(
                targets=[ast.Tuple(elts=taken)], value=ast.Call(func=ast.Attribute(attr="get_tensor_args"))
            ):
                return len(taken)
    return None


def _tensors_differ() -> Unmet | None:
    """Unmet where torchao's tensor would unpack another number of tensors than gemlite's linear has.

    gemlite gives 3 up to 0.5.1.post1 and 4, with meta_scale, from 0.6.0 on (core.py of PyPI's 0.4.8 to 0.6.0.post2);
    torchao 0.18.0, then the newest, takes 3.
    """
    taken = _tensors(_source("torchao", "prototype/quantization/uintx/uintx_bit_packed_tensor.py"))
    given = _tensors(_source("gemlite", "core.py"))
    if taken is None or given is None or taken == given:
        return None
    needed = {3: "gemlite < 0.6", 4: "gemlite >= 0.6"}.get(taken, "another gemlite")
    return Unmet(
        "package",
        f"needs {needed}, this is {_version('gemlite')}: torchao {_version('torchao')} takes {taken} tensors of its "
        f"linear (get_tensor_args), it gives {given}",
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _gemlite(fmt: Format, device: Device, config: Any) -> Unmet | None:
    dynamic4 = fmt.activation_bits == 8 and fmt.weight_bits == 4  # gemlite 0.6 takes fp8 activations there
    needed, why = ((8, 9), "gemlite's fp8 activations") if dynamic4 else ((7, 5), "Triton")
    return minimum_sm(device, needed, why) or _tensors_differ() or multiples(fmt, config, 32, "gemlite products")


NEEDS: dict[str, Need] = {
    "int4_weight_only": _int4,
    "int4_mslk": _mslk,
    "fp8_int4_mslk": _mslk,
    "int8_dynamic_int4": _da8w4,
    "fp8_weight_only": _fp8_weight_only,
    "fp8_dynamic": _fp8,
    "fp8_static": _fp8,
    "int8_dynamic": _int8,
    "int8_static": _int8,
    "mx_dynamic": _mx,
    "nvfp4_dynamic": _nvfp4_dynamic,
    "nvfp4_weight_only": _nvfp4,
    "nf4_weight_only": _nf4,
    "uintx_weight_only": _gemlite,
    "int8_dynamic_uintx": _gemlite,
}
"""By scheme; the others run anywhere."""
