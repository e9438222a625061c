"""``python -m lowbit step``: the native kernels alone. How many tokens a second at which context, what each kernel of a
step takes, whether the same prompt gives the same bits every time, how long a prompt takes beside bf16's. For whoever
works on the kernels: the benches measure the same step among all other formats, with the gate.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import device, generate, kvcache, models, native_logits, prefill_times
from lowbit.errors import LowbitError, unknown
from lowbit.kernels import batch as batches
from lowbit.kernels import geometry, nvrtc, stream_modules
from lowbit.kernels.geometry import Geometry
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.stream import LAYOUTS
from lowbit.native_times import attention_us, operations

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


def _caches(text: str) -> list[str]:
    """What --kv names, as Format.kv: bf16 stands for 16 bits, as the activations."""
    names = [name.strip() for name in text.split(",")]
    known = ["bf16", *filter(None, geometry.KV_CODES)]
    for name in names:
        if name not in known:
            raise unknown("KV cache format in --kv", name, known)
    return ["" if name == "bf16" else name for name in names]


def main(options: Any) -> int:
    """Measure and print; ``options`` as step_command parses them. Raises LowbitError where the step can't run."""
    contexts, tokens = _numbers(options.contexts, "--contexts"), _numbers(options.tokens, "--tokens")
    caches, counts = _caches(options.kv), _numbers(options.batch, "--batch")
    prompts = _numbers(options.prefill, "--prefill") if options.prefill else []
    here = device.detect()
    choice = models.choose(options.model, options.load_format, here)
    names = [name.strip() for name in options.formats.split(",")] if options.formats else list(LAYOUTS)
    for name in names:
        if name not in LAYOUTS:
            raise unknown("weight format in --formats", name, LAYOUTS)
    for name, count in itertools.product(names, counts):
        why = batches.unmet(choice.config, name, here.capability, count)
        if why is not None:
            raise LowbitError(f"step: {name} can't run here: {why[1]}")
    if (missing := nvrtc.available()) is not None:
        raise LowbitError(f"step: {missing}")
    prefill_times.check(prompts, choice.config)
    positions = options.logits
    if positions and not 2 <= positions <= choice.config.max_position_embeddings:
        raise LowbitError(
            f"--logits: expected 0 (none) or 2 to {choice.config.max_position_embeddings} positions, got {positions}"
        )
    host = models.load(choice, pin=True)
    against: dict[int, float] = {}

    def tell(found: dict[str, Any]) -> None:
        print(json.dumps(found) if options.json else _line(found), flush=True)

    if prompts:
        for found in prefill_times.reference(host, here, prompts, options.prefill_compiled):
            against[found["tokens"]] = prefill_times.fastest(found)
            tell(found)
    for name in names:
        started = time.perf_counter()
        model, dtype = _build(host, name, here.torch), Geometry.of(host.config, name).dtype
        quantized_s = time.perf_counter() - started
        for kv, count in itertools.product(caches, counts):
            for found in _measure(model, name, kv, quantized_s, contexts, tokens, options.repeats, count):
                tell(found)
        for found in prefill_times.of_format(model, name, dtype, here.torch, against):
            tell(found)
        for found in native_logits.of_format(host, model, name, dtype, positions) if positions else ():
            tell(found)
        del model  # before the next is built
    return 0


def _line(found: dict[str, Any]) -> str:
    rest = {key: value for key, value in found.items() if key not in ("format", "kv", "what")}
    return f"{found['format']:<14}{found.get('kv', ''):<10}{found['what']:<11}" + "  ".join(
        f"{key} {value}" for key, value in rest.items()
    )


def _build(host: Any, name: str, where: torch.device) -> Any:
    dtype = Geometry.of(host.config, name).dtype
    model = host.build(where, dtype, lambda module: attach(module, name), tables=["lm_head"])
    prefill_times.wait(where)
    return model


def _measure(
    model: Any,
    name: str,
    kv: str,
    quantized_s: float,
    contexts: list[int],
    tokens: list[int],
    repeats: int,
    batch: int = 1,
) -> Iterator[dict[str, Any]]:
    config, where = model.config, model.model.norm.weight.device
    dtype = Geometry.of(config, name).dtype
    length = min(config.max_position_embeddings, max(contexts) + max(tokens))
    decoder = generate.Decoder(model, batch, length, dtype, kv=kv)
    prompt = torch.arange(batch * min(PROMPT, length // 2), device=where).view(batch, -1) * 7919 % config.vocab_size
    started = time.perf_counter()
    decoder.run_natively(prompt, f"{name}, KV cache in {kv}" if kv else name)
    step = decoder.native
    assert step is not None
    told: dict[str, Any] = {"format": name, "kv": kv or str(dtype).removeprefix("torch.")}
    told |= {"batch": batch} if batch > 1 else {}
    yield told | {
        "what": "ready",
        "quantized_s": round(quantized_s, 2),
        "kernels_s": round(time.perf_counter() - started, 2),
        "attention": step.attention,
    }
    for context in contexts:
        for count in tokens:
            if context + count <= length:
                tok_s = batch * rate(step, context, count, where)
                yield told | {"what": "decode", "context": context, "tokens": count, "tok_s": round(tok_s, 1)}
    differ = differing(decoder, prompt, min(max(tokens), length - prompt.shape[1]), repeats)
    yield told | {"what": "repeats", "runs": repeats, "differ": differ}
    per_position = kvcache.bytes_per_token(decoder.cache) / len(decoder.cache.layers)
    for context in contexts:
        if context < length:
            us = attention_us(step, context)
            gb_s = batch * per_position * context / us / 1e3  # of keys and values
            yield told | {"what": "attention", "context": context, "us": round(us, 2), "gb_s": round(gb_s)}
    for kernel, (calls, us, gb_s) in operations(step, model).items():
        yield told | {"what": "kernel", "us": round(us, 2), "calls": calls, "gb_s": round(gb_s), "of": kernel}


def attach(module: nn.Module, name: str) -> None:
    """Quantize the linears inside ``module`` and put them into streams."""

    def packed(linear: nn.Module) -> Any:
        return quantize(linear.weight.detach(), name) if isinstance(linear, nn.Linear) else None

    stream_modules.attach(module, packed)


@torch.no_grad()
def rate(step: Any, context: int, count: int, where: torch.device) -> float:
    """Steps per second of ``count`` dependent ones from ``context`` on. The cache holds what it holds: it costs the
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
    """Of ``repeats`` runs of the same prompt, how many differ from the first in any token, or in any bit of any token's
    logits. The first run's are kept: 4 bytes x vocabulary x sequences x ``count``."""
    first: list[Tensor] = []

    def keep() -> None:
        first.append(decoder.native.logits.clone())

    decoder.prefill(prompt)
    wanted = decoder.decode(count, on_step=keep)

    def differs() -> bool:
        other = torch.zeros((), dtype=torch.bool, device=prompt.device)
        logits = iter(first)

        def compare() -> None:
            other.logical_or_((decoder.native.logits != next(logits)).any())

        decoder.prefill(prompt)
        tokens = decoder.decode(count, on_step=compare)
        return bool(other) or not torch.equal(tokens, wanted)

    return sum(differs() for _ in range(repeats))
