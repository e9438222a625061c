"""Backends: one file per library. Each turns a format row into quantized modules, or says why it can't here.

A backend module has

- ``PACKAGES``: what must be installed, by import name;
- ``requirement(fmt, device, config) -> Unmet | None``: what only this library needs; cheap, and without importing the
  library, whose import may crash here;
- ``quantize(module, fmt, dtype) -> None``: in place, every target linear inside ``module``, which is on its device;
- ``is_quantized(module) -> bool``: whether this one module holds this library's weights.

and, where the library allows it, for kernel truth (lowbit/truth.py):

- ``dequantize(module) -> Tensor``: the weights that this quantized linear stands for, [n, k] fp32, read from what is
  stored and not by its kernel;
- ``dequantize_blocks(module, size)``: optional, the same in blocks of rows of about ``size`` weights;
- ``quantize_activations(module, x) -> Tensor``: x [m, k] as a format with ``activation_bits < 16`` sees it: quantized
  and dequantized again, [m, k] fp32.

Both raise NoTruth, whose text is the reason, for a scheme whose library can't tell. And, for rows with
``calibration_windows`` (lowbit/calibration.py):

- ``calibrate(model, fmt, tokens) -> None``: run ``tokens`` [windows, window] int64 through the whole unquantized model
  on its device, and leave with each target linear what ``quantize``, which is called next, needs of it.

Where the library chooses by device:

- ``kernels(model, dtype) -> str``: which kernels decode this model here.

Where a row needs more than devices and packages by name:

- ``also_needs(fmt) -> str``: that in words, "" for the others.

A backend is a file or a package of this folder; files whose name begins with an underscore help them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from lowbit.errors import LowbitError, unknown
from lowbit.formats import FORMATS, LINEARS, Format, Unmet, stored
from lowbit.formats.auto import SCHEME as AUTO
from lowbit.formats.recipes import assignment, matrices
from lowbit.formats.row import TABLE_PATHS, TABLES
from lowbit.quiet import quiet_import
from lowbit.roofline import head_dim

if TYPE_CHECKING:
    from lowbit.device import Device

__all__ = [
    "BACKENDS",
    "Backend",
    "NoTruth",
    "Shape",
    "Target",
    "get",
    "kv_requirement",
    "minimum_sm",
    "quiet_import",
    "shapes",
    "targets",
    "unmet",
]

FILES = {"lowbit": "native"}
"""Backends whose file has another name."""

BACKENDS = tuple(
    next((name for name, file in FILES.items() if file == found.name), found.name)
    for found in pkgutil.iter_modules(__path__)
    if found.name != "coverage" and not found.name.startswith("_")
)


class NoTruth(LowbitError):
    """The library gives no way to see what this format's kernel works on: weights or quantized activations."""


class Backend(Protocol):
    """What every module in this folder offers."""

    PACKAGES: tuple[str, ...]

    def requirement(self, fmt: Format, device: Device, config: Any) -> Unmet | None: ...

    def quantize(self, module: nn.Module, fmt: Format, dtype: torch.dtype) -> None: ...

    def is_quantized(self, module: nn.Module) -> bool: ...


def get(name: str) -> Backend:
    """The backend of this library. Raises LowbitError naming the known ones."""
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    return cast(Backend, importlib.import_module(f"lowbit.backends.{FILES.get(name, name)}"))


class Shape(NamedTuple):
    """Of one target linear: weight [n, k]."""

    name: str
    n: int
    k: int


