from __future__ import annotations

import itertools
import math

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.quiet import quiet_import
from lowbit.reference import integer, packing
from lowbit.reference.minifloat import E2M3, E3M2, e8m0, mx_round, mx_scale

KINDS = pytest.mark.parametrize("kind", [E3M2, E2M3], ids=lambda kind: kind.name)
CODES = torch.arange(64, dtype=torch.uint8)


def value_of(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """A 6-bit float by its definition, in Python's numbers."""
    bias = 2 ** (exponent_bits - 1) - 1
    sign, exponent = code >> 5, code >> mantissa_bits & (2**exponent_bits - 1)
    mantissa = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    magnitude = mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias)
    return -magnitude if sign else magnitude


def values_of(kind):
    return torch.tensor([value_of(code, kind.exponent_bits, kind.mantissa_bits) for code in range(64)])


# -- packing -----------------------------------------------------------------------------------------------------------


def test_every_code_packs_into_6_bits_beside_every_other():
    pairs = torch.tensor(list(itertools.product(range(64), repeat=2)), dtype=torch.uint8)
    for codes in (pairs.repeat(1, 2), pairs.flip(1).repeat_interleave(2, dim=1)):
        packed = packing.pack6(codes)
        assert packed.shape == (64 * 64, 3)
        assert torch.equal(packing.unpack6(packed), codes)


def test_the_first_code_takes_the_lowest_bits():
    codes = torch.tensor([0b000001, 0b000010, 0b000011, 0b100000], dtype=torch.uint8)
    word = 0b000001 | 0b000010 << 6 | 0b000011 << 12 | 0b100000 << 18
    assert packing.pack6(codes).tolist() == list(word.to_bytes(3, "little"))
    assert packing.pack4(torch.tensor([1, 15], dtype=torch.uint8)).tolist() == [0xF1]
    assert packing.pack1(torch.tensor([1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8)).tolist() == [0b11000001]
    assert packing.pack_trits(torch.tensor([2, 0, 0, 0, 1, 2], dtype=torch.uint8)).tolist() == [2 + 81, 2]


def test_smaller_codes_come_back_too():
    nibbles = torch.tensor(list(itertools.product(range(16), repeat=2)), dtype=torch.uint8)
    assert torch.equal(packing.unpack4(packing.pack4(nibbles)), nibbles)
    bits = torch.tensor(list(itertools.product(range(2), repeat=8)), dtype=torch.uint8)
    assert torch.equal(packing.unpack1(packing.pack1(bits)), bits)
    trits = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)
    assert sorted(packing.pack_trits(trits).flatten().tolist()) == list(range(243))
    for count in (5, 6, 9):
        codes = trits.repeat(1, 2)[:, :count]
        assert torch.equal(packing.unpack_trits(packing.pack_trits(codes), count), codes)


def test_a_row_that_fills_no_whole_bytes_is_refused():
    with pytest.raises(LowbitError, match="6-bit codes come in groups of 4: got a last dimension of 6"):
        packing.pack6(torch.zeros(2, 6, dtype=torch.uint8))


# -- 6-bit floats ------------------------------------------------------------------------------------------------------


@KINDS
def test_every_code_means_what_the_specification_says(kind):
    want = values_of(kind)
    got = kind.decode(CODES)
    assert torch.equal(got, want)
    assert torch.equal(torch.signbit(got), torch.signbit(want))  # there is a negative zero
    assert torch.equal(kind.encode(want), CODES)
    assert torch.equal(kind.round(want), want)


def test_the_limits_of_the_types():
    """Table 3 of the specification."""
    for kind, largest, smallest_normal, largest_subnormal, smallest in (
        (E3M2, 28.0, 0.25, 0.1875, 0.0625),
        (E2M3, 7.5, 1.0, 0.875, 0.125),
    ):
        values = kind.decode(CODES)[:32].tolist()
        first_normal = 1 << kind.mantissa_bits
        assert (kind.max, values[31]) == (largest, largest)
        assert (values[first_normal], values[first_normal - 1], values[1]) == (
            smallest_normal,
            largest_subnormal,
            smallest,
        )


@KINDS
def test_a_midpoint_goes_to_the_even_code_and_its_neighbours_to_the_nearest(kind):
    values = values_of(kind)[:32]
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    codes = kind.encode(kind.round(middle))
    assert torch.equal(codes % 2, torch.zeros(31, dtype=torch.uint8))
    assert torch.all((codes == CODES[:31]) | (codes == CODES[1:32]))
    assert torch.equal(kind.round(torch.nextafter(middle, high)), high)
    assert torch.equal(kind.round(torch.nextafter(middle, low)), low)
    assert torch.equal(kind.round(-middle), -kind.round(middle))


