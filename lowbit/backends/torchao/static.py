"""Static activation scales: what each linear's input reaches on a calibration text, in the unquantized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backends import targets
from lowbit.errors import LowbitError
from lowbit.formats import Format

AMAX = "calibrated_amax"


@torch.no_grad()
def calibrate(model: Any, fmt: Format, tokens: Tensor) -> None:
    """Run ``tokens`` [windows, length] through the model and leave each target linear its input's largest magnitude.

    Raises LowbitError if a linear saw nothing or something that is not finite.
    """
    chosen = list(targets(model, fmt))
    seen: dict[nn.Module, Tensor] = {}

    def watch(linear: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            amax = inputs[0].abs().max()
            seen[linear] = torch.maximum(seen[linear], amax) if linear in seen else amax

        return hook

    hooks = [target.linear.register_forward_pre_hook(watch(target.linear)) for target in chosen]
    try:
        for window in tokens.to(model.model.norm.weight.device):
            model.model(input_ids=window[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for target in chosen:
        amax = float(seen[target.linear]) if target.linear in seen else 0.0
        if not 0.0 < amax < float("inf"):
            raise LowbitError(f"{fmt.id}: calibrating {target.name} expected a finite input, got a maximum of {amax}")
        setattr(target.linear, AMAX, amax)


def scale(linear: nn.Module, fmt: Format, largest: float) -> Tensor:
    """The step at which the calibrated maximum is the format's ``largest`` number: [1, 1, 1] fp32, for inputs
    [batch, tokens, k] (torchao's tensors ask for as many dimensions as the input has).

    Raises LowbitError on a linear that was not calibrated.
    """
    amax: float | None = getattr(linear, AMAX, None)
    if amax is None:
        raise LowbitError(
            f"{fmt.id}: static activation scales need a calibrated model: calibrate() comes before quantize()"
        )
    weight: Any = linear.weight
    return torch.full((1, 1, 1), amax / largest, device=weight.device)
