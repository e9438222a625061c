"""Kernel truth: does a quantized linear compute the product with the weights that it stores?

A format's weights may differ from the original ones as they like; that is quality's business (KL). What its kernel does
with them may not: ``error = ||out - ref|| / ||ref||`` per row of the output, where ``ref`` is the fp64 product with the
format's own dequantized weights, and its own quantized activations where it quantizes those. Asked of one linear of
each kind of the first layer, on the device at hand, with rows of noise, a row of zeros, and a row with an outlier
100 times the rest, one row at a time and several at once: kernels for one row are others than those for many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import backends
from lowbit.backends import NoTruth, recipe
from lowbit.errors import LowbitError
from lowbit.formats import Format

BOUNDS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-16}
"""Largest relative error of a row by compute dtype: bf16's and fp16's machine epsilon, which is twice what rounding a
number to the dtype costs at worst and five times what it costs on average; room for two or three roundings (weights,
scale, result). A kernel that reads one scale or one group wrong is off by far more. fp32: 128 epsilons."""

CHUNK = 2**24
"""Weights that are dequantized at a time (64 MiB), and widened to fp64 (128 MiB)."""


class TruthError(LowbitError):
    """A quantized linear does not compute the product with its own weights."""


@dataclass(frozen=True)
class Truth:
    """Of one linear. ``kernel``: the largest relative error of a row, on ``inputs``. ``weight``: ||dequantized - w||
    / ||w|| over the original weights, None where those are not known: what quantization itself costs."""

    kernel: float
    inputs: str
    weight: float | None = None


def inputs(k: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Activations [m, k] by what they are: the same numbers in every process and on every device."""
    generator = torch.Generator().manual_seed(k)
    noise = torch.randn(6, k, generator=generator)
    outlier = noise[1:2].clone()
    outlier[0, k // 3] = 100.0
    rows = noise[2:6].clone()
    rows[1] = 0
    rows[2, 2 * k // 3] = -100.0
    named = {
        "a row of noise": noise[:1],
        "a row with an outlier": outlier,
        "a row of zeros": torch.zeros(1, k),
        "4 rows, one of zeros, one with an outlier": rows,
    }
    return {name: x.to(device, dtype) for name, x in named.items()}


def product(weight: Tensor, x: Tensor) -> Tensor:
    """x [m, k] by weight [n, k] transposed, in fp64 whatever they are in -> [m, n]."""
    rows = max(1, CHUNK // weight.shape[1])
    return torch.cat([x.double() @ part.double().T for part in torch.split(weight, rows)], dim=1)


def errors(out: Tensor, ref: Tensor, typical: float) -> Tensor:
    """Relative error of each row [m, n] -> [m]; inf where it is not finite.

    A row whose true product is zero is held against ``typical``, the norm of the output for a row of noise.
    """
    norm = ref.norm(dim=1)
    error = (out.double() - ref).norm(dim=1) / torch.where(norm > 0, norm, typical)
    return torch.where(error.isfinite(), error, math.inf)


def _blocks(backend: Any, module: nn.Module) -> Iterator[Tensor]:
    """The weights [n, k] that a module stands for, fp32, some rows after the other: about CHUNK weights at a time."""
    if hasattr(backend, "dequantize_blocks"):
        yield from backend.dequantize_blocks(module, CHUNK)
        return
    whole = backend.dequantize(module).float()
    yield from torch.split(whole, max(1, CHUNK // whole.shape[1]))


def _walk(
    backend: Any, module: nn.Module, original: Tensor | None, visit: Callable[[Tensor, int], None]
) -> tuple[float, float | None]:
    """Show ``visit`` every block of a module's weights, with its first row. -> (their norm, Truth.weight).

    One block at a time is there, beside it the original's: a head of Llama-3.1-8B takes 2 GB in fp32.
    """
    first, norms, lost, plain = 0, [], [], []
    for block in _blocks(backend, module):
        visit(block, first)
        norms.append(float(block.norm()))
        if original is not None:
            part = original[first : first + len(block)].to(block.device).float()
            plain.append(float(part.norm()))
            lost.append(float(part.sub_(block).norm()))
        first += len(block)
    return math.hypot(*norms), None if original is None else math.hypot(*lost) / math.hypot(*plain)


@torch.no_grad()
def measure(module: nn.Module, fmt: Format, dtype: torch.dtype, original: Tensor | None = None) -> Truth:
    """The truth of one quantized linear. ``original``: the weight [n, k] that it was made from, if known.

    Raises NoTruth if the format's library can't give its weights or activations back.
    """
    backend: Any = backends.get(fmt.backend)
    if not hasattr(backend, "dequantize"):
        raise NoTruth(f"{fmt.backend} gives its weights back in no way that lowbit knows")
    quantizes = fmt.activation_bits < 16
    if quantizes and not hasattr(backend, "quantize_activations"):
        raise NoTruth(f"{fmt.backend} shows its quantized activations in no way that lowbit knows")
    given: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    products: dict[str, list[Tensor]] = {}

    def multiply(block: Tensor, _: int) -> None:
        if not given:
            given.update(inputs(block.shape[1], dtype, block.device))
            seen.update(
                {name: backend.quantize_activations(module, x) if quantizes else x for name, x in given.items()}
            )
        wide = block.double()
        for name, x in seen.items():
            products.setdefault(name, []).append(product(wide, x))

    typical, lost = _walk(backend, module, original, multiply)
    bias = getattr(module, "bias", None)
    worst, where = 0.0, ""
    for name, x in given.items():
        ref = torch.cat(products[name], dim=1)
        if bias is not None:
            ref = ref + bias.double()
        error = float(errors(module(x[None])[0], ref, typical).max())  # as in the model: [batch, tokens, k]
        if error > worst or not where:
            worst, where = error, name
    return Truth(worst, where, lost)


@torch.no_grad()
def measure_rows(module: nn.Module, fmt: Format, dtype: torch.dtype, original: Tensor | None = None) -> Truth:
    """The truth of a quantized embedding: the rows that it gathers against those of its dequantized table."""
    table: Any = module
    ids = torch.linspace(0, table.num_embeddings - 1, 64).long()
    rows: list[Tensor] = []

    def gather(block: Tensor, first: int) -> None:
        inside = ids[(ids >= first) & (ids < first + len(block))] - first
        rows.append(block[inside.to(block.device)].double())

    typical, lost = _walk(backends.get(fmt.backend), module, original, gather)
    want = torch.cat(rows)
    error = float(errors(module(ids.to(want.device)), want, typical).max())
    return Truth(error, "64 rows of the table", lost)


def _linears(model: Any, fmt: Format) -> Iterator[tuple[str, nn.Module, Format]]:
    """One matrix of each kind with its format: those of the first layer, embedding and head where the row names them.

    Of a recipe, one of each kind and format.
    """
    if fmt.parts:
        firsts: dict[tuple[str, str], tuple[str, nn.Module, Format]] = {}
        for path, module, part in recipe.parts_of(model, fmt):
            firsts.setdefault((path.rsplit(".", 1)[-1], part.id), (path, module, part))
        yield from firsts.values()
        return
    for path, module in model.named_modules():
        inside = path.startswith("model.layers.")
        if isinstance(module, nn.Embedding):
            continue  # a look-up multiplies nothing
        if path.rsplit(".", 1)[-1] in fmt.targets and (path.startswith("model.layers.0.") or not inside):
            yield path, module, fmt


def prove(model: Any, fmt: Format, dtype: torch.dtype, master: Any = None) -> dict[str, Truth]:
    """The truth of one linear of each kind of a quantized Llama, by path.

    ``master``: the model that it was made from. Raises TruthError naming every linear whose error exceeds the bound of
    ``dtype`` (``options["kernel_bound"]`` where a row has one, with the reason in its note), NoTruth as ``measure``.
    """
    originals = {} if master is None else dict(master.named_parameters(remove_duplicate=False))
    found: dict[str, Truth] = {}
    wrong, limit = [], 0.0
    for path, module, row in _linears(model, fmt):
        ask = measure_rows if path.endswith("embed_tokens") else measure
        truth = found[path] = ask(module, row, dtype, originals.get(f"{path}.weight"))
        bound = float(row.options.get("kernel_bound", BOUNDS[dtype]))
        if not truth.kernel <= bound:
            limit = max(limit, bound)
            wrong.append(f"{path} {truth.kernel:.3g} ({truth.inputs})")
    if wrong:
        raise TruthError(
            f"{fmt.id}: expected a relative error of at most {limit:.3g} against the product with its own dequantized "
            f"weights in {str(dtype).removeprefix('torch.')}, got {', '.join(wrong)}: the kernel is wrong here"
        )
    return found
