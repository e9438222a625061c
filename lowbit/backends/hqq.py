"""HQQ: half-quadratic quantization (no calibration data), its own linear or another library's kernel behind it.

hqq falls back to its PyTorch path without an error: where a kernel's package is missing, where it can't convert a
layer, and where ``set_backend`` gets one that is not built. Here each of these is an error that names the layer. Its
kernel is a setting of the process (``HQQLinear.set_backend``); here it belongs to the module's class, so nothing has to
be restored.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.backends import NoTruth, Target, gemlite, indivisible, minimum_sm, targets
from lowbit.backends.torchao import unpacking
from lowbit.errors import LowbitError, unknown
from lowbit.formats import Format, Unmet
from lowbit.quiet import captured_output, quiet_import

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("hqq",)

OWN = {"pytorch": "PYTORCH", "pytorch_compile": "PYTORCH_COMPILE", "aten": "ATEN"}
"""Scheme → hqq.core.quantize.HQQBackend."""

CONVERSIONS = {
    "gemlite": ("hqq.backends.gemlite", "patch_hqq_to_gemlite", "GemLiteLinearTriton"),
    "torchao_int4": ("hqq.backends.torchao", "patch_hqq_to_aoint4", "HQQLinearTorchWeightOnlynt4"),
    "bitblas": ("hqq.backends.bitblas", "patch_hqq_to_bitblas", "HQQLinearBitBlas"),
    "marlin": ("hqq.backends.marlin", "patch_hqq_to_marlin", "MarlinLinear"),
}
"""Scheme → module and function of hqq that convert a quantized linear, and the class it must become."""

NVRTC = "libnvrtc.so.12"


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """Compute capability by kernel, what hqq's conversions need, and K in multiples of gemlite's step."""
    match fmt.scheme:
        case "gemlite":
            return minimum_sm(device, (7, 5), "Triton") or indivisible(fmt, config, 32, "gemlite's step")
        case "torchao_int4":
            return minimum_sm(device, (8, 0), "tinygemm int4") or _version_read_short()
        case "bitblas":
            return minimum_sm(device, (7, 0), "bitblas") or _loads(NVRTC)
        case "marlin":
            return minimum_sm(device, (8, 0), "marlin")
    return None


def _version_read_short() -> Unmet | None:
    # hqq 0.2.8.post1, backends/torchao.py: float(torch.__version__[:3]) >= 2.5 decides how int4 is packed
    read = torch.__version__[:3]
    if float(read) >= 2.5:
        return None
    return Unmet(
        "package",
        f"hqq 0.2.8 takes torch {torch.__version__.split('+')[0]} for {read} (it reads three characters of the "
        "version) and packs int4 as torch did before 2.5, which this torch refuses; needs a later hqq",
    )


def _loads(library: str) -> Unmet | None:
    try:
        ctypes.CDLL(library)
    except OSError:
        return Unmet("package", f"bitblas needs {library} (CUDA 12), which can't be loaded here")
    return None


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Replace the target linears inside ``module``, quantized where they are.

    The search for each group's zero point takes up to 20 steps over the weight (Quantizer.optimize_weights), in fp16
    on a GPU. Raises LowbitError where hqq would fall back to another kernel than the row's.
    """
    if fmt.scheme not in OWN.keys() | CONVERSIONS.keys():
        raise unknown("hqq kernel", fmt.scheme, (*OWN, *CONVERSIONS))
    for target in targets(module, fmt):
        if fmt.scheme == "gemlite":
            gemlite.tune_by_graphs(target.linear.weight.device)
        if fmt.scheme in OWN:
            new = _make(_linear_class(fmt.scheme), target, fmt, dtype)
        else:
            new = _convert(target, fmt, dtype)
        target.replace(new)


def _make(kind: Any, target: Target, fmt: Format, dtype: torch.dtype) -> Any:
    core = quiet_import("hqq.core.quantize")
    bits = int(fmt.weight_bits) if float(fmt.weight_bits).is_integer() else fmt.weight_bits
    config = core.BaseQuantizeConfig(nbits=bits, group_size=fmt.group_size, axis=fmt.options.get("axis", 1))
    linear = target.linear
    return kind(linear, quant_config=config, compute_dtype=dtype, device=str(linear.weight.device))


@cache
def _linear_class(scheme: str) -> Any:
    """HQQLinear with one forward for good: hqq's own ``__init__`` would take the one that the process is set to."""
    core = quiet_import("hqq.core.quantize")
    if scheme == "aten" and not core.hqq_aten_is_available:
        raise LowbitError(
            "hqq's ATEN kernel was asked for, but hqq_aten can't be imported: hqq would run its PyTorch path instead; "
            "build hqq_aten from hqq's sources (hqq/kernels/setup_cuda.py)"
        )
    forward = getattr(core.HQQLinear, core.HQQBackend[OWN[scheme]].value)
    members = {"forward": forward, "set_backend": classmethod(lambda cls, backend: None)}
    return type(f"HQQLinear_{scheme}", (core.HQQLinear,), members)


def _convert(target: Target, fmt: Format, dtype: torch.dtype) -> nn.Module:
    source, function, expected = CONVERSIONS[fmt.scheme]
    patch = getattr(quiet_import(source), function)
    layer = _make(quiet_import("hqq.core.quantize").HQQLinear, target, fmt, dtype)
    if fmt.group_size is None:
        layer.meta["group_size"] = None  # hqq writes K in its place, and then takes the row for a grouped one
    with captured_output() as output:
        new: nn.Module = patch(layer, None)
        said = output().strip()
    if type(new).__name__ != expected:
        raise LowbitError(
            f"{fmt.id}: hqq left {target.name} {list(layer.meta['shape'])} on its PyTorch path: expected a {expected}, "
            f"got a {type(new).__name__}{f' ({said})' if said else ''}"
        )
    return new


def is_quantized(module: nn.Module) -> bool:
    """True for hqq's linear, or the kernel it was converted to, with packed weights in it. By name: no import."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    packed = {"HQQLinear": "W_q", "GemLiteLinearTriton": "W_q", "HQQLinearTorchWeightOnlynt4": "weight_int4pack"}
    packed |= {"HQQLinearBitBlas": "W_q", "MarlinLinear": "Wq_packed"}
    tensors = [getattr(module, name, None) for kind, name in packed.items() if kind in kinds]
    return any(isinstance(tensor, Tensor) and tensor.numel() > 0 for tensor in tensors)


def dequantize(module: Any) -> Tensor:
    """The weight that the products of ``module`` are taken with, [out, in] fp32.

    A converted module's is read from what its library packed. Raises NoTruth for bitblas and marlin: hqq has of the
    one what its kernel makes of an identity matrix, of the other nothing.
    """
    match kind := type(module).__name__:
        case "GemLiteLinearTriton":
            return gemlite.dequantize(module)
        case "HQQLinearTorchWeightOnlynt4":
            return unpacking.tinygemm_tiles(module.weight_int4pack, module.scales_and_zeros, module.shape)
        case "HQQLinearBitBlas" | "MarlinLinear":
            raise NoTruth(f"hqq's {kind} gives its weights back in no way that lowbit knows")
    weight: Tensor = module.dequantize()
    return weight.float()
