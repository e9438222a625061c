"""What torchao calls each scheme: the config that ``quantize_`` takes.

Every config that has it is made with ``set_inductor_config=False``: its default flips Inductor flags for the whole
process and leaves them so. The flags that a row needs stand in ``Format.inductor`` and are applied to its own compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowbit.backends.torchao import static
from lowbit.errors import unknown
from lowbit.formats import Format
from lowbit.quiet import quiet_import

Maker = Callable[[Format, nn.Linear], Any]

MAKERS: dict[str, Maker] = {}

KEEP: dict[str, Any] = {"set_inductor_config": False}

INT8_STEPS = 127.5
"""torchao's symmetric int8: scale = amax / ((127 - -128) / 2) (quant_primitives.py, choose_qparams_affine)."""
E4M3_MAX = 448.0
SMALLEST = 1e-12
"""The least maximum of a row of fp8 activations: without it a row of zeros gets scale 0 and becomes NaN (torchao 0.18,
quant_primitives.py, _choose_scale_float8)."""


def make(fmt: Format, linear: nn.Linear) -> Any:
    """torchao's config for one linear. Raises LowbitError on an unknown scheme."""
    if fmt.scheme not in MAKERS:
        raise unknown("torchao scheme", fmt.scheme, MAKERS)
    return MAKERS[fmt.scheme](fmt, linear)


def _api() -> Any:
    return quiet_import("torchao.quantization")


def _prototype(module: str) -> Any:
    return quiet_import(f"torchao.prototype.{module}")


def _scheme(maker: Maker) -> Maker:
    MAKERS[maker.__name__.removeprefix("_")] = maker
    return maker


def _granularity(fmt: Format) -> Any:
    """Of the scales: per group where the row has one, else as its options say; a row of the weight by default."""
    if fmt.group_size:
        return _api().PerGroup(fmt.group_size)
    names = {"row": _api().PerRow, "tensor": _api().PerTensor}
    return names[fmt.options.get("granularity", "row")]()


@_scheme
def _int8_weight_only(fmt: Format, linear: nn.Linear) -> Any:
    return _api().Int8WeightOnlyConfig(granularity=_granularity(fmt), **KEEP)


@_scheme
def _int8_dynamic(fmt: Format, linear: nn.Linear) -> Any:
    kinds = quiet_import("torchao.quantization.quant_primitives").MappingType
    mapping = kinds.ASYMMETRIC if fmt.options.get("asymmetric") else kinds.SYMMETRIC
    return _api().Int8DynamicActivationInt8WeightConfig(granularity=_granularity(fmt), act_mapping_type=mapping, **KEEP)


@_scheme
def _int8_static(fmt: Format, linear: nn.Linear) -> Any:
    granularity = [_api().PerTensor(), _api().PerRow()]
    scale = static.scale(linear, fmt, INT8_STEPS)
    return _api().Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=granularity, **KEEP)


@_scheme
def _int4_weight_only(fmt: Format, linear: nn.Linear) -> Any:
    algorithm = "hqq" if fmt.options.get("hqq") else "tinygemm"
    if linear.weight.device.type == "cpu":
        workflow = _prototype("quantization.int4.inference_workflow")
        return workflow.PrototypeInt4WeightOnlyConfig(
            group_size=fmt.group_size, int4_choose_qparams_algorithm=algorithm, **KEEP
        )
    return _api().Int4WeightOnlyConfig(
        group_size=fmt.group_size,
        int4_packing_format="tile_packed_to_4d",
        int4_choose_qparams_algorithm=algorithm,
        **KEEP,
    )


@_scheme
def _int4_mslk(fmt: Format, linear: nn.Linear) -> Any:
    return _api().Int4WeightOnlyConfig(group_size=fmt.group_size, int4_packing_format=fmt.options["packing"], **KEEP)


@_scheme
def _fp8_int4_mslk(fmt: Format, linear: nn.Linear) -> Any:
    return _api().Float8DynamicActivationInt4WeightConfig(int4_packing_format=fmt.options["packing"])


