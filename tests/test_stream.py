"""Weights in the order of the decode kernels: read as a lane of a warp reads them, and back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import model
from torch import nn

from lowbit.errors import LowbitError
from lowbit.kernels import modules, stream, stream_modules
from lowbit.kernels.bits import unpack
from lowbit.kernels.modules import NativeLinear
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.stream import LAYOUTS
from lowbit.kernels.stream_modules import StreamLinear

FORMATS = sorted(LAYOUTS)


def packed(name, n=48, k=512, seed=0):
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    return quantize((torch.randn(n, k) * 0.1).to(dtype), name, search=False)


def same(a, b):
    return a.tensors().keys() == b.tensors().keys() and all(
        torch.equal(one, b.tensors()[name]) for name, one in a.tensors().items()
    )


# -- what a lane reads, written down from cuda/product.cu and not from the packing -------------------------------------


def lane_codes(words, layout, lane, block):
    """A lane's codes of a block, for rows g and g + 8: [2, columns]. ``words``: the stage as uint32.

    16 bits: a block has 32 columns, 8 of them the lane's; else 64, of which 16."""
    quad = words.reshape(-1, 32, 4)[:, lane]  # the 16 bytes that this lane loads at a time
    bits, rows = layout.bits, (0, 1)
    if bits == 16:  # two loads per block, 4 columns each; word = high, then the pair
        words = [quad[block * 2], quad[block * 2 + 1]]
        places = [[(words[c // 4][high + 2 * (c % 4 // 2)], 16 * (c % 2)) for c in range(8)] for high in rows]
    elif bits == 8:  # a load per row
        places = [[(quad[block * 2 + high][c // 4], 8 * (c % 4)) for c in range(16)] for high in rows]
    elif layout.e2m1:  # a word: 4 columns of row g, then of row g + 8
        places = [[(quad[block][c // 4], 16 * high + 4 * (c % 4)) for c in range(16)] for high in rows]
    elif bits == 4:  # a byte per column: row g low, row g + 8 high
        places = [[(quad[block][c // 4], 8 * (c % 4) + 4 * high) for c in range(16)] for high in rows]
    elif bits == 2:  # a byte per column and that of the next block
        places = [
            [(quad[block // 2][c // 4], 8 * (c % 4) + 4 * (block % 2) + 2 * high) for c in range(16)] for high in rows
        ]
    elif bits == 1:  # a byte per column of four blocks
        places = [[(quad[block // 4][c // 4], 8 * (c % 4) + 4 * high + block % 4) for c in range(16)] for high in rows]
    else:
        return lane_threes(quad, block)
    return np.array([[int(word) >> shift & ((1 << bits) - 1) for word, shift in row] for row in places])


def lane_threes(quad, block):
    """3 bits: a plane of two, then one of single bits; which bits of a code lie where goes by the block."""
    ones = quad[len(quad) * 2 // 3 :][block // 4]
    found = np.zeros((2, 16), dtype=np.int64)
    for high in (0, 1):
        for c in range(16):
            two = int(quad[block // 2][c // 4]) >> (8 * (c % 4) + 4 * high + 2 * (block % 2)) & 3
            one = int(ones[c // 4]) >> (8 * (c % 4) + 4 * high + (2, 1, 3, 0)[block % 4]) & 1
            found[high, c] = 2 * two + one if block % 2 else two + 4 * one
    return found


def lane_columns(layout, quarter, block):
    """Where in the stage the columns of a lane's block lie."""
    if layout.bits == 16:
        return np.arange(8) + block * 32 + quarter * 8
    if layout.group == 32:
        return np.concatenate([np.arange(8), np.arange(32, 40)]) + block * 64 + quarter * 8
    return np.arange(16) + block * 64 + quarter * 16


def stored_scales(stage, size, layout, ku, g, high, column):
    """The numbers of a row and column of a stage, as stored: a scale, and a zero if there are such."""
    kind = {1: np.uint8, 2: np.float16, 4: np.float16}[layout.scale_bytes]
    found = stage[size:].view(kind).reshape(-1, 2 if layout.zeroed else 1)
    if layout.group == 16:
        return found[((g * 4 + column % 64 // 16) * (ku // 64) + column // 64) * 2 + high]
    subs = 128 // layout.group
    return found[((column // 128 * 8 + g) * subs + column % 128 // layout.group) * 2 + high]


@pytest.mark.parametrize("name", FORMATS)
def test_a_lane_finds_its_codes_and_scales_where_the_kernel_looks(name):
    want = packed(name)
    found = stream.pack_stream(want)
    layout, ku = found.layout, found.ku
    canonical = (
        want.codes.contiguous().view(torch.int16).numpy().astype(np.int64) & 0xFFFF
        if layout.bits == 16
        else unpack(want.codes, layout.bits).numpy()
    )
    size = 2 * ku * layout.bits
    for tile, chunk in ((0, 0), (found.tiles - 1, want.k // ku - 1)):
        stage = found.data[tile, chunk].numpy()
        words = stage[:size].view(np.uint32)
        for lane in (0, 5, 31):
            g = lane // 4
            for block in range(ku // (32 if layout.bits == 16 else 64)):
                columns = lane_columns(layout, lane % 4, block)
                rows = canonical[[tile * 16 + g, tile * 16 + g + 8]][:, chunk * ku + columns]
                flip = 128 if name == "int8" else 0  # canonical codes are q + 128, the stream's two's complement
                assert (lane_codes(words, layout, lane, block) == rows.astype(np.int64) ^ flip).all()
                for column in columns[[0, -1]] if layout.grouped else ():
                    for high in (0, 1):
                        pair = stored_scales(stage, size, layout, ku, g, high, column)
                        at = tile * 16 + g + 8 * high, (chunk * ku + column) // layout.group
                        assert pair[0] == want.scale.numpy()[at]
                        assert want.zero is None or pair[1] == want.zero.numpy()[at]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [48, 40])  # 40 rows: the last tile is padded
def test_a_stream_comes_back_bit_for_bit(name, n):
    want = packed(name, n=n, k=768)
    assert same(stream.own_scale(stream.unpack_stream(stream.pack_stream(want))), want)


def test_a_large_matrix_is_reordered_in_pieces(monkeypatch):
    want = packed("int4_g128", n=160)
    whole = stream.pack_stream(want)
    monkeypatch.setattr(stream, "CHUNK_WEIGHTS", 32 * 512)
    assert torch.equal(stream.pack_stream(want).data, whole.data)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_added_to_the_stored_bytes(name):
    want = packed(name, n=64, k=1024)
    found = stream.pack_stream(want)
    stored = sum(t.numel() * t.element_size() for t in want.tensors().values())
    beside = 0 if want.scale is None or found.layout.grouped else want.scale.numel() * 4  # found.row_scale
    beside += 4 if want.tensor_scale is not None else 0
    assert found.data.numel() == stored - beside
    rows = 4 * 64 if found.row_scale is not None else 0
    per_row = 0 if found.layout.grouped else 32 / 1024
    assert 8 * (found.data.numel() + rows) / (64 * 1024) == pytest.approx(
        want.row.stored_bits(1024) + (32 / 1024 if want.tensor_scale is not None else 0), abs=per_row
    )


def test_stages_are_as_wide_as_k_allows():
    assert stream.stage_columns("int2_g128", 4096) == 1024
    assert stream.stage_columns("int2_g128", 14336) == 1024
    assert stream.stage_columns("int2_g128", 768) == 256
    assert stream.stage_columns("bf16", 4096) == 256
    with pytest.raises(LowbitError, match=r"K=384"):
        stream.stage_columns("int4_g128", 384)
    with pytest.raises(LowbitError, match="no decode kernel streams int3_zp_g32; there are ones for bf16"):
        stream.stage_columns("int3_zp_g32", 4096)
    assert stream.streamable("int8", 512)
    assert not stream.streamable("int8", 640)
    assert not stream.streamable("int4_zp_g64", 512)


# -- several matrices in one stream ------------------------------------------------------------------------------------


def native_layer(name, dtype):
    made = model(dtype).model.layers[0]
    for parent in list(made.modules()):
        for path, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, path, NativeLinear(quantize(child.weight.detach(), name, search=False)))
    return made


@pytest.mark.parametrize("name", ["int4_g128", "int4_sym_g32", "int3_g128", "nvfp4", "ternary", "bf16"])
def test_linears_that_share_x_share_a_stream_and_keep_their_rows(name):
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    layer = native_layer(name, dtype)
    before = {path: module.packed for path, module in modules.packed_modules(layer).items()}
    assert stream_modules.attach(layer, lambda module: module.packed if isinstance(module, NativeLinear) else None) == 7
    after = {path: module for path, module in modules.packed_modules(layer).items()}
    assert after.keys() == before.keys()
    for path, module in after.items():
        assert isinstance(module, StreamLinear)
        assert same(module.packed, before[path]), path
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.q_proj.part.stream is attention.k_proj.part.stream is attention.v_proj.part.stream
    assert mlp.gate_proj.part.stream is mlp.up_proj.part.stream
    assert attention.o_proj.part.stream is not attention.q_proj.part.stream


@pytest.mark.parametrize("name", ["int8", "int4_g128", "nvfp4", "int3_g128"])
def test_any_rows_of_a_linear_come_back_from_their_tiles_alone(name, monkeypatch):
    layer = native_layer(name, torch.float16)
    before = {path: module.packed for path, module in modules.packed_modules(layer).items()}
    stream_modules.attach(layer, lambda module: module.packed if isinstance(module, NativeLinear) else None)
    for path, module in modules.packed_modules(layer).items():
        for start, stop in ((0, module.n), (8, 24), (5, 6), (module.n - 17, module.n)):
            assert same(module.rows(start, stop), before[path].rows(start, stop)), (path, start, stop)
    monkeypatch.setattr(stream_modules, "CHUNK_WEIGHTS", 40 * 256)
    assert all(same(module.packed, before[path]) for path, module in modules.packed_modules(layer).items())
    tiles = []
    unpack_stream = stream.unpack_stream
    monkeypatch.setattr(stream_modules, "unpack_stream", lambda part: tiles.append(part.tiles) or unpack_stream(part))
    layer.mlp.up_proj.rows(8, 24)
    layer.self_attn.v_proj.rows(8, 24)
    assert tiles == [2, 2]


def test_a_tile_of_gate_and_up_holds_8_rows_of_each():
    gate, up = packed("int8", 32, 256, seed=1), packed("int8", 32, 256, seed=2)
    woven = stream.interleave(gate, up)
    assert torch.equal(woven.codes[16:24], gate.codes[8:16])
    assert torch.equal(woven.codes[24:32], up.codes[8:16])
    with pytest.raises(LowbitError, match="as many rows"):
        stream.interleave(gate, packed("int8", 48, 256))


def test_a_half_quantized_group_stays_linears_of_their_own():
    layer = native_layer("int8", torch.float16)
    skipped = layer.self_attn.k_proj
    left = stream_modules.attach(
        layer, lambda m: m.packed if isinstance(m, NativeLinear) and m is not skipped else None
    )
    assert left == 4
    assert all(isinstance(getattr(layer.self_attn, name), NativeLinear) for name in ("q_proj", "k_proj", "v_proj"))
    assert isinstance(layer.self_attn.o_proj, StreamLinear)


def test_one_product_has_one_format():
    with pytest.raises(LowbitError, match="one format and K, got int8 K=256, int4_g128 K=256"):
        stream.concatenate([packed("int8", 16, 256), packed("int4_g128", 16, 256)])


@pytest.mark.parametrize("name", ["int4_g128", "int4_sym_g64", "mxfp4", "nvfp4", "int3_g128", "binary"])
def test_a_streamed_linear_is_saved_as_every_packed_one(name):
    linear = NativeLinear(packed(name))
    part = stream_modules.StreamPart(stream.pack_stream(linear.packed), linear.n)
    streamed = StreamLinear(part)
    want = {name: tensor for name, tensor in linear.state_dict().items() if tensor.numel()}
    got = streamed.state_dict()
    assert got.keys() == linear.packed.tensors().keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