def shapes(fmt: Format, config: Any) -> list[Shape]:
    """The weight shapes of the format's target linears in a Llama of this config, one per kind of linear."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query, key = (heads * head_dim(config) for heads in (config.num_attention_heads, config.num_key_value_heads))
    known = {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
        "lm_head": (config.vocab_size, hidden),
        "embed_tokens": (config.vocab_size, hidden),
    }
    for name in fmt.targets:
        if name not in known:
            raise unknown(f"target linear of {fmt.id}", name, known)
    return [Shape(name, *known[name]) for name in fmt.targets]


class Target(NamedTuple):
    """A linear to be quantized and where it hangs: ``getattr(parent, name)``."""

    parent: nn.Module
    name: str
    linear: nn.Linear

    def replace(self, module: nn.Module) -> None:
        """Put ``module`` where the linear was, in the same training or evaluation mode."""
        setattr(self.parent, self.name, module.train(self.linear.training))


def targets(module: nn.Module, fmt: Format) -> Iterator[Target]:
    """Every linear inside ``module`` that the format quantizes, by attribute name, one at a time.

    Safe against replacing the linear while iterating. A linear that already holds quantized weights is an error:
    quantizing twice breaks silently in some libraries.
    """
    for parent in list(module.modules()):
        for name in fmt.targets:
            linear = parent._modules.get(name)
            if linear is None:
                continue
            if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
                weight = type(getattr(linear, "weight", None)).__name__
                raise LowbitError(
                    f"{fmt.id} expects plain linears, but {name} is a {type(linear).__name__} with a "
                    f"{weight}: start from a fresh copy of the master for every format"
                )
            yield Target(parent, name, linear)


def minimum_sm(device: Device, needed: tuple[int, int], why: str) -> Unmet | None:
    """Unmet if this is a CUDA device below compute capability ``needed``."""
    if device.kind != "cuda" or device.capability is None or device.capability >= needed:
        return None
    return Unmet("capability", f"needs SM{needed[0]}{needed[1]} ({why}), this is {device.sm}")


def kv_requirement(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """SM89 for a KV cache in fp8, and for attention that multiplies its codes, 16 numbers of a head at a time."""
    if fmt.kv not in ("fp8", "fp8_attn"):
        return None
    if fmt.kv == "fp8_attn" and (width := head_dim(config)) % 16:
        return Unmet("shape", f"fp8 products need head_dim in multiples of 16, this model's is {width}")
    return minimum_sm(device, (8, 9), "fp8 e4m3 in Triton" if fmt.kv == "fp8" else "fp8 products")


PLAIN_INSTALL = 'pip install "lowbit"'
INSTALL = {
    "gemlite": 'pip install "lowbit[gpu]"',
    "triton": 'pip install "lowbit[gpu]"',
    "hqq": 'pip install "lowbit[hqq]"',
    "hqq_aten": "it is built from hqq's sources (hqq/kernels/setup_cuda.py)",
    "bitblas": "pip install bitblas",
    "marlin": "it is built from github.com/IST-DASLab/marlin (PyPI has no wheel of it)",
}
"""How to get a package that lowbit does not bring along."""


def missing_package(packages: tuple[str, ...]) -> Unmet | None:
    """Unmet if a package can't be found; does not import it."""
    for name in packages:
        if find_spec(name) is None:
            return Unmet("package", f"{name} is not installed; {INSTALL.get(name, PLAIN_INSTALL)}")
    return None


def indivisible(fmt: Format, config: Any, by: int, what: str) -> Unmet | None:
    """Unmet naming every target whose K (the linear's input width) ``by`` does not divide."""
    bad = [f"{shape.name} (K={shape.k})" for shape in shapes(fmt, config) if shape.k % by]
    return Unmet("shape", f"{what} {by} does not divide {', '.join(bad)}") if bad else None


MIB = 1024 * 1024


def estimate_mib(fmt: Format, config: Any) -> float:
    """About what the model takes in this format, in MiB: packed matrices, the others in 16 bits. Scales count 1/16."""
    weights = {shape.name: shape.n * shape.k for shape in shapes(replace(fmt, targets=(*LINEARS, *TABLES)), config)}
    bits = {path: (name, 16.0) for path, name in matrices(config.num_hidden_layers)}
    for path, name, part in assignment(fmt, config.num_hidden_layers):
        bits[path] = name, _stored_bits(FORMATS[part] if fmt.parts else fmt)
    embedding, head = (bits[path] for path in TABLE_PATHS)
    if getattr(config, "tie_word_embeddings", False) and embedding[1] == head[1]:
        del bits[TABLE_PATHS[0]]
    return sum(weights[name] * each for name, each in bits.values()) / 8 / MIB


