"""How far the native step's logits are from those of the same weights in fp32, for ``python -m lowbit step --logits``.

Teacher-forced: every position gets a token that was settled before, so that one wrong arg max costs one position. Four
ways are held against fp32 with the format's dequantized weights, the same tokens and the same positions:

- ``native``: lowbit's kernels, a step per position, behind a prompt of one token and behind a long one;
- ``modules``: transformers' modules with the same streamed weights, as every other mode runs them: all activations in
  16 bits;
- ``x in 16 bits``: the fp32 model with what goes into each linear, and what leaves q, k and v, rounded to 16 bits:
  about what any kernels with 16-bit activations do (the integer formats' cut x finer, the residual stays in fp32);
- ``k, v in 16 bits``: the fp32 model with only what its KV cache would hold rounded to 16 bits: no kernels over such a
  cache can be expected to come nearer.

Of models of 1, 4, 8, … layers too (the whole's first ones): random weights let a rounding grow from layer to layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowbit import generate, prefill_times
from lowbit.kernels import weights
from lowbit.kernels.quantizer import CUDA_CHUNK, quantize

Line = dict[str, Any]

DEPTHS = (1, 4, 8, 16)
"""Layers of the models beside the whole one."""
SHORT = 384
"""Positions of those."""
SPAN = 256
"""Positions that are told apart: behind 128 tokens, and the last ones."""
EVERY, CACHED = ("_proj", "lm_head"), ("k_proj", "v_proj")
"""How the paths end of all linears, and of those whose output the KV cache holds."""
ROWS = 64
"""Positions compared at once: 128,256 logits each, in fp64."""


def of_format(host: Any, model: Any, name: str, dtype: torch.dtype, positions: int) -> Iterator[Line]:
    """A line per depth, way and stretch of positions. ``model``: ``host``'s, streamed in ``name``; ``dtype``: of its
    activations. ``error`` and ``mean``: the largest and the mean ||difference|| / ||logits|| of a position. ``top1``:
    how many positions have fp32's arg max; ``clear``: those where fp32's first logit is ahead of its second by more
    than 4 times the difference (rms over the vocabulary), ``wrong``: how many of these have another arg max.
    """
    where = model.model.norm.weight.device
    exact = build_exact(host, name, dtype, where)
    ids = prefill_times.prompt(positions, model.config, where)
    whole = len(model.model.layers)
    for depth in [*(count for count in DEPTHS if count < whole), whole]:
        few = ids if depth == whole else ids[:, :SHORT]
        with _first_layers(model, depth), _first_layers(exact, depth):
            want = fp32_logits(exact, few)
            for way, start, found in _ways(model, exact, few, name, dtype, long=depth == whole):
                told = {"format": name, "what": "logits", "layers": depth, "way": way}
                for low, high in _spans(start, few.shape[1]):
                    yield told | held_against(found[low - start : high - start], want[low:high], low)


def _spans(start: int, stop: int) -> Iterator[tuple[int, int]]:
    yield start, stop
    if start < 128 and stop > 128 + SPAN:
        yield from ((128, 128 + SPAN), (stop - SPAN, stop))


def _ways(
    model: Any, exact: Any, ids: Tensor, name: str, dtype: torch.dtype, *, long: bool
) -> Iterator[tuple[str, int, Tensor]]:
    """Name, first position and logits [positions, vocabulary], one way after the other: each is a GB at 2,048."""
    prompts = (1, ids.shape[1] - SPAN) if long and ids.shape[1] > 2 * SPAN else (1,)
    for prompt in prompts:
        yield f"native, prompt {prompt}", prompt, native_logits(model, ids, prompt, name, dtype)
    with torch.no_grad():
        yield "modules", 0, model(input_ids=ids, use_cache=False).logits[0].float()
    for way, before, behind in (("x in 16 bits", EVERY, ("q_proj", *CACHED)), ("k, v in 16 bits", (), CACHED)):
        with _rounded(exact, dtype, before, behind):
            yield way, 0, fp32_logits(exact, ids)


@torch.no_grad()
def native_logits(model: Any, ids: Tensor, prompt: int, name: str, dtype: torch.dtype) -> Tensor:
    """A step per position behind the first ``prompt`` of ids [1, S] -> [S - prompt, vocabulary] fp32."""
    decoder = generate.Decoder(model, 1, ids.shape[1], dtype)
    decoder.run_natively(ids[:, : min(16, ids.shape[1] - 1)], name)
    step = decoder.native
    assert step is not None
    decoder.prefill(ids[:, :prompt])
    found = torch.empty(ids.shape[1] - prompt, model.config.vocab_size, device=ids.device)
    for row, place in zip(found, range(prompt, ids.shape[1]), strict=True):
        step.token.copy_(ids[:, place : place + 1])
        step()
        row.copy_(step.logits)
    return found


@torch.no_grad()
def fp32_logits(exact: Any, ids: Tensor) -> Tensor:
    """ids [1, S] -> [S, vocabulary]; attention by plain products and a softmax, nothing in fewer bits."""
    with sdpa_kernel(SDPBackend.MATH):
        logits: Tensor = exact(input_ids=ids, use_cache=False).logits[0]
    return logits


@torch.no_grad()
def build_exact(host: Any, name: str, dtype: torch.dtype, where: torch.device) -> Any:
    """The model in fp32 with what ``name`` makes of the weights in ``dtype``, quantized anew: streams are not asked."""

    def dequantize(module: nn.Module) -> None:
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                packed = quantize(linear.weight.detach().to(dtype), name)
                for low, high in weights.row_chunks(packed.n, packed.k, CUDA_CHUNK):
                    linear.weight[low:high] = weights.dequantize(packed.rows(low, high))

    exact = host.build(where, torch.float32, dequantize, tables=["lm_head"])
    for module in exact.modules():
        for parameter in () if isinstance(module, nn.Linear) else module.parameters(recurse=False):
            parameter.copy_(parameter.to(dtype))  # norms and the embedding, as the streamed model has them
    return exact


@contextmanager
def _first_layers(model: Any, count: int) -> Iterator[None]:
    """Without the layers behind the first ``count``."""
    layers, body = model.model.layers, model.model
    try:
        body.layers, model.config.num_hidden_layers = layers[:count], count
        yield
    finally:
        body.layers, model.config.num_hidden_layers = layers, len(layers)


@contextmanager
def _rounded(exact: Any, dtype: torch.dtype, before: tuple[str, ...], behind: tuple[str, ...]) -> Iterator[None]:
    """Round what goes into the linears whose paths end as ``before``, and what leaves those of ``behind``."""
    hooks = []
    for path, module in exact.named_modules():
        if isinstance(module, nn.Linear) and path.endswith(before):
            hooks.append(module.register_forward_pre_hook(lambda _, given: (given[0].to(dtype).float(),)))
        if isinstance(module, nn.Linear) and path.endswith(behind):
            hooks.append(module.register_forward_hook(lambda _, given, found: found.to(dtype).float()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def held_against(found: Tensor, want: Tensor, first: int) -> Line:
    """[S, vocabulary] each, ``want`` of fp32, from position ``first`` on; see of_format."""
    errors, matches, clear, wrong = [], 0, 0, 0
    for low in range(0, len(found), ROWS):
        ours, theirs = found[low : low + ROWS], want[low : low + ROWS]
        distance = (ours.double() - theirs.double()).norm(dim=-1)
        errors.append(distance / theirs.double().norm(dim=-1))
        best = theirs.topk(2, dim=-1).values.double()
        same = ours.argmax(-1) == theirs.argmax(-1)
        ahead = best[:, 0] - best[:, 1] > 4 * distance / math.sqrt(theirs.shape[-1])
        matches, clear = matches + int(same.sum()), clear + int(ahead.sum())
        wrong += int((ahead & ~same).sum())
    error = torch.cat(errors)
    return {
        "positions": f"{first}-{first + len(found) - 1}",
        "error": float(f"{float(error.max()):.3g}"),
        "mean": float(f"{float(error.mean()):.3g}"),
        "top1": matches,
        "clear": clear,
        "wrong": wrong,
    }
