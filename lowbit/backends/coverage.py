"""Proof that a model is quantized: which linears carry the format's weights and how many bytes those really hold.

Libraries leave layers in bf16 without a word (torchao does where K is not a multiple of the group), so every case is
counted before it is measured. Bytes are those of the storages behind the tensors, however deep the library hides them,
each storage once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backends import get, recipe
from lowbit.errors import LowbitError
from lowbit.formats import Format
from lowbit.formats.row import TABLES as TABLE_NAMES
from lowbit.kernels.modules import NativeEmbedding, PackedModule
from lowbit.kernels.stream_modules import StreamLinear


class CoverageError(LowbitError):
    """The model is not what its format says."""


@dataclass(frozen=True)
class Coverage:
    """What was found. Bytes count storages, once each.

    ``linears`` of ``expected`` target linears hold the format's weights, in ``weight_bytes`` (data, scales, zeros):
    ``bits_per_weight`` on average. ``resident_bytes`` is the whole model. ``streamed_bytes`` is what one decoded token
    reads: everything but the embedding table, of which it reads one row; a tied table is read as the head. ``kernels``
    names what multiplies, where the backend tells. ``parts`` are a recipe's: for each of its formats the
    linears that carry it, their bytes and bits per weight.
    """

    linears: int
    expected: int
    weight_bytes: int
    bits_per_weight: float
    resident_bytes: int
    streamed_bytes: int
    kernels: str | None = None
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For a record's info; without ``parts`` where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "parts" or value}


def tensors_of(owner: object, _seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every plain tensor that a module, tensor or library object holds.

    Enters tensor subclasses (through ``__tensor_flatten__``), dicts, lists and the state objects that quantization
    libraries hang onto modules and parameters (bitsandbytes' QuantState and MatmulLtState, hqq's meta).
    """
    seen = set() if _seen is None else _seen
    if id(owner) in seen:
        return
    seen.add(id(owner))
    children: Iterable[Any]
    if isinstance(owner, Tensor):
        if hasattr(owner, "__tensor_flatten__"):
            names, _ = owner.__tensor_flatten__()
            children = [getattr(owner, name) for name in names]
        else:
            yield owner
            children = vars(owner).values() if hasattr(owner, "__dict__") else ()
    elif isinstance(owner, dict):
        children = owner.values()
    elif isinstance(owner, list | tuple):
        children = owner
    elif isinstance(owner, nn.Module) or type(owner).__module__.split(".")[0] in _STATE_OWNERS:
        children = vars(owner).values()
    else:
        return
    for child in children:
        # functions, hooks and the like hold no weights; a parameter's way back to its module is cut by _seen
        if isinstance(child, Tensor | nn.Module | dict | list | tuple) or hasattr(child, "__dict__"):
            yield from tensors_of(child, seen)


