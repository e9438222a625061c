# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton kernels on packed weights as kernels/weights stores them. Imported where Triton is; ``triton_linear`` asks.

Codes become fp32 without a conversion instruction, which runs at a quarter of the rate or less. An integer is left
where it stands in its word and put into the mantissa of 2^23: one logic operation, and one multiply-add takes the 2^23
away, shifts and adds the offset, all exact. The bits of a small float go to the top of an fp32, whose exponent is then
wrong by a constant; one product mends it.

``magic`` is MAGIC, the bits of 2^23: the GEMV has it as an argument, for of two constants ptxas makes two logic
operations. The small GEMM keeps the constant: for 8 bits it is faster (gate_proj on an H200 25.7 µs, not 32.5).
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(0x4B000000)

PLAIN, E4M3, E2M1, E8M0 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""What a code or a scale is: an integer or a number as stored, an 8-bit or 4-bit float, or the exponent of 2 alone."""


@triton.jit
def _whole(word, magic, AT: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, STEP: tl.constexpr):
    """Code · STEP + OFFSET of the field at bit AT (up to bit 22), int32 -> fp32."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << AT
    UNIT: tl.constexpr = STEP / (1 << AT)
    shifted = ((word & MASK) | magic).to(tl.float32, bitcast=True)
    if STEP == 1:
        value = shifted * UNIT + (OFFSET - 8388608.0 * UNIT)
    else:  # 2^24 + 1 is no fp32
        value = (shifted * UNIT - 8388608.0 * UNIT) + OFFSET
    return value


