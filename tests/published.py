"""Tiny Llamas that are quantized and written down as GPTQ, AWQ and compressed-tensors publish theirs.

The layouts are spelled out here once more, number by number, so that lowbit's reader is held against something else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tiny_llama
import torch
from safetensors.torch import load_file, save_file

from lowbit.formats import LINEARS

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@dataclass(frozen=True)
class Scheme:
    """``version``: 1 or 2 for gptq; for compressed-tensors 1 keeps zero points as int8, 2 packs them."""

    method: str
    bits: int
    group: int  # -1: a row
    symmetric: bool
    version: int = 1
    scales: torch.dtype = torch.float16
    ordered: bool = False  # act-order: a group's columns are anywhere


@dataclass
class Published:
    folder: Path
    weights: dict[str, torch.Tensor]
    """By path: what each quantized linear stands for, fp32 and exact."""


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of numbers as one long binary number each, the first one lowest, cut into 32-bit words."""
    rows = []
    for row in values.tolist():
        number = sum(value << (bits * index) for index, value in enumerate(row))
        rows.append(torch.frombuffer(bytearray(number.to_bytes(len(row) * bits // 8, "little")), dtype=torch.int32))
    return torch.stack(rows)


def column_groups(k: int, scheme: Scheme) -> torch.Tensor:
    """The group of each column."""
    groups = torch.arange(k) // (k if scheme.group == -1 else scheme.group)
    return groups[torch.randperm(k, generator=torch.Generator().manual_seed(k))] if scheme.ordered else groups


def quantize(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to nearest: codes [n, k], zero points [n, groups] and scales [n, groups]."""
    top, where = 2**scheme.bits - 1, column_groups(weight.shape[1], scheme)
    count = int(where.max()) + 1
    low = torch.stack([weight[:, where == g].float().amin(-1) for g in range(count)], -1).clamp(max=0)
    high = torch.stack([weight[:, where == g].float().amax(-1) for g in range(count)], -1).clamp(min=0)
    if scheme.symmetric:
        scale = (torch.maximum(-low, high) * 2 / top).to(scheme.scales)
        zero = torch.full(scale.shape, 2 ** (scheme.bits - 1))
    else:
        scale = ((high - low) / top).to(scheme.scales)
        zero = (-low / scale.float()).round().clamp(1, top).int()  # GPTQ's first version can't say 0
    codes = (weight.float() / scale.float()[:, where]).round() + zero[:, where]
    return codes.clamp(0, top).int(), zero.int(), scale


def awq_order(values: torch.Tensor) -> torch.Tensor:
    return values.view(*values.shape[:-1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2)


def tensors(codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    n, k = codes.shape
    bits = scheme.bits
    if scheme.method == "gptq":
        kept = zero - 1 if scheme.version == 1 else zero
        return {
            "qweight": words(codes, bits).T,
            "qzeros": words(kept.T, bits),
            "scales": scale.T,
            "g_idx": column_groups(k, scheme).int(),
        }
    if scheme.method == "awq":
        return {"qweight": words(awq_order(codes.T), 4), "qzeros": words(awq_order(zero.T), 4), "scales": scale.T}
    found = {"weight_packed": words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    if not scheme.symmetric:
        packed = words(zero.T, bits).T
        found["weight_zero_point"] = packed if scheme.version == 2 else (zero - 2 ** (bits - 1)).to(torch.int8)
    if scheme.ordered:
        found["weight_g_idx"] = column_groups(k, scheme).int()
    return found


def config(scheme: Scheme) -> dict[str, object]:
    if scheme.method == "gptq":
        layout = {1: "gptq", 2: "gptq_v2"}[scheme.version]
        return {
            **{"quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.group, "desc_act": scheme.ordered},
            **{"sym": scheme.symmetric, "checkpoint_format": layout, "lm_head": False},
        }
    if scheme.method == "awq":
        return {
            **{"quant_method": "awq", "bits": 4, "group_size": scheme.group, "zero_point": True, "version": "gemm"},
            "modules_to_not_convert": None,
        }
    weights = {
        **{"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False},
        **{"strategy": "channel" if scheme.group == -1 else "group"},
        **{
            "group_size": None if scheme.group == -1 else scheme.group,
            "actorder": "group" if scheme.ordered else "weight",
        },
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}},
        **{"ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"},
    }


def publish(folder: Path, scheme: Scheme, **changes: object) -> Published:
    """Quantize a tiny Llama and write it to ``folder``; its head, norms and embedding stay in 16 bits."""
    tiny_llama.save(folder, dtype=torch.float16, **SHAPE | changes)
    tiny_llama.edit_config(folder, quantization_config=config(scheme))
    plain = load_file(folder / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    stands_for: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] not in LINEARS:
            written[name] = tensor
            continue
        codes, zero, scale = quantize(tensor, scheme)
        where = column_groups(codes.shape[1], scheme)
        spread = [part[:, where] for part in (zero, scale.double())]
        stands_for[path] = ((codes - spread[0]) * spread[1]).float()
        assert torch.equal(stands_for[path].double(), (codes - spread[0]) * spread[1])  # fp32 holds it
        for part, value in tensors(codes, zero, scale, scheme).items():
            written[f"{path}.{part}"] = value.contiguous()
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    return Published(folder, stands_for)


@dataclass(frozen=True)
class Plain:
    """compressed-tensors with an element per weight: ``per`` row, tensor, block, or columns of a group."""

    kind: str
    per: str | int
    inputs: str = ""  # "dynamic", "static", "asymmetric", "group": what becomes of the linears' inputs
    scales: torch.dtype = torch.bfloat16
    symmetric: bool = True


def plain_config(scheme: Plain) -> dict[str, object]:
    strategy = {"row": "channel", "tensor": "tensor", "block": "block"}.get(str(scheme.per), "group")
    weights = {
        **{"num_bits": 8, "type": scheme.kind, "symmetric": scheme.symmetric, "dynamic": False, "strategy": strategy},
        "group_size": scheme.per if strategy == "group" else None,
        "block_structure": [128, 128] if strategy == "block" else None,
    }
    inputs = None
    if scheme.inputs:
        dynamic = scheme.inputs != "static"
        inputs = {
            **{"num_bits": 8, "type": scheme.kind, "symmetric": scheme.inputs != "asymmetric", "dynamic": dynamic},
            "strategy": "group" if scheme.inputs == "group" else "token" if dynamic else "tensor",
            "group_size": 128 if scheme.inputs == "group" else None,
        }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        **{"quant_method": "compressed-tensors", "format": f"{scheme.kind}-quantized"},
        **{"config_groups": {"group_0": group}, "ignore": ["lm_head"], "quantization_status": "compressed"},
    }


def publish_plain(folder: Path, scheme: Plain, **changes: object) -> Published:
    """The same with 8-bit elements. A static scale of inputs is 1/16."""
    tiny_llama.save(folder, dtype=torch.float16, **SHAPE | changes)
    tiny_llama.edit_config(folder, quantization_config=plain_config(scheme))
    written: dict[str, torch.Tensor] = {}
    stands_for: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] not in LINEARS:
            written[name] = tensor
            continue
        n, k = tensor.shape
        high, wide = {"int": 127, "float": 448}[scheme.kind], tensor.float()
        height = {"tensor": n, "block": 128}.get(str(scheme.per), 1)
        width = scheme.per if isinstance(scheme.per, int) else 128 if scheme.per == "block" else k
        scale = torch.zeros(-(-n // height), -(-k // width), dtype=scheme.scales)
        codes, exact = torch.zeros(n, k), torch.zeros(n, k)
        zero = 3.0 if not scheme.symmetric else 0.0
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                rows, columns = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scale[i, j] = wide[rows, columns].abs().max() / (high - zero)
                found = wide[rows, columns] / scale[i, j].float() + zero
                rounded = found.to(torch.float8_e4m3fn).float() if scheme.kind == "float" else found.round()
                codes[rows, columns] = rounded
                exact[rows, columns] = (rounded - zero) * scale[i, j].float()
        stands_for[path] = exact
        written[name] = codes.to(torch.float8_e4m3fn if scheme.kind == "float" else torch.int8)
        written[f"{path}.weight_scale"] = scale.reshape(1) if scheme.per == "tensor" else scale
        if not scheme.symmetric:
            written[f"{path}.weight_zero_point"] = torch.full(scale.shape, int(zero), dtype=torch.int8)
        if scheme.inputs == "static":
            written[f"{path}.input_scale"] = torch.tensor([1 / 16], dtype=scheme.scales)
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    return Published(folder, stands_for)


def edit_quantization(folder: Path, **changes: object) -> Path:
    """Change entries of ``quantization_config``."""
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    return tiny_llama.edit_config(folder, quantization_config=values | changes)