@KINDS
def test_what_is_too_large_becomes_the_largest_and_nan_stays(kind):
    large = torch.tensor([kind.max, torch.nextafter(torch.tensor(kind.max), torch.tensor(1e9)).item(), 1e30, torch.inf])
    assert torch.equal(kind.round(large), torch.full((4,), kind.max))
    assert torch.equal(kind.round(-large), torch.full((4,), -kind.max))
    tiny = torch.tensor([1e-45, 1e-38, 2.0**-126, kind.decode(CODES)[1].item() / 2])
    assert torch.equal(kind.round(tiny), torch.zeros(4))
    assert kind.round(torch.tensor([torch.nan])).isnan().all()


@KINDS
def test_rounding_is_that_of_torchao(kind):
    fp = quiet_import("torchao.prototype.custom_fp_utils")
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20000) * scale for scale in (0.05, 1.0, 10.0)])
    assert torch.equal(
        kind.encode(kind.round(x)), fp._f32_to_floatx_unpacked(x, kind.exponent_bits, kind.mantissa_bits)
    )


# -- E8M0 and blocks ---------------------------------------------------------------------------------------------------


def test_every_scale_byte_is_its_power_of_two():
    values = e8m0(torch.arange(256, dtype=torch.uint8)).tolist()
    assert values[:255] == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(values[255])


@KINDS
@pytest.mark.parametrize("largest", [1.0, 1.999, 2.0, 3.0, 0.02, 1e-30, 1e30])
def test_a_block_is_scaled_by_its_largest_magnitude(kind, largest):
    block = torch.full((1, 32), -largest / 3)
    block[0, 7] = largest
    want = math.floor(math.log2(torch.tensor(largest).item())) - kind.emax
    assert mx_scale(block, kind).item() - 127 == want
    # The largest element is kept to half a step of its binade, or saturates below the next power of two.
    got = mx_round(block, kind)[0, 7].item()
    step = 2.0 ** (want + kind.emax - kind.mantissa_bits)
    assert abs(got - largest) <= max(step / 2, largest - kind.max * 2.0**want)


@KINDS
def test_a_block_of_zeros_stays_and_a_neighbour_does_not_matter(kind):
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    x[:, :32] = 0
    x[1, 40] = 1e4
    rounded = mx_round(x, kind)
    assert torch.equal(rounded[:, :32], torch.zeros(4, 32))
    assert torch.equal(rounded[0], mx_round(x[:1], kind)[0])
    assert rounded[1, 40] == pytest.approx(1e4, rel=0.2)


@KINDS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_nan_or_inf_is_nan_and_no_other(kind, bad):
    x = torch.ones(1, 64)
    x[0, 3] = bad
    rounded = mx_round(x, kind)
    assert rounded[0, :32].isnan().all()
    assert torch.equal(rounded[0, 32:], torch.ones(32))


# -- integers ----------------------------------------------------------------------------------------------------------


def test_int4_is_absmax():
    codes, scale = integer.int4(torch.tensor([[7.0, -7.0, 3.4, 2.5, -2.5, 0.0]]), torch.float32)
    assert scale.item() == 1
    assert codes.tolist() == [[7, -7, 3, 2, -2, 0]]
    codes, scale = integer.int4(torch.zeros(2, 4), torch.bfloat16)
    assert not (codes * scale).any()


def test_ternary_is_absmean():
    codes, scale = integer.ternary(torch.tensor([[4.0, -2.0, 1.0, 0.9, 0.0, -0.1]]), torch.float32)
    assert scale.item() == pytest.approx(8 / 6)
    assert codes.tolist() == [[1, -1, 1, 1, 0, 0]]
    codes, scale = integer.ternary(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.float32, (-2, -1))
    assert scale.tolist() == [[1.0]]


def test_binary_is_sign_times_mean():
    codes, scale = integer.binary(torch.tensor([[4.0, -2.0, 0.0]]), torch.float32)
    assert (codes * scale).tolist() == [[2.0, -2.0, 2.0]]


@pytest.mark.parametrize("quantize", [integer.int4, integer.ternary, integer.binary])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_integers_do_not_hide_what_is_not_finite(quantize, bad):
    codes, scale = quantize(torch.tensor([[1.0, bad]]), torch.float32)
    assert not torch.isfinite(codes * scale)[0, 1]