@triton.jit
def _e2m1(word, AT: tl.constexpr):
    """The e2m1 code at bit AT. Its exponent's bias is 1 and fp32's 127."""
    code = word >> AT
    return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def _e4m3(byte):
    """Bytes of e4m3, int32. Its exponent's bias is 7 and fp32's 127; no NaN is stored."""
    return (((byte & 0x80) << 24) | ((byte & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _field(
    word,
    magic,
    AT: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    STEP: tl.constexpr,
):
    return _e2m1(word, AT) if KIND == E2M1 else _whole(word, magic, AT, BITS, OFFSET, STEP)


@triton.jit
def eight(word, magic, BITS: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, STEP: tl.constexpr):
    """[r, words] int32 of 8 codes each -> [r, 8 · words] fp32 in the order of k. A join puts its second part last."""
    high = word >> (4 * BITS)
    v04 = tl.join(_field(word, magic, 0, BITS, KIND, OFFSET, STEP), _field(high, magic, 0, BITS, KIND, OFFSET, STEP))
    v15 = tl.join(
        _field(word, magic, BITS, BITS, KIND, OFFSET, STEP), _field(high, magic, BITS, BITS, KIND, OFFSET, STEP)
    )
    v26 = tl.join(
        _field(word, magic, 2 * BITS, BITS, KIND, OFFSET, STEP),
        _field(high, magic, 2 * BITS, BITS, KIND, OFFSET, STEP),
    )
    v37 = tl.join(
        _field(word, magic, 3 * BITS, BITS, KIND, OFFSET, STEP),
        _field(high, magic, 3 * BITS, BITS, KIND, OFFSET, STEP),
    )
    values = tl.join(tl.join(v04, v26), tl.join(v15, v37))
    return tl.reshape(values, (word.shape[0], word.shape[1] * 8))


@triton.jit
def load(where, keep):
    """What is at ``where``, zero where ``keep`` is false; None: everything is there."""
    return tl.load(where, mask=keep, other=None if keep is None else 0)


@triton.jit
def load_words(codes, where, keep, BITS: tl.constexpr):
    """Words of 8 codes, int32: one at ``where`` for 4, 2 and 1 bits, three bytes there for 3."""
    if BITS == 3:
        word = load(codes + 3 * where, keep).to(tl.int32)
        word |= load(codes + 3 * where + 1, keep).to(tl.int32) << 8
        word |= load(codes + 3 * where + 2, keep).to(tl.int32) << 16
    else:
        word = load(codes + where, keep).to(tl.int32)
    return word


@triton.jit
def from_bytes(byte, magic, KIND: tl.constexpr, OFFSET: tl.constexpr, STEP: tl.constexpr):
    """Codes of 8 bits, int32 -> fp32."""
    return _e4m3(byte) if KIND == E4M3 else _whole(byte, magic, 0, 8, OFFSET, STEP)


@triton.jit
def _values(
    codes,
    rows,
    n,
    k0,
    k,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    STEP: tl.constexpr,
    BK: tl.constexpr,
):
    """What the codes of ``rows`` [BN] and columns k0 .. k0 + BK stand for, before any scale: [BN, BK] fp32.

    ``codes`` are words of 8 codes (4 bits: int32, 2: int16, 1: bytes), but bytes for 8 bits and, three a word, for 3.
    """
    there = (rows < n)[:, None]
    if BITS == 8:
        at = k0 + tl.arange(0, BK)[None, :]
        byte = load(codes + rows.to(tl.int64)[:, None] * k + at, there & (at < k)).to(tl.int32)
        values = from_bytes(byte, MAGIC, KIND, OFFSET, STEP)
    else:
        words = k // 8
        at = k0 // 8 + tl.arange(0, BK // 8)[None, :]
        word = load_words(codes, rows.to(tl.int64)[:, None] * words + at, there & (at < words), BITS)
        values = eight(word, MAGIC, BITS, KIND, OFFSET, STEP)
    return values


@triton.jit
def scale_of(stored, KIND: tl.constexpr):
    """Scales as stored -> fp32."""
    if KIND == E4M3:
        value = _e4m3(stored.to(tl.int32))
    elif KIND == E8M0:  # 2^(byte - 127); 2^-127 is no normal number
        byte = stored.to(tl.int32)
        value = tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)
    else:
        value = stored.to(tl.float32)
    return value


@triton.jit
def _scales(scale, rows, n, group0, groups, NG: tl.constexpr, KIND: tl.constexpr):
    """Scales (or zeros) of NG groups from group0 on: [BN, NG] fp32."""
    at = group0 + tl.arange(0, NG)[None, :]
    keep = (rows < n)[:, None] & (at < groups)
    return scale_of(load(scale + rows.to(tl.int64)[:, None] * groups + at, keep), KIND)


@triton.jit
def _dequantized(w, scale, zero, tensor_scale, rows, n, k0, groups, SCALE: tl.constexpr, GROUP: tl.constexpr):
    """Values [BN, BK] with the scale and zero of their groups."""
    NG: tl.constexpr = w.shape[1] // GROUP
    found = _scales(scale, rows, n, k0 // GROUP, groups, NG, SCALE)
    if tensor_scale is not None:
        found *= tl.load(tensor_scale)
    grouped = tl.reshape(w, (w.shape[0], NG, GROUP)) * found[:, :, None]
    if zero is not None:
        grouped += _scales(zero, rows, n, k0 // GROUP, groups, NG, PLAIN)[:, :, None]
    return tl.reshape(grouped, (w.shape[0], w.shape[1]))


@triton.jit
def gemm(
    x,
    codes,
    scale,
    zero,
    tensor_scale,
    out,
    m,
    n,
    k,
    groups,
    per_split,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    MP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x [m, k], m <= MP, times BN rows of the weight -> out [splits, m, n]: program (rows, part of K).

    Tensor cores multiply the codes' values, which x's dtype holds exactly; a group's scale, and its zero times the sum
    of its x, come to its partial sum in fp32. BK is a group. GROUP 0: a row is one, whose scale,
    if it has no zero, comes last.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    batch = tl.arange(0, MP)
    first = tl.program_id(1) * per_split
    total = tl.zeros((BN, MP), tl.float32)
    SCALED: tl.constexpr = GROUP > 0 or zero is not None
    for block in range(first, tl.minimum(first + per_split, tl.cdiv(k, BK))):
        k0 = block * BK
        ks = k0 + tl.arange(0, BK)
        xs = tl.load(x + batch[None, :] * k + ks[:, None], mask=(batch < m)[None, :] & (ks < k)[:, None], other=0)
        w = _values(codes, rows, n, k0, k, BITS, KIND, OFFSET, STEP, BK).to(xs.dtype)
        if SCALED:
            group = block if GROUP > 0 else 0
            total += tl.dot(w, xs) * _scales(scale, rows, n, group, groups, 1, SCALE)
            if zero is not None:
                sums = tl.sum(xs.to(tl.float32), 0)
                total += _scales(zero, rows, n, group, groups, 1, PLAIN) * sums[None, :]
        else:
            total = tl.dot(w, xs, total)
    if not SCALED:
        total *= _scales(scale, rows, n, 0, 1, 1, PLAIN)
    if tensor_scale is not None:
        total *= tl.load(tensor_scale)
    at = (tl.program_id(1) * m + batch).to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(batch < m)[None, :] & (rows < n)[:, None])


@triton.jit
def unpack(
    codes,
    scale,
    zero,
    tensor_scale,
    out,
    n,
    k,
    groups,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The weight in out's dtype, [n, k], rounded once from fp32: program (block of rows, block of columns)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    ks = k0 + tl.arange(0, BK)
    w = _values(codes, rows, n, k0, k, BITS, KIND, OFFSET, STEP, BK)
    if GROUP > 0:
        w = _dequantized(w, scale, zero, tensor_scale, rows, n, k0, groups, SCALE, GROUP)
    else:
        w *= _scales(scale, rows, n, 0, 1, 1, PLAIN)
        if zero is not None:
            w += _scales(zero, rows, n, 0, 1, 1, PLAIN)
    at = rows.to(tl.int64)[:, None] * k + ks[None, :]
    tl.store(out + at, w.to(out.dtype.element_ty), mask=(rows < n)[:, None] & (ks < k)[None, :])
