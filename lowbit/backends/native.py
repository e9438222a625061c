"""``lowbit``: our own packed weights and kernels. A row's ``scheme`` is the name of a weight format in kernels/weights.

The modules work on any device; which kernel multiplies is asked of ``kernels.dispatch`` at every call, and ``kernels``
tells which one it is.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.backends import kv_requirement, shapes, targets
from lowbit.errors import LowbitError
from lowbit.formats import Format, Unmet, find
from lowbit.formats.recipes import assignment, matrices
from lowbit.kernels import batch as batches
from lowbit.kernels import dispatch, geometry, nvrtc, stream, stream_modules, weights
from lowbit.kernels.modules import NativeEmbedding, NativeLinear, PackedModule, packed_modules
from lowbit.kernels.stored_linear import StoredLinear
from lowbit.kernels.stream_modules import StreamLinear

if TYPE_CHECKING:
    from lowbit.device import Device

PACKAGES: tuple[str, ...] = ("torch",)

Choose = Callable[[str], str | None]
"""The path of a linear inside the module -> the weight format it gets; None leaves it as it is."""


def requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """Rows of whole groups and whole bytes, and what the KV cache asks for."""
    row = weights.find(fmt.scheme)
    for shape in shapes(fmt, config):
        try:
            row.check(shape.n, shape.k, shape.name)
        except LowbitError as error:
            return Unmet("shape", str(error))
    return kv_requirement(fmt, device, config)


def step_unmet(fmt: Format, device: Device, config: Any, batch: int = 1) -> Unmet | None:
    """Why mode ``native`` can't decode a model in this row, or recipe of such rows, here; None if it can.

    Every linear must be streamed, those that are multiplied with one x in one weight format, and all of them want
    activations of one dtype, which is the row's.
    """
    for scheme in dict.fromkeys(scheme for _, scheme in _streams(fmt, config) if scheme is not None):
        why = batches.unmet(config, scheme, device.capability, batch, fmt.kv)
        if why is not None:
            return Unmet(*why)
    if fmt.parts and (mixed := _unmixable(fmt, device, config)) is not None:
        return Unmet("capability", mixed)
    missing = nvrtc.available()
    return None if missing is None else Unmet("package", missing)


def _streams(fmt: Format, config: Any) -> Iterator[tuple[str, str | None]]:
    """(path, weight format) of every linear of the model; None for one that no row of lowbit's gets."""
    if not fmt.parts:
        yield "", fmt.scheme
        return
    given = {path: find(part) for path, _, part in assignment(fmt, config.num_hidden_layers)}
    for path, name in matrices(config.num_hidden_layers):
        if name != "embed_tokens":
            row = given.get(path)
            yield path, row.scheme if row is not None and row.backend == "lowbit" else None


def _unmixable(fmt: Format, device: Device, config: Any) -> str | None:
    schemes = dict(_streams(fmt, config))
    plain = [path for path, scheme in schemes.items() if scheme is None]
    if plain:
        return f"mode native multiplies with lowbit's own rows alone, and this recipe gives {plain[0]} none of them"
    wanted = {geometry.Geometry.of(config, scheme).dtype for scheme in schemes.values() if scheme is not None}
    has = device.dtype_for(fmt)
    if wanted != {torch.bfloat16 if has == "bf16" else torch.float16}:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in wanted))
        return f"the decode kernels want activations in {names} for these rows, the recipe's are in {has}"
    for path in schemes:
        owner, _, first = path.rpartition(".")
        for shared in (names for names in stream_modules.SHARED if names[0] == first):
            held = sorted({str(schemes[f"{owner}.{name}"]) for name in shared})
            if len(held) > 1:
                return f"{', '.join(shared)} share a stream, which has one format; {owner} gets {' and '.join(held)}"
    return None


