"""gemlite: Triton kernels for packed weights, one module per linear. CUDA only: its import asks for the GPU.

Its products tune themselves at the first call for each (tokens, N, K), here on CUDA graphs: what is called before a
measurement or a graph capture must have the same number of tokens. It ships tuned configurations for some GPUs by name
(no H200 among them); ``compilers.configure_caches`` has Triton keep what is found here on disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.backends import indivisible, minimum_sm, targets
from lowbit.backends.gemlite._values import activations_of, weight_of
from lowbit.errors import LowbitError, unknown
from lowbit.formats import Format, Unmet
from lowbit.quiet import quiet_import

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("gemlite", "triton")

MIN_SIZE = 32  # GemLiteLinearTriton.MIN_SIZE: K must be a multiple

NVFP4_TRITON = (3, 8)
"""First Triton that lowers a product of NVFP4 weights, whose scales are e4m3, below SM100. Found by compiling
gemlite 0.6.0.post2's kernels for SM90 without a GPU: 3.6.0 and 3.7.0 end in "PassManager::run failed"
(TritonGPUAccelerateMatmul), 3.8.0 and 3.9.0 give PTX."""


WORD_BITS = 32
"""Of what gemlite packs integers into (core.py, PACKING_BITWIDTH)."""

WHOLE_WORDS = (0, 6, 0)
"""Last gemlite whose decode kernel was read for ``_groups_hold_words`` (0.6.0.post2)."""


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """SM89 for anything that holds e4m3, K in multiples of 32; NVFP4 needs SM100 or a Triton that emulates it; 1 bit
    needs groups of 64."""
    return _capability(fmt, device) or _groups_hold_words(fmt) or indivisible(fmt, config, MIN_SIZE, "gemlite's step")


def _groups_hold_words(fmt: Format) -> Unmet | None:
    """Two words of codes must fit into a group.

    ``gemv_revsplitK``, which multiplies up to 4 rows of packed weights, loads scales once for two steps along K, so its
    BLOCK_SIZE_K is half a group at most; and it unpacks whole words. Its pruner (gemv_revsplitK_kernels.py,
    kernel_config_pruner) leaves no configuration otherwise, and Triton's autotuner raises.
    """
    if "HQQ" not in fmt.scheme or fmt.group_size is None or fmt.weight_bits >= 8:
        return None
    version = release("gemlite")
    per_word = WORD_BITS // int(fmt.weight_bits)
    if fmt.group_size >= 2 * per_word or (version is not None and version > WHOLE_WORDS):
        return None
    return Unmet(
        "shape",
        f"needs groups of {2 * per_word}, this row's have {fmt.group_size}: up to 4 rows, gemlite up to 0.6.0.post2 "
        f"multiplies half a group at a time, and unpacks {per_word} weights of {fmt.weight_bits:g} bit at once",
    )


def _capability(fmt: Format, device: Device) -> Unmet | None:
    scheme = fmt.scheme
    if "FP8" in scheme or scheme in ("A16W8_MXFP", "A8W8_MXFP_dynamic", "A8W4_MXFP_dynamic"):
        return minimum_sm(device, (8, 9), "fp8")
    if "HQQ_INT_dynamic" in scheme:
        return minimum_sm(device, (8, 9), "fp8 activations")
    if "NVFP" in scheme:
        return minimum_sm(device, (8, 9), "fp8 scales") or _emulated_nvfp4(device)
    if "MXFP" in scheme:
        return minimum_sm(device, (8, 0), "bf16 products of fp4")
    return minimum_sm(device, (7, 5), "Triton")


def _emulated_nvfp4(device: Device) -> Unmet | None:
    if device.capability is None or device.capability >= (10, 0):
        return None
    version = release("triton")
    if version is None or version[:2] >= NVFP4_TRITON:
        return None
    needed, found = (".".join(map(str, numbers[:2])) for numbers in (NVFP4_TRITON, version))
    return Unmet("package", f"needs SM100 or Triton {needed} (NVFP4), this is {device.sm} with Triton {found}")


def also_needs(fmt: Format) -> str:
    """For ``backends.needs``: beside the packages."""
    return f"Triton {'.'.join(map(str, NVFP4_TRITON))} below SM100" if "NVFP" in fmt.scheme else ""


def release(package: str) -> tuple[int, ...] | None:
    """The numbers of an installed version (0.6.0.post2: 0, 6, 0), without importing it; None where there is none."""
    try:
        return tuple(int(part) for part in metadata.version(package).split(".")[:3] if part.isdigit())
    except metadata.PackageNotFoundError:
        return None


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Replace the target linears inside ``module`` by gemlite's, packed on the device where they are.

    ``Format.scheme`` is the name of a processor in gemlite.helper, ``options["processor"]`` further arguments of it.
    Those with HQQ in the name take hqq's own quantized linear (axis 1, ``group_size``; None: the whole row), the BitNet
    pair ternary codes and their scale; the others take the linear and drop its weight.
    """
    found = list(targets(module, fmt))
    if not found:
        return
    helper = quiet_import("gemlite.helper")
    if not hasattr(helper, fmt.scheme):
        raise unknown("gemlite processor", fmt.scheme, [name for name in dir(helper) if name.startswith("A")])
    _leave_blackwells_instructions_alone(found[0].linear.weight.device)
    tune_by_graphs(found[0].linear.weight.device)
    for target in found:
        weight = target.linear.weight
        if weight.dtype != dtype:
            raise LowbitError(f"{fmt.id} expects {target.name} in {dtype}, got {weight.dtype}")
        arguments = fmt.options.get("processor", {})
        processor = getattr(helper, fmt.scheme)(device=str(weight.device), dtype=dtype, **arguments)
        # its MX and NVFP quantizers are compiled for each shape; 224 eager calls are over before that
        with torch.compiler.set_stance("force_eager"):
            target.replace(_pack(processor, target.linear, fmt, dtype).to(weight.device))


