"""The weight formats' storage: packing of bits, meaning of codes, products and rows of packed matrices."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.kernels import (
    WEIGHT_FORMATS,
    Packed,
    dequantize,
    embedding,
    find,
    matmul,
    matvec,
    pack,
    quantize,
    specs,
    unpack,
)
from lowbit.kernels import bits as bytewise
from lowbit.kernels import weights as module

NAMES = list(WEIGHT_FORMATS)
LOW = [row for row in WEIGHT_FORMATS.values() if row.kind != "bf16"]


def random_packed(name, n=16, k=256, seed=0):
    """A packed matrix of random bits and moderate scales: what a GPU kernel is tested with, too."""
    row, generator = find(name), torch.Generator().manual_seed(seed)
    parts = {}
    for part, (shape, dtype) in specs(name, n, k).items():
        if part == "codes" and row.kind == "bf16":
            parts[part] = torch.randn(n, k, generator=generator).to(torch.bfloat16).view(torch.uint8)
        elif part == "codes":
            codes = torch.randint(0, row.levels + 1, (n, k), generator=generator).to(torch.uint8)
            if row.kind == "e4m3":
                codes[codes & 127 == 127] = 0  # NaN
            parts[part] = pack(codes, row.bits)
        else:
            meant = row.scale if part == "scale" else dtype
            parts[part] = (torch.rand(shape, generator=generator) + 0.5).to(meant).view(dtype)
    return Packed(name, n, k, **parts)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_at_every_place_of_a_block_survives(bits):
    per_block = bytewise._block(bits)[0]
    values = torch.zeros(1 << bits, per_block, per_block, dtype=torch.uint8)
    for code in range(1 << bits):
        for place in range(per_block):
            values[code, place, place] = code
    assert torch.equal(unpack(pack(values, bits), bits), values)
    whole = torch.randint(0, 1 << bits, (3, 7 * per_block), dtype=torch.uint8)
    assert torch.equal(unpack(pack(whole, bits), bits), whole)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_is_one_little_endian_number(bits):
    values = torch.randint(0, 1 << bits, (48,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    number = sum(int(value) << (bits * index) for index, value in enumerate(values))
    assert bytes(pack(values, bits).tolist()) == number.to_bytes(48 * bits // 8, "little")


def test_three_bits_take_three():
    assert pack(torch.zeros(4, 128, dtype=torch.uint8), 3).shape == (4, 48)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("int4_g128", list(range(16))),
        ("int4_sym_g128", list(range(-8, 8))),
        ("int3_g128", list(range(8))),
        ("int2_g128", [0, 1, 2, 3]),
        ("binary", [-1, 1]),
        ("mxfp4", [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]),
        ("int8", list(range(-128, 128))),
    ],
)
def test_the_value_of_every_code(name, values):
    row = find(name)
    codes = torch.arange(1 << row.bits, dtype=torch.uint8).repeat(128)
    got = module.code_values(pack(codes, row.bits), row)
    assert got.tolist() == values * 128


def test_ternary_uses_three_codes():
    assert find("ternary").levels == 2
    assert module.code_values(pack(torch.tensor([0, 1, 2, 1], dtype=torch.uint8), 2), find("ternary")).tolist() == [
        *(-1, 0, 1, 0)
    ]


def test_e4m3_codes_mean_what_the_specification_says():
    # OCP 8-bit floating point specification 1.0: bias 7, no infinities, S.1111.111 is NaN
    got = module.code_values(torch.arange(256, dtype=torch.uint8), find("fp8_e4m3"))
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = (
            Fraction(mantissa, 8) * Fraction(2) ** -6
            if exponent == 0
            else (1 + Fraction(mantissa, 8)) * (Fraction(2) ** (exponent - 7))
        )
        if code & 127 == 127:
            assert got[code].isnan()
        else:
            assert got[code] == float(value) * (-1 if code & 128 else 1)


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_is_the_formula_weight_by_weight(name):
    packed = random_packed(name, n=3, k=256)
    row = packed.row
    values = module.code_values(packed.codes, row)
    got = dequantize(packed)
    assert got.dtype == torch.float32
    for r, c in ((0, 0), (0, 255), (1, 128), (2, 127), (2, 31)):
        want = float(values[r, c])
        group = 0 if row.group_size is None else c // row.group_size
        if packed.scale is not None:
            want *= float(module.scale_values(packed.scale, row)[r, group])
        if packed.tensor_scale is not None:
            want *= float(packed.tensor_scale)
        if packed.zero is not None:
            want += float(packed.zero[r, group])
        assert float(got[r, c]) == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_e8m0_scales_reach_both_ends():
    scale = torch.tensor([[0, 127, 254]], dtype=torch.uint8)
    codes = pack(torch.full((1, 96), 2, dtype=torch.uint8), 4)
    got = dequantize(Packed("mxfp4", 1, 96, codes, scale))
    assert got[0, ::32].tolist() == [2.0**-127, 1.0, 2.0**127]


@pytest.mark.parametrize("name", NAMES)
def test_products_and_rows_agree_with_the_dequantized_matrix(name, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5 * 256)  # several chunks, the last one short
    packed = random_packed(name)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    whole = dequantize(packed)
    assert torch.allclose(matmul(x, packed), x @ whole.T, rtol=1e-5, atol=1e-4)
    assert torch.allclose(matvec(x[0], packed), whole @ x[0], rtol=1e-5, atol=1e-4)
    assert matmul(x.to(torch.bfloat16), packed).dtype == torch.float32
    ids = torch.tensor([[3, 0], [15, 3]])
    assert torch.equal(embedding(ids, packed), whole[ids])
    assert torch.equal(dequantize(packed.rows(4, 9)), whole[4:9])


@pytest.mark.parametrize("name", NAMES)
def test_stored_bits_are_those_of_the_tensors(name):
    packed = random_packed(name)
    tensor_scale = 4 if packed.tensor_scale is not None else 0
    assert packed.nbytes == pytest.approx(packed.row.stored_bits(256) * 16 * 256 / 8 + tensor_scale)
    assert packed.to("cpu").nbytes == packed.nbytes


@pytest.mark.parametrize("row", [row for row in LOW if row.group_size], ids=lambda row: row.name)
def test_a_group_that_does_not_divide_is_refused(row):
    k = row.group_size * 2 + 8
    with pytest.raises(LowbitError, match=rf"{row.name} stores rows in groups of {row.group_size}: .*K={k}, which"):
        quantize(torch.zeros(4, k), row.name)


def test_a_row_that_fills_no_whole_bytes_is_refused():
    with pytest.raises(LowbitError, match=r"ternary stores rows in whole bytes \(4 values\): .*K=6"):
        quantize(torch.zeros(4, 6), "ternary")
    with pytest.raises(LowbitError, match=r"binary stores rows in whole bytes \(8 values\): .*K=12"):
        quantize(torch.zeros(4, 12), "binary")


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(LowbitError, match=r"unknown weight format 'int5'; known: .*int4_g128.*ternary"):
        find("int5")


def test_check_names_what_is_wrong():
    packed = random_packed("int4_g128")
    packed.check()
    with pytest.raises(LowbitError, match=r"layer 3 \[16, 256\] in int4_g128: expected .*got "):
        dataclasses.replace(packed, zero=None).check("layer 3")
    with pytest.raises(LowbitError, match=r"expected .*torch\.float16.*got .*torch\.float32"):
        dataclasses.replace(packed, scale=packed.scale.float()).check()