def _stored_bits(fmt: Format) -> float:
    return fmt.weight_bits * (1 + 1 / 16) if fmt.quantized else fmt.weight_bits


def _too_large(fmt: Format, device: Device, config: Any) -> Unmet | None:
    needed = estimate_mib(fmt, config)
    if device.total_mib is None or needed <= device.total_mib or fmt.scheme == AUTO:
        return None  # what auto takes is known once it was searched for
    return Unmet("memory", f"weights take about {needed:,.0f} MiB, {device.name} has {device.total_mib:,.0f} MiB")


def _stored(fmt: Format, config: Any) -> Unmet | None:
    """Unmet if a quantized checkpoint would be quantized again, or a row of one is asked of another model."""
    how = stored.read(config, "the model's config")
    if how is None and fmt.backend == "checkpoint":
        return Unmet("capability", f"needs a checkpoint that is stored so ({fmt.name}), this one is not quantized")
    if how is None or fmt.backend == "torch" or fmt in stored.as_rows(how):
        return None
    return Unmet(
        "capability",
        f"this checkpoint is quantized already ({how}): {stored.as_row(how).id} runs it as it is, bf16-torch "
        "dequantized; give the unquantized model for other formats",
    )


def unmet(fmt: Format, device: Device, config: Any) -> Unmet | None:
    """Why this format can't run on this device with a Llama of this config, or None. Imports no library."""
    if reason := _stored(fmt, config):
        return reason
    backend = get(fmt.backend)
    if device.kind not in fmt.devices:
        return Unmet("capability", f"needs {' or '.join(fmt.devices)}, this is {device.kind}")
    if device.dtype_for(fmt) is None:
        needs = "SM80" if fmt.dtypes == ("bf16",) else "another device"
        return Unmet("capability", f"needs {needs} ({' or '.join(fmt.dtypes)}), this is {device.sm or device.kind}")
    reason = missing_package(backend.PACKAGES + fmt.packages)
    if reason is None and fmt.group_size is not None:
        reason = indivisible(fmt, config, fmt.group_size, "group")
    return reason or backend.requirement(fmt, device, config) or _too_large(fmt, device, config)


LADDER = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
"""Compute capabilities to ask for, oldest first: V100, T4, A100, A10, L40, H200, B200, RTX 5090."""

BROUGHT_ALONG = frozenset({"torch", "torchao", "bitsandbytes"})


def needs(fmt: Format) -> str:
    """What a row needs, in words: ``CPU or SM75``, ``SM89; gemlite, triton``.

    The oldest compute capability is found by asking for a Llama-3.1-8B, so it can't differ from what cases are skipped
    for. Packages are those that lowbit does not bring along.
    """
    oldest = next((capability for capability in LADDER if _capable(fmt, capability)), None)
    cuda = "no GPU known" if oldest is None else f"SM{oldest[0]}{oldest[1]}"
    hardware = " or ".join({"cpu": "CPU", "cuda": cuda}[kind] for kind in fmt.devices)
    members = [FORMATS[part] for part in fmt.parts.values()] or [fmt]
    packages = [name for each in members for name in (*get(each.backend).PACKAGES, *each.packages)]
    packages = [name for name in packages if name not in BROUGHT_ALONG]
    also = getattr(get(fmt.backend), "also_needs", lambda fmt: "")(fmt)
    return "; ".join(filter(None, (hardware, ", ".join(dict.fromkeys(packages)), also)))


def _capable(fmt: Format, capability: tuple[int, int]) -> bool:
    from lowbit.device import Device
    from lowbit.presets import PRESETS

    device = Device("cuda", 0, "any", "any", capability, None, 1, driver=None, cuda=None)
    config = SimpleNamespace(**(PRESETS["llama-3.1-8b"].values or {}))
    if not all(_capable(FORMATS[part], capability) for part in fmt.parts.values()):
        return False
    reason = get(fmt.backend).requirement(fmt, device, config)
    return device.dtype_for(fmt) is not None and (reason is None or reason.kind != "capability")