@_scheme
def _int8_dynamic_int4(fmt: Format, linear: nn.Linear) -> Any:
    workflow = _prototype("quantization.int4.inference_workflow")
    return workflow.Int8DynamicActivationInt4WeightConfig(group_size=fmt.group_size, **KEEP)


@_scheme
def _fp8_weight_only(fmt: Format, linear: nn.Linear) -> Any:
    dtype = torch.float8_e5m2 if fmt.options.get("e5m2") else torch.float8_e4m3fn
    return _api().Float8WeightOnlyConfig(weight_dtype=dtype, granularity=_granularity(fmt), **KEEP)


@_scheme
def _fp8_dynamic(fmt: Format, linear: nn.Linear) -> Any:
    granularity = _granularity(fmt) if fmt.group_size is None else _blocks(fmt.group_size)
    return _api().Float8DynamicActivationFloat8WeightConfig(
        granularity=granularity, activation_value_lb=SMALLEST, **KEEP
    )


def _blocks(size: int) -> list[Any]:
    """Activations in rows of ``size``, weights in squares of it."""
    per_block = quiet_import("torchao.quantization.granularity").PerBlock
    return [per_block([1, size]), per_block([size, size])]


@_scheme
def _fp8_static(fmt: Format, linear: nn.Linear) -> Any:
    api = _prototype("quantization.quant_api")
    return api.Float8StaticActivationFloat8WeightConfig(act_quant_scale=static.scale(linear, fmt, E4M3_MAX), **KEEP)


def _intx(fmt: Format) -> tuple[torch.dtype, Any]:
    """The data type and how its range is laid: a symmetric int1 has the numbers -1 and 0 alone."""
    kinds = quiet_import("torchao.quantization.quant_primitives").MappingType
    bits = int(fmt.weight_bits)
    return getattr(torch, f"int{bits}"), kinds.ASYMMETRIC if bits == 1 else kinds.SYMMETRIC


@_scheme
def _intx_weight_only(fmt: Format, linear: nn.Linear) -> Any:
    dtype, mapping = _intx(fmt)
    return _api().IntxWeightOnlyConfig(weight_dtype=dtype, granularity=_granularity(fmt), mapping_type=mapping)


@_scheme
def _int8_dynamic_intx(fmt: Format, linear: nn.Linear) -> Any:
    dtype, mapping = _intx(fmt)
    return _api().Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=_granularity(fmt), weight_mapping_type=mapping
    )


@_scheme
def _mx_dynamic(fmt: Format, linear: nn.Linear) -> Any:
    preference = quiet_import("torchao.quantization.quantize_.common.kernel_preference").KernelPreference
    dtype = torch.float8_e4m3fn if fmt.weight_bits == 8 else torch.float4_e2m1fn_x2
    return _prototype("mx_formats.inference_workflow").MXDynamicActivationMXWeightConfig(
        activation_dtype=dtype,
        weight_dtype=dtype,
        kernel_preference=preference.EMULATED if fmt.options.get("emulated") else preference.AUTO,
    )


@_scheme
def _nvfp4_dynamic(fmt: Format, linear: nn.Linear) -> Any:
    workflow = _prototype("mx_formats.inference_workflow")
    # its Triton kernel for activations comes from mslk
    return workflow.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)


@_scheme
def _nvfp4_weight_only(fmt: Format, linear: nn.Linear) -> Any:
    return _prototype("mx_formats.inference_workflow").NVFP4WeightOnlyConfig()


@_scheme
def _nf4_weight_only(fmt: Format, linear: nn.Linear) -> Any:
    return _prototype("_nf4tensor_api").NF4WeightOnlyConfig()  # blocks of 64, of which 256 share a scale


@_scheme
def _uintx_weight_only(fmt: Format, linear: nn.Linear) -> Any:
    api = _prototype("quantization.quant_api")
    return api.UIntxWeightOnlyConfig(group_size=fmt.group_size, bit_width=int(fmt.weight_bits), **KEEP)


@_scheme
def _int8_dynamic_uintx(fmt: Format, linear: nn.Linear) -> Any:
    api = _prototype("quantization.quant_api")
    return api.Int8DynamicActivationUIntxWeightConfig(group_size=fmt.group_size, bit_width=int(fmt.weight_bits), **KEEP)