def _leave_blackwells_instructions_alone(device: torch.device) -> None:
    """Undo what gemlite's import may have done: it has fp4 packed by an instruction of SM100 wherever the assembler
    knows it (core.auto_detect_ptx_fp4_pack), whatever the GPU is; ptxas then refuses the kernel."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (10, 0):
        quiet_import("gemlite.core").set_ptx_fp4_pack(False)


def tune_by_graphs(device: torch.device) -> None:
    """On a GPU, have gemlite's products tune themselves on CUDA graphs, by gemlite's own switch.

    It times single launches otherwise, and where the host takes longer for one than the GPU, it is the host that is
    timed: the same rows decode 197 or 243 tok/s then, by what was chosen (docs/findings.md).
    """
    if device.type == "cuda":
        _tune_by_graphs()


@cache
def _tune_by_graphs() -> None:
    """Once per process: it loads the products' modules anew, which forgets what they have tuned. They stay so, whatever
    ``process_state`` makes of gemlite's own flag; its quantizers of activations go on timing launches."""
    config = quiet_import("gemlite.triton_kernels.config")
    with warnings.catch_warnings(), _timed_in_order(quiet_import("triton.testing")):
        warnings.simplefilter("ignore", DeprecationWarning)  # Triton's, of the argument by which gemlite asks for it
        config.set_autotune({}, use_cuda_graph=True)  # {}: which candidates there are stays as it is


@contextmanager
def _timed_in_order(testing: Any) -> Iterator[None]:
    """Kernels that Triton's tuner wraps inside wait for the GPU before a candidate is timed.

    Triton up to 3.9 times graphs on a stream of its own that waits for no other. Its copies of x, of the weight and of
    gemv_revsplitK's output, which it puts back after each run, were then of memory as it was before: the call that
    tuned returned NaN (docs/findings.md). The timer is bound where a kernel is wrapped.
    """
    by_graphs = testing.do_bench_cudagraph

    def in_order(*arguments: Any, **options: Any) -> Any:
        torch.cuda.synchronize()
        return by_graphs(*arguments, **options)

    testing.do_bench_cudagraph = in_order
    try:
        yield
    finally:
        testing.do_bench_cudagraph = by_graphs


def _pack(processor: Any, linear: nn.Linear, fmt: Format, dtype: torch.dtype) -> Any:
    # by name: the MXFP processors have a from_hqqlinear too, inherited, which would make int4 of them
    if "HQQ" in fmt.scheme:
        return processor.from_hqqlinear(_hqq(linear, fmt, dtype))
    if "W158" in fmt.scheme:
        codes, scale = ternarize(linear.weight)
        return processor.from_weights(codes.to(dtype), scale)  # A16W158 leaves its scales on the host
    return processor.from_linear(linear, del_orig=True)


def _hqq(linear: nn.Linear, fmt: Format, dtype: torch.dtype) -> Any:
    hqq = quiet_import("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=int(fmt.weight_bits), group_size=fmt.group_size, axis=1)
    return hqq.HQQLinear(linear, quant_config=config, compute_dtype=dtype, device=str(linear.weight.device))


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in {-1, 0, 1}, fp32, and their one scale, the mean magnitude: ``weight ≈ codes * scale``.

    The absmean rule of BitNet b1.58 (arXiv 2402.17764, equations 1 to 3).
    """
    scale = weight.float().abs().mean()
    return (weight.float() / (scale + 1e-8)).round().clamp(-1, 1), scale


def is_quantized(module: nn.Module) -> bool:
    """True for gemlite's linear with packed weights in it. By name: importing gemlite fails without a GPU."""
    if type(module).__name__ != "GemLiteLinearTriton":
        return False
    packed = getattr(module, "W_q", None)
    return packed is not None and packed.numel() > 0


def dequantize(module: Any) -> Tensor:
    """The weight [out, in] fp32 that the products of ``module`` are taken with. Raises NoTruth for a layout unknown."""
    return weight_of(module)


def quantize_activations(module: Any, x: Tensor) -> Tensor:
    """What the kernels multiply instead of ``x`` [m, in], fp32, by gemlite's own quantizer of activations."""
    return activations_of(module, x)
