"""``python -m lowbit step``: the native kernels alone. How many tokens a second at which context, what each kernel of a
step takes, whether the same prompt gives the same bits every time, how long a prompt takes beside bf16's. For whoever
works on the kernels: the benches measure the same step among all other formats, with the gate.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import device, generate, models, prefill_times
from lowbit.errors import LowbitError
from lowbit.kernels import geometry, nvrtc, stream_modules
from lowbit.kernels.geometry import Geometry
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.stream import LAYOUTS
from lowbit.native_times import operations

PROMPT, ROUNDS = 128, 3
"""Tokens of the repeated runs' prompt; timings, of which the median counts."""


def _numbers(text: str, option: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise LowbitError(f"{option}: expected whole numbers of 1 or more, separated by commas, got {text!r}")
    return found


def main(options: Any) -> int:
    """Measure and print; ``options`` as step_command parses them. Raises LowbitError where the step can't run."""
    contexts, tokens = _numbers(options.contexts, "--contexts"), _numbers(options.tokens, "--tokens")
    prompts = _numbers(options.prefill, "--prefill") if options.prefill else []
    here = device.detect()
    choice = models.choose(options.model, options.load_format, here)
    names = options.formats.split(",") if options.formats else list(LAYOUTS)
    for name in names:
        why = geometry.unmet(choice.config, name, here.capability)
        if why is not None:
            raise LowbitError(f"step: {name} can't run here: {why[1]}")
    if (missing := nvrtc.available()) is not None:
        raise LowbitError(f"step: {missing}")
    prefill_times.check(prompts, choice.config)
    host = models.load(choice, pin=True)
    against: dict[int, float] = {}

    def tell(found: dict[str, Any]) -> None:
        print(json.dumps(found) if options.json else _line(found), flush=True)

    if prompts:
        for found in prefill_times.reference(host, here, prompts, options.prefill_compiled):
            against[found["tokens"]] = prefill_times.fastest(found)
            tell(found)
    for name in names:
        for found in _measure(host, name, here.torch, contexts, tokens, options.repeats, against):
            tell(found)
    return 0


def _line(found: dict[str, Any]) -> str:
    rest = {key: value for key, value in found.items() if key not in ("format", "what")}
    return f"{found['format']:<14}{found['what']:<11}" + "  ".join(f"{key} {value}" for key, value in rest.items())


def _measure(
    host: Any,
    name: str,
    where: torch.device,
    contexts: list[int],
    tokens: list[int],
    repeats: int,
    against: dict[int, float],
) -> Iterator[dict[str, Any]]:
    dtype = Geometry.of(host.config, name).dtype
    started = time.perf_counter()
    model = host.build(where, dtype, lambda module: attach(module, name), tables=["lm_head"])
    prefill_times.wait(where)
    quantized_s = time.perf_counter() - started
    limit = host.config.max_position_embeddings
    length = min(limit, max(contexts) + max(tokens))
    decoder = generate.Decoder(model, 1, length, dtype)
    prompt = torch.arange(min(PROMPT, length // 2), device=where).unsqueeze(0) * 7919 % host.config.vocab_size
    started = time.perf_counter()
    decoder.run_natively(prompt, name)
    step = decoder.native
    assert step is not None
    yield {"format": name, "what": "ready", "quantized_s": round(quantized_s, 2)} | {
        "kernels_s": round(time.perf_counter() - started, 2),
        "attention": step.attention,
    }
    for context in contexts:
        for count in tokens:
            if context + count <= length:
                tok_s = rate(step, context, count, where)
                yield {"format": name, "what": "decode", "context": context, "tokens": count, "tok_s": round(tok_s, 1)}
    differ = differing(decoder, prompt, min(max(tokens), length - prompt.shape[1]), repeats)
    yield {"format": name, "what": "repeats", "runs": repeats, "differ": differ}
    for kernel, (calls, us, gb_s) in operations(step, model).items():
        yield {"format": name, "what": "kernel", "us": round(us, 2), "calls": calls, "gb_s": round(gb_s), "of": kernel}
    del decoder, step  # their cache goes before the prompts bring their own
    yield from prefill_times.of_format(model, name, dtype, where, against)


def attach(module: nn.Module, name: str) -> None:
    """Quantize the linears inside ``module`` and put them into streams."""

    def packed(linear: nn.Module) -> Any:
        return quantize(linear.weight.detach(), name) if isinstance(linear, nn.Linear) else None

    stream_modules.attach(module, packed)


@torch.no_grad()
def rate(step: Any, context: int, count: int, where: torch.device) -> float:
    """Tokens per second of ``count`` dependent steps from ``context`` on. The cache holds what it holds: it costs the
    same whatever its values are."""

    def once() -> float:
        step.position.fill_(context)
        prefill_times.wait(where)
        started = time.perf_counter()
        for _ in range(count):
            step()
        prefill_times.wait(where)
        return time.perf_counter() - started

    once()
    return count / statistics.median(once() for _ in range(ROUNDS))


@torch.no_grad()
def differing(decoder: Any, prompt: Tensor, count: int, repeats: int) -> int:
    """Of ``repeats`` runs of the same prompt, how many differ from the first in any token or logit bit."""

    def once() -> tuple[Tensor, Tensor]:
        decoder.prefill(prompt)
        tokens = decoder.decode(count)
        return tokens, decoder.native.logits.clone()

    first = once()
    return sum(not all(map(torch.equal, once(), first)) for _ in range(repeats))