_STATE_OWNERS = {"bitsandbytes", "gemlite", "hqq", "torchao", "lowbit"}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes held by these tensors, each storage once.

    A tensor may be a window of a larger storage that others share (a memory-mapped checkpoint): then its windows
    count, not the file.
    """
    windows: dict[tuple[str, int], dict[tuple[object, ...], int]] = {}
    whole: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        if tensor.device.type == "meta" or tensor.numel() == 0:
            continue
        storage = tensor.untyped_storage()
        key = (str(tensor.device), storage.data_ptr())
        whole[key] = storage.nbytes()
        window = (tensor.storage_offset(), tensor.dtype, tuple(tensor.shape))
        windows.setdefault(key, {})[window] = tensor.numel() * tensor.element_size()
    return sum(min(whole[key], sum(parts.values())) for key, parts in windows.items())


def resident_bytes(model: nn.Module) -> int:
    """Bytes of every weight and buffer of the model, library objects included."""
    return storage_bytes(tensors_of(model))


TABLES = (nn.Embedding, NativeEmbedding)
"""A decoded token reads one row of these."""


def _streamed_bytes(model: nn.Module) -> int:
    tables = {id(tensor) for module in model.modules() if isinstance(module, TABLES) for tensor in tensors_of(module)}
    heads = {id(tensor) for module in model.modules() if not isinstance(module, TABLES) for tensor in _own(module)}
    return storage_bytes(tensor for tensor in tensors_of(model) if id(tensor) not in tables or id(tensor) in heads)


def _own(module: nn.Module) -> Iterator[Tensor]:
    # what hangs on this module itself, not on its children
    yield from (tensor for tensor in module.parameters(recurse=False))
    yield from (tensor for tensor in module.buffers(recurse=False))


def _find(model: nn.Module, fmt: Format) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in fmt.targets:
            yield path, module


def _count(model: nn.Module, fmt: Format) -> int:
    config: Any = getattr(model, "config", None)
    layers = config.num_hidden_layers if config is not None else sum(1 for _ in _find(model, fmt))
    return sum(1 if name in TABLE_NAMES else int(layers) for name in fmt.targets) if config is not None else layers


def _weights(module: nn.Module) -> int:
    """Logical weights of a linear of any library: its own word, which outlives packing and padding."""
    if isinstance(module, PackedModule):
        return module.n * module.k
    rows: Any = getattr(module, "out_features", None)
    columns: Any = getattr(module, "in_features", None)
    if rows is None or columns is None:
        raise CoverageError(f"{type(module).__name__} does not say its in_features and out_features")
    return int(rows) * int(columns)


def inspect(model: nn.Module, fmt: Format) -> Coverage:
    """Count the linears and bytes of ``model`` and hold them against the format.

    Raises CoverageError if fewer target linears hold the format's weights than the model has, or if the bits stored
    per weight can't be the format's; of a recipe, for each of its formats. Above: scales and zeros take 1 bit per
    weight at most (two 16-bit numbers per group of 32) and alignment some, so more than ``1.25 × weight_bits + 1``
    means that weights are kept unpacked, or beside the original; a row marked ``fast=False`` may do that. Below
    ``weight_bits``: something was not counted.
    """
    if fmt.parts:
        return _inspect_parts(model, fmt)
    backend = get(fmt.backend)
    found = dict(_find(model, fmt))
    missed = [path for path, module in found.items() if not backend.is_quantized(module)]
    expected = _count(model, fmt)
    quantized = [module for path, module in found.items() if path not in set(missed)]
    if len(quantized) < expected:
        examples = f": {', '.join(missed[:3])}{' …' if len(missed) > 3 else ''} left as they were" if missed else ""
        raise CoverageError(f"{fmt.id}: expected {expected} linears with its weights, got {len(quantized)}{examples}")
    weight_bytes, bits = _measure(quantized)
    if fmt.quantized:
        _check_bits(fmt, bits, _padding(quantized, fmt))
    kernels = _kernels(fmt)
    return Coverage(
        len(quantized),
        expected,
        weight_bytes,
        bits,
        resident_bytes(model),
        _streamed_bytes(model),
        kernels(model, _activation_dtype(model)) if kernels else None,
    )


def _activation_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _inspect_parts(model: nn.Module, fmt: Format) -> Coverage:
    expected: dict[str, list[nn.Module]] = {}
    rows: dict[str, Format] = {}
    missed = []
    for path, module, row in recipe.parts_of(model, fmt):
        rows[row.id] = row
        if get(row.backend).is_quantized(module):
            expected.setdefault(row.id, []).append(module)
        else:
            missed.append(f"{path} ({row.id})")
    found = sum(map(len, expected.values()))
    if missed:
        raise CoverageError(
            f"{fmt.id}: expected {found + len(missed)} linears with its weights, got {found}: "
            f"{', '.join(missed[:3])}{' …' if len(missed) > 3 else ''} are not"
        )
    parts = {}
    for name, modules in expected.items():
        part = _measure(modules)
        if rows[name].quantized:
            _check_bits(
                replace(rows[name], name=f"{fmt.id}, its {rows[name].name}"), part[1], _padding(modules, rows[name])
            )
        parts[name] = {"linears": len(modules), "weight_bytes": part[0], "bits_per_weight": part[1]}
    every = [module for modules in expected.values() for module in modules]
    weight_bytes, bits = _measure(every)
    told = {kernels(model, _activation_dtype(model)) for row in rows.values() if (kernels := _kernels(row))}
    return Coverage(
        *(found, found, weight_bytes, bits, resident_bytes(model), _streamed_bytes(model)),
        "; ".join(sorted(told)) or None,
        parts,
    )


def _kernels(row: Format) -> Callable[[nn.Module, torch.dtype], str] | None:
    return getattr(get(row.backend), "kernels", None)


def _measure(modules: list[nn.Module]) -> tuple[int, float]:
    """Bytes of the linears' weights, and bits per weight; a table that two of them share counts once in both."""
    tensors = {id(module): list(tensors_of(module)) for module in modules}
    weights = {_identity(module, tensors[id(module)]): _weights(module) for module in modules}
    total = storage_bytes(tensor for module in modules for tensor in tensors[id(module)])
    return total, 8 * total / sum(weights.values())


def _identity(module: nn.Module, tensors: list[Tensor]) -> object:
    # linears that share a stream own different rows of it; others that share their tensors are one table
    return id(module) if isinstance(module, StreamLinear) else frozenset(map(id, tensors))


def _padding(modules: list[nn.Module], fmt: Format) -> float:
    """Stored over logical weights for a kernel that rounds K up to ``pads_k_to`` (matters in small models only)."""
    multiple = int(fmt.options.get("pads_k_to", 1))
    if multiple == 1:
        return 1.0
    logical, stored = 0, 0
    for module in modules:
        columns: Any = module.in_features
        rows = _weights(module) // columns
        logical += rows * columns
        stored += rows * (-(-columns // multiple) * multiple)
    return stored / logical


def _check_bits(fmt: Format, bits: float, padding: float) -> None:
    limit = (1.25 * fmt.weight_bits + 1) * padding
    if fmt.fast and bits > limit:
        raise CoverageError(
            f"{fmt.id}: expected at most {limit:.2f} bits stored per weight, got {bits:.2f}: "
            "the weights are unpacked or kept twice; if that is the format's nature, mark its row fast=False"
        )
    if bits < fmt.weight_bits * (1 - 1e-6):
        raise CoverageError(
            f"{fmt.id}: expected at least {fmt.weight_bits:g} bits stored per weight, got {bits:.2f}: "
            "tensors_of() does not see where this library keeps its weights"
        )
