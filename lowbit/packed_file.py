"""A packed model in one safetensors file: codes and scales as they lie in memory, and what names them.

The file's metadata hold ``lowbit`` (the version of this layout), ``weight_formats`` (their names), ``packed`` (JSON:
per path of a packed module its format, the format's version, shape and kind), ``aliases`` (JSON: tensors that share
another one's memory) and ``config`` (the model's config.json). Any reader of safetensors can list them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit import checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels import weights
from lowbit.kernels.modules import NativeEmbedding, NativeLinear, PackedModule, packed_modules
from lowbit.kernels.stored_linear import StoredLinear
from lowbit.quiet import quiet_import

LAYOUT = 1
"""Version of the file's layout; formats have their own."""

PARTS = ("codes", "scale", "zero", "tensor_scale")


def save(model: Any, path: Path) -> None:
    """Write a LlamaForCausalLM with packed modules to ``path``, whole or not at all.

    Raises LowbitError for a model without any, and when the disk refuses.
    """
    packed = packed_modules(model)
    if not packed:
        raise LowbitError(f"{path}: expected a model with lowbit's packed weights, got one without; quantize it first")
    if apart := next((name for name, module in packed.items() if isinstance(module, StoredLinear)), None):
        raise LowbitError(
            f"{path}: {apart} has columns in another order (act-order) or inputs in 8 bits, for which this file has no "
            "place; keep the checkpoint as it was published"
        )
    tensors, aliases = _distinct(model.state_dict())
    metadata = {
        "lowbit": str(LAYOUT),
        "weight_formats": " ".join(sorted({module.format for module in packed.values()})),
        "packed": json.dumps({name: _describe(module) for name, module in packed.items()}),
        "aliases": json.dumps(aliases),
        "config": json.dumps(model.config.to_dict() | {"quantization_config": None}),  # the tensors are no longer those
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            draft = Path(folder) / path.name
            save_file(tensors, draft, metadata)
            draft.replace(path)
    except (OSError, SafetensorError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise LowbitError(f"can't write {path}: {why}; free space, or choose another place") from error


def _describe(module: PackedModule) -> dict[str, Any]:
    described: dict[str, Any] = {
        "format": module.format,
        "version": weights.find(module.format).version,
        "shape": [module.n, module.k],
    }
    if isinstance(module, NativeEmbedding):
        described["embedding"] = str(module.dtype).removeprefix("torch.")
    return described


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without those that are another one again, and which one those are."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.contiguous()
    return tensors, aliases


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """The LlamaForCausalLM of a file that ``save`` wrote, on ``device``, in eval mode, bit for bit.

    Raises LowbitError naming what is wrong with a file that is truncated, not of lowbit, of another version, or whose
    tensors are not those of its config.
    """
    metadata, tensors = _read(path, device)
    packed = json.loads(metadata["packed"])
    for name, first in json.loads(metadata["aliases"]).items():
        if first not in tensors:
            raise LowbitError(f"{path}: {name} is an alias of {first}, which the file does not hold; make it again")
        tensors[name] = tensors[first]
    model = _empty(metadata["config"], path, device)
    for name, described in packed.items():
        _put(model, name, _module(name, described, tensors, path))
    _fill(model, tensors, packed, path)
    return model.eval()


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise LowbitError(f"{path}: no such file; expected one that lowbit.packed_file.save wrote")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = dict(file.metadata() or {})
            _check_metadata(metadata, path)
            return metadata, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        size = path.stat().st_size
        raise LowbitError(
            f"{path} ({size} bytes) is truncated or no safetensors file ({error}); make it again"
        ) from error


def _check_metadata(metadata: dict[str, str], path: Path) -> None:
    if "lowbit" not in metadata:
        raise LowbitError(
            f"{path} is a safetensors file, but not of lowbit's packed weights: expected 'lowbit' in its metadata, got "
            f"{sorted(metadata) or 'none'}; plain checkpoints are loaded with --model FOLDER"
        )
    missing = {"packed", "aliases", "config", "weight_formats"} - set(metadata)
    if metadata["lowbit"] != str(LAYOUT) or missing:
        raise LowbitError(
            f"{path}: expected layout {LAYOUT} of lowbit's packed weights, got {metadata['lowbit']!r} without "
            f"{sorted(missing) or 'nothing'}; make it again with this version of lowbit"
        )


def _empty(config: str, path: Path, device: torch.device | str) -> Any:
    llama = quiet_import("transformers.models.llama.modeling_llama")
    values = checkpoint.make_config(json.loads(config), str(path))
    with torch.device("meta"):
        model = llama.LlamaForCausalLM(values)
    model.model.rotary_emb = llama.LlamaRotaryEmbedding(model.config).to(device)  # its buffers are in no file
    return model


def _module(name: str, described: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> PackedModule:
    row = weights.find(described["format"])
    if described["version"] != row.version:
        raise LowbitError(
            f"{path}: {name} is stored in version {described['version']} of {row.name}, this lowbit reads version "
            f"{row.version}; quantize the model again"
        )
    n, k = described["shape"]
    parts = {part: tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
    if "codes" not in parts:
        raise LowbitError(f"{path}: {name}.codes is missing; make the file again")
    packed = weights.Packed(row.name, n, k, **parts)
    packed.check(f"{path}: {name}")
    if "embedding" in described:
        return NativeEmbedding(packed, getattr(torch, described["embedding"]))
    return NativeLinear(packed, tensors.pop(f"{name}.bias", None))


def _put(model: Any, name: str, module: PackedModule) -> None:
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise LowbitError(f"the file's config has no module {name}, but a packed weight for it") from error
    shape = tuple(old.weight.shape)
    if shape != (module.n, module.k):
        raise LowbitError(f"{name}: expected shape {list(shape)} by the file's config, got [{module.n}, {module.k}]")
    model.set_submodule(name, module)


def _fill(model: Any, tensors: dict[str, Tensor], packed: dict[str, Any], path: Path) -> None:
    """Give the plain parameters their values; all must be there, in their shape, and none more."""
    wanted = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
    wrong = [name for name, p in wanted.items() if name in tensors and tensors[name].shape != p.shape]
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if wrong or missing or extra:
        raise LowbitError(
            f"{path}: its tensors are not those of its config; missing {missing[:4]}, unexpected {extra[:4]}, of "
            f"another shape {wrong[:4]} (of {len(missing)}, {len(extra)}, {len(wrong)}); make it again"
        )
    made: dict[int, nn.Parameter] = {}
    for name in wanted:
        owner, _, leaf = name.rpartition(".")
        tensor = tensors[name]
        parameter = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
        setattr(model.get_submodule(owner), leaf, parameter)
