"""torchao's tensors back in fp32, and activations as its kernels see them: what kernel truth is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backends import NoTruth
from lowbit.kernels.weights import row_chunks
from lowbit.quiet import quiet_import

Pack = Callable[[Tensor], Tensor]


def dequantize(module: nn.Module) -> Tensor:
    """The weights that a linear's torchao tensor stands for, [n, k] fp32. Raises NoTruth for mslk's packings."""
    weight: Any = module.weight
    kind = type(weight).__name__
    match kind:
        case "Int4OpaqueTensor":
            return _tinygemm(_unpack_cpu(weight.qdata), weight.scale_and_zero, weight.shape)
        case "Int4TilePackedTo4dTensor":
            return tinygemm_tiles(weight.qdata, weight.scale_and_zero, weight.shape)
        case "IntxUnpackedToInt8Tensor":
            return _affine(weight.qdata, weight.scale, weight.zero_point)
        case "UIntxBitPackedTensor" if weight.bit_width == 4:
            return _gemlite(weight)
        case "NF4Tensor":
            original: Tensor = weight.get_original_weight()
            return original.float()
        case "Int4Tensor" | "Int4PreshuffledTensor":
            raise NoTruth(f"torchao's {kind} gives its weights back in no way that lowbit knows")
    dequantized: Tensor = weight.dequantize(torch.float32)
    return dequantized


def dequantize_blocks(module: nn.Module, size: int) -> Iterator[Tensor]:
    """The same in blocks of rows of about ``size`` weights. int8, which heads are given, is cut as it is stored (whole,
    Llama-3.1-8B's takes 4 GB: its codes in fp32, and their product with the scales); the others are cut afterwards."""
    weight: Any = module.weight
    cut = type(weight).__name__ == "Int8Tensor"
    whole = weight if cut else dequantize(module).float()
    n, k = whole.shape
    for start, stop in row_chunks(n, k, size):
        part: Any = whole[start:stop]
        yield part.dequantize(torch.float32) if cut else part


def quantize_activations(module: nn.Module, x: Tensor) -> Tensor:
    """x [m, k] as the linear's kernel takes it: through torchao's own quantizer and back to fp32.

    Raises NoTruth where gemlite's kernels quantize them.
    """
    weight: Any = module.weight
    x = x[None]  # the scales of static activations have three dimensions
    match type(weight).__name__:
        case "IntxUnpackedToInt8Tensor":
            intx = quiet_import(type(weight).from_hp.__func__.__module__)
            seen: Tensor = intx._apply_int8_act_asym_per_token_quant_dequant(x)
        case "MXTensor":
            seen = _as_mx(weight, x)
        case "NVFP4Tensor":
            seen = _as_nvfp4(weight, x)
        case "PrototypeFloat8Tensor":
            prototype = quiet_import(type(weight).from_hp.__func__.__module__)
            seen = prototype._choose_quant_func_and_quantize_tensor(
                x, weight.act_quant_kwargs, act_quant_scale=weight.act_quant_scale
            ).dequantize(torch.float32)
        case "Float8Tensor" | "Int8Tensor":
            seen = _chosen(weight, x)
        case kind:
            raise NoTruth(f"torchao's {kind} shows its quantized activations in no way that lowbit knows")
    return seen[0].float()


def _chosen(weight: Any, x: Tensor) -> Tensor:
    common = quiet_import("torchao.quantization.quantize_.common.quantize_tensor_kwargs")
    static = {"scale": getattr(weight, "act_quant_scale", None)}
    quantized = common._choose_quant_func_and_quantize_tensor(x, weight.act_quant_kwargs, **static)
    dequantized: Tensor = quantized.dequantize(torch.float32)
    return dequantized


def _as_mx(weight: Any, x: Tensor) -> Tensor:
    how = weight.act_quant_kwargs
    mx = type(weight).to_mx(
        x, how.elem_dtype, how.block_size, how.scaling_mode, how.kernel_preference, is_swizzled_scales=False
    )
    dequantized: Tensor = mx.dequantize(torch.float32)
    return dequantized


def _as_nvfp4(weight: Any, x: Tensor) -> Tensor:
    nvfp4 = quiet_import("torchao.prototype.mx_formats.nvfp4_tensor")
    how = weight.act_quant_kwargs
    whole = nvfp4.per_tensor_amax_to_scale(x.abs().max())
    quantized = nvfp4.NVFP4Tensor.to_nvfp4(x[0], how.block_size, per_tensor_scale=whole, is_swizzled_scales=False)
    dequantized: Tensor = quantized.dequantize(torch.float32)
    return dequantized[None]


def _affine(numbers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(q - zero) * scale: [n, k] int8, [n, groups] each -> [n, k] fp32."""
    n, groups = scale.shape
    grouped = numbers.float().view(n, groups, -1)
    return ((grouped - zero.float()[..., None]) * scale.float()[..., None]).view(numbers.shape)


FUSED_ZERO = 4
"""gemlite's W_group_mode in which a weight is q * scale + zero; in the others it is (q - zero) * scale."""


def _gemlite(weight: Any) -> Tensor:
    """4-bit weights of torchao's tensor for gemlite: rows of K packed together, scales and zeros [groups, n]."""
    k, n = weight.gemlite_kwargs["in_features"], weight.gemlite_kwargs["out_features"]
    bitpack = quiet_import("gemlite.bitpack")
    numbers = bitpack.unpack_over_rows(weight.qdata, W_nbits=4, num_output_rows=k, dtype=torch.uint8)  # [k, n]
    scale, zero = weight.scale.float().view(-1, 1, n), weight.zero_point.float().view(-1, 1, n)
    grouped = numbers.float().view(scale.shape[0], -1, n)
    fused = weight.gemlite_kwargs["W_group_mode"] == FUSED_ZERO
    dequantized: Tensor = grouped * scale + zero if fused else (grouped - zero) * scale
    return dequantized.view(k, n).T


# -- int4 in a kernel's own order --------------------------------------------------------------------------------------
# No operator takes the packed orders apart. Each is a permutation of nibbles inside a tile, so packing the nibbles of
# the positions' own numbers, a hexadecimal digit at a time, tells where each nibble goes.


def permutation(pack: Pack, n: int, k: int, device: torch.device) -> Tensor:
    """Where each stored nibble of a tile comes from: [n * k] int64, positions in the unpacked [n, k].

    ``pack`` takes a tile of numbers 0 to 15, [n, k] int32, and gives its nibbles in the order they are stored in.
    """
    position = torch.arange(n * k, device=device).view(n, k)
    source = torch.zeros(n * k, dtype=torch.int64, device=device)
    for shift in range(0, (n * k - 1).bit_length(), 4):
        source |= pack((position >> shift & 15).int()).flatten().long() << shift
    return source


def nibbles(packed: Tensor) -> Tensor:
    """[...] uint8 or int32 -> [..., 2 or 8]: the nibbles of each number, the lowest first."""
    shifts = torch.arange(0, 8 * packed.element_size(), 4, dtype=packed.dtype, device=packed.device)
    return packed[..., None] >> shifts & 15


BLOCK = 64
"""Rows that the CPU kernel packs together (aten/src/ATen/native/cpu/int4mm_kernel.cpp: 64 with AVX512, 32 with AVX2;
the rest of the rows by themselves)."""


def _pack_cpu(tile: Tensor) -> Tensor:
    return nibbles(torch.ops.aten._convert_weight_to_int4pack_for_cpu(tile, 1))


def _unpack_cpu(packed: Tensor) -> Tensor:
    """[n, k / 2] uint8, as _convert_weight_to_int4pack_for_cpu orders it -> [n, k] int64."""
    n, k = packed.shape[0], 2 * packed.shape[1]
    parts = []
    for block in (packed[: n - n % BLOCK], packed[n - n % BLOCK :]):
        if not len(block):
            continue
        height = min(BLOCK, block.shape[0])
        source = permutation(_pack_cpu, height, k, packed.device)
        stored = nibbles(block).view(-1, height * k)
        parts.append(torch.empty_like(stored).scatter_(1, source.expand_as(stored), stored).view(-1, k))
    return torch.cat(parts).long()


TILE = (8, 128)
"""[n, k] of one tile for inner_k_tiles = 8, which torchao fixes (int4_tile_packed_to_4d_tensor.py)."""


def pack_tile(tile: Tensor) -> Tensor:
    """One tile by the CUDA operator: [8, 128] int32 -> its nibbles as they are stored."""
    pairs = (tile[:, ::2] << 4 | tile[:, 1::2]).to(torch.uint8)
    return nibbles(torch.ops.aten._convert_weight_to_int4pack(pairs, 8))


def _unpack_tiles(packed: Tensor, pack: Pack) -> Tensor:
    """[n / 8, k / 128, 32, 4] int32 -> [n, k] int32, padding included."""
    down, across = packed.shape[:2]
    source = permutation(pack, *TILE, packed.device)
    stored = nibbles(packed).reshape(down, across, -1)
    tiles = torch.empty_like(stored).scatter_(2, source.expand_as(stored), stored)
    return tiles.view(down, across, *TILE).transpose(1, 2).reshape(down * TILE[0], across * TILE[1])


def tinygemm_tiles(packed: Tensor, scale_and_zero: Tensor, shape: Sequence[int]) -> Tensor:
    """[n / 8, k / 128, 32, 4] int32, padded, of a weight of ``shape`` [n, k] -> what the CUDA kernel multiplies with,
    [n, k] fp32."""
    return _tinygemm(_unpack_tiles(packed, pack_tile), scale_and_zero, shape)


def _tinygemm(numbers: Tensor, scale_and_zero: Tensor, shape: Sequence[int]) -> Tensor:
    """(q - 8) * scale + zero with scales and zeros [k / group, n, 2] (torchao pack_tinygemm_scales_and_zeros)."""
    n, k = shape
    scale, zero = scale_and_zero.float().transpose(0, 1).unbind(-1)  # [n, groups] each
    groups = scale.shape[1]
    grouped = (numbers.float() - 8).view(scale.shape[0], groups, -1)
    dequantized: Tensor = (grouped * scale[..., None] + zero[..., None]).flatten(1)[:n, :k]
    return dequantized
