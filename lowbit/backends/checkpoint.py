"""Checkpoints that are quantized already: their linears, read into lowbit's own packed modules, run as they are.

The row comes with the model (lowbit/formats/stored.py, registered by ``lowbit.models.choose``): ``HostModel.build``
leaves the linears packed for it and dequantizes them for every other one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.backends import native
from lowbit.errors import LowbitError
from lowbit.formats import Format, Unmet
from lowbit.kernels import weights
from lowbit.kernels.modules import NativeLinear, PackedModule
from lowbit.kernels.stored_linear import StoredLinear

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("torch",)


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """None: what the row needs is the checkpoint, which ``backends.unmet`` asks for."""
    return None


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype) -> None:
    """Put the packed linears into the decode kernels' order, where those read it; a row's own head comes beside them.

    Raises LowbitError on a plain linear, and on scales that are not those of the row's decode kernels.
    """
    head = module._modules.get("lm_head")
    if "head" in fmt.options and type(head) is nn.Linear:
        module._modules["lm_head"] = NativeLinear.from_linear(head, fmt.options["head"])
    for path, child in module.named_modules():
        if isinstance(child, StoredLinear):
            child.settle()
        if "native" in fmt.modes and isinstance(child, NativeLinear) and child.format != fmt.scheme:
            raise LowbitError(
                f"{fmt.id} needs every linear in {fmt.scheme}, but {path} is {child.format}: its bf16 scales are "
                "beyond what fp16 holds exactly; take the row without _head4"
            )
        if path.rpartition(".")[2] in fmt.targets and not isinstance(child, PackedModule):
            raise LowbitError(f"{fmt.id} expects the checkpoint's own packed linears, but {path} is a plain one")
    native.attach_streams(module)


def is_quantized(module: nn.Module) -> bool:
    """True for a packed linear of lowbit's."""
    return native.is_quantized(module)


def dequantize(module: nn.Module) -> Tensor:
    """[n, k] fp32: (code - zero point) · scale, exactly."""
    return module.defined() if isinstance(module, StoredLinear) else native.dequantize(module)


def dequantize_blocks(module: Any, size: int) -> Iterator[Tensor]:
    """The same, some rows of about ``size`` weights after the other."""
    if not isinstance(module, StoredLinear):
        yield from native.dequantize_blocks(module, size)
        return
    for piece in weights.row_chunks(module.n, module.k, size):
        yield module.defined(*piece)


def quantize_activations(module: nn.Module, x: Tensor) -> Tensor:
    """x [m, k] as the linear multiplies it: [m, k] fp32."""
    if not isinstance(module, StoredLinear) or module.inputs is None:
        raise LowbitError(f"expected a linear with quantized inputs, got a {type(module).__name__}")
    return module.quantize_inputs(x).values()


def kernels(model: nn.Module, dtype: torch.dtype, rows: int = 1) -> str:
    """Which kernels multiply ``rows`` vectors."""
    quantized = [each for each in model.modules() if isinstance(each, StoredLinear) and each.inputs is not None]
    if not quantized:
        return native.kernels(model, dtype, rows)
    found = Counter(module.kernel(dtype) for module in quantized)
    return ", ".join(f"{name} ({count})" for name, count in found.most_common())
