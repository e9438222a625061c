"""torchao: quantized tensors behind an ordinary nn.Linear, swapped in by ``quantize_``.

Every config is made with ``set_inductor_config=False``: its default flips Inductor flags for the whole process and
leaves them so. The flags that a row needs stand in ``Format.inductor`` and are applied to its own compile only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.backends import minimum_sm, shapes, targets
from lowbit.backends.torchao.unpacking import dequantize, quantize_activations
from lowbit.errors import unknown
from lowbit.formats import Format, Unmet
from lowbit.quiet import quiet_import

if TYPE_CHECKING:
    from lowbit.device import Device

__all__ = ["PACKAGES", "dequantize", "is_quantized", "quantize", "quantize_activations", "requirement"]

PACKAGES: tuple[str, ...] = ("torchao",)

INT4_GROUPS = (32, 64, 128, 256)


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """Compute capability and shapes by scheme (torchao 0.18, quant_api.py)."""
    match fmt.scheme:
        case "int4_weight_only":
            if fmt.group_size not in INT4_GROUPS:
                return Unmet("shape", f"int4 takes group {', '.join(map(str, INT4_GROUPS))}, not {fmt.group_size}")
            return minimum_sm(device, (8, 0), "tinygemm int4")
        case "fp8_weight_only":
            return minimum_sm(device, (8, 9), "fp8 e4m3 in Triton")
        case "fp8_dynamic_row":
            # _fp8_mm_compat: otherwise the layer stays in bf16 without a word
            return minimum_sm(device, (8, 9), "fp8") or _multiples(fmt, config, 16, "fp8 products")
        case "int8_dynamic" if device.kind == "cuda":
            # kernel/intmm.py: otherwise the product is done on the host, in int32
            return _multiples(fmt, config, 8, "cuBLAS int8 products")
    return None


def _multiples(fmt: Format, config: Any, of: int, what: str) -> Unmet | None:
    bad = [f"{shape.name} [{shape.n}, {shape.k}]" for shape in shapes(fmt, config) if shape.n % of or shape.k % of]
    return Unmet("shape", f"{what} need N and K to be multiples of {of}: {', '.join(bad)}") if bad else None


def _config(fmt: Format, device: torch.device) -> Any:
    api = quiet_import("torchao.quantization")
    match fmt.scheme:
        case "int8_weight_only":
            return api.Int8WeightOnlyConfig(granularity=api.PerRow(), set_inductor_config=False)
        case "int8_dynamic":
            return api.Int8DynamicActivationInt8WeightConfig(granularity=api.PerRow(), set_inductor_config=False)
        case "int4_weight_only" if device.type == "cpu":
            workflow = quiet_import("torchao.prototype.quantization.int4.inference_workflow")
            return workflow.PrototypeInt4WeightOnlyConfig(group_size=fmt.group_size, set_inductor_config=False)
        case "int4_weight_only":
            return api.Int4WeightOnlyConfig(
                group_size=fmt.group_size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
            )
        case "fp8_weight_only":
            return api.Float8WeightOnlyConfig(granularity=api.PerRow(), set_inductor_config=False)
        case "fp8_dynamic_row":
            return api.Float8DynamicActivationFloat8WeightConfig(granularity=api.PerRow(), set_inductor_config=False)
    schemes = ("int8_weight_only", "int8_dynamic", "int4_weight_only", "fp8_weight_only", "fp8_dynamic_row")
    raise unknown("torchao scheme", fmt.scheme, schemes)


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Swap the weights of the target linears inside ``module``, in place, on the device where they are."""
    chosen = {id(target.linear): target.linear for target in targets(module, fmt)}
    if not chosen:
        return
    config = _config(fmt, next(iter(chosen.values())).weight.device)
    api = quiet_import("torchao.quantization")
    api.quantize_(module, config, filter_fn=lambda linear, name: id(linear) in chosen)


def is_quantized(module: nn.Module) -> bool:
    """True for a linear whose weight is one of torchao's tensors: it leaves what it can't do as a plain parameter."""
    base = quiet_import("torchao.utils").TorchAOBaseTensor
    return isinstance(module, nn.Linear) and isinstance(module.weight, base)