def quantize(module: nn.Module, fmt: Format, dtype: torch.dtype, choose: Choose | None = None) -> None:
    """Replace the target linears inside ``module`` by packed ones, on the device where they are.

    ``choose`` mixes formats: it is given each target's path inside ``module`` (``self_attn.q_proj``). Without it all
    get the row's scheme. Raises LowbitError on a shape that a format can't store.
    """
    _pack(module, fmt, dtype, choose)
    attach_streams(module)


def _pack(module: nn.Module, fmt: Format, dtype: torch.dtype, choose: Choose | None) -> None:
    # a function of its own: its last target holds a plain linear, which is to be gone when streams are made
    names = {id(child): path for path, child in module.named_modules()}
    for target in targets(module, fmt):
        path = names[id(target.linear)]
        name = choose(path) if choose else fmt.scheme
        if target.linear.weight.dtype != dtype:
            raise LowbitError(f"{fmt.id} expects {path} in {dtype}, got {target.linear.weight.dtype}")
        if name is not None:
            target.replace(NativeLinear.from_linear(target.linear, name))


def attach_streams(module: nn.Module) -> None:
    """Put the packed linears inside ``module`` into the order of the decode kernels, on a device that has those."""
    held = next(itertools.chain(module.parameters(), module.buffers()), None)
    if held is not None and streams(held.device):
        stream_modules.attach(module, _streamable)


def streams(device: torch.device) -> bool:
    """Whether weights on this device go into the order of the decode kernels, which then are their only copy."""
    return device.type == "cuda" and _decodes(torch.cuda.get_device_capability(device))


def streamed(scheme: str, capability: tuple[int, int] | None) -> bool:
    """Whether the linears of a row of this scheme become streams on a GPU of this capability."""
    return scheme in stream.LAYOUTS and capability is not None and _decodes(capability)


def _decodes(capability: tuple[int, int]) -> bool:
    return capability == geometry.NEEDED_SM and nvrtc.available() is None


def _streamable(module: nn.Module) -> weights.Packed | None:
    if not isinstance(module, NativeLinear) or module.bias is not None or module.n % 8:
        return None
    if isinstance(module, StoredLinear):  # the kernels know no order of columns and no quantized inputs
        return None
    return module.packed if stream.streamable(module.format, module.k) else None


def quantize_embedding(model: Any, name: str) -> None:
    """Replace the embedding table of a LlamaForCausalLM by a packed one; a head tied to it becomes the same memory."""
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        raise LowbitError(f"{name} expects a plain nn.Embedding, got a {type(table).__name__}: start from a fresh copy")
    packed = NativeEmbedding.from_embedding(table, name)
    head = model.lm_head
    if type(head) is nn.Linear and head.weight is table.weight:
        model.lm_head = NativeLinear(packed.packed, head.bias).train(head.training)
    model.model.embed_tokens = packed


def is_quantized(module: nn.Module) -> bool:
    """True for our linear and its packed weight."""
    return isinstance(module, StreamLinear) or (isinstance(module, NativeLinear) and module.codes.numel() > 0)


def dequantize(module: nn.Module) -> Tensor:
    """The weights [n, k] fp32 that a quantized linear stands for, by the definition and not by its kernel."""
    if not isinstance(module, PackedModule | StreamLinear):
        raise LowbitError(f"expected one of lowbit's packed modules, got a {type(module).__name__}")
    return weights.dequantize(module.packed)


def dequantize_blocks(module: Any, size: int) -> Iterator[Tensor]:
    """The same, some rows of about ``size`` weights after the other."""
    for start, stop in weights.row_chunks(module.n, module.k, size):
        yield weights.dequantize(module.rows(start, stop))


def kernels(model: nn.Module, dtype: torch.dtype, rows: int = 1) -> str:
    """Which kernels multiply ``rows`` vectors with the model's packed linears: ``PyTorch reference (29)``."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, StreamLinear):
            found["NVRTC unpack, cuBLAS"] += 1
    found += Counter(
        dispatch.chosen("linear", dispatch.problem(module.packed, rows, dtype))
        for module in packed_modules(model).values()
        if isinstance(module, NativeLinear)
    )
    return ", ".join(f"{name} ({count})" for name, count in found.most_common())
