# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""The Triton kernel for few vectors, up to 4 a program: dequantized in registers, multiplied and added in fp32.

A thread reads EACH words of 8 codes from each of BN rows, and the x that belongs to them, 8 numbers per word, as it
lies in memory: nothing is exchanged between threads before the end. What a word gives is added up in its thread and
multiplied by its group's scale once; so a code costs one logic operation and two multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.triton_source import PLAIN, eight, from_bytes, load, load_words, scale_of


@triton.jit
def _codes(codes, row, words, keep, k, BITS: tl.constexpr):
    """8 codes of a row for each of ``words`` [t]: a word, or for 8 bits bytes [t, 8]; int32."""
    if BITS == 8:
        at = 8 * words[:, None] + tl.arange(0, 8)[None, :]
        found = load((codes + row.to(tl.int64) * k) + at, None if keep is None else at < k).to(tl.int32)
    else:
        per_word: tl.constexpr = 3 if BITS == 3 else 1
        found = load_words(codes + per_word * row.to(tl.int64) * (k // 8), words, keep, BITS)
    return found


@triton.jit
def _values(found, magic, BITS: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, STEP: tl.constexpr):
    """What these stand for, before any scale: [t, 8] fp32."""
    if BITS == 8:
        values = from_bytes(found, magic, KIND, OFFSET, STEP)
    else:
        values = eight(found[:, None], magic, BITS, KIND, OFFSET, STEP)
    return values


@triton.jit
def _side_by_side(parts, COUNT: tl.constexpr):
    """COUNT tensors [t], a power of two up to 16 -> [t, COUNT]."""
    for _ in tl.static_range(4):
        if len(parts) > 1:
            pairs = ()
            for i in tl.static_range(len(parts) // 2):
                pairs += (tl.join(parts[i], parts[i + len(parts) // 2]),)
            parts = pairs
    return tl.reshape(parts[0], (parts[0].shape[0], COUNT))


@triton.jit
def gemv(
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
    magic,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    MP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EACH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """MP vectors of x [m, k] times BN rows of the weight -> out [splits, m, n]: program (rows, part of K, vectors).

    WHOLE: BK divides k. 8 * EACH codes lie in one group. GROUP 0: a row is one, whose scale, if it has no zero, comes
    last.
    """
    row0, b0 = tl.program_id(0) * BN, tl.program_id(2) * MP
    first = tl.program_id(1) * per_split
    THREADS: tl.constexpr = BK // (8 * EACH)
    SCALED: tl.constexpr = GROUP > 0 or zero is not None
    totals = (tl.zeros((THREADS,), tl.float32),) * (BN * MP)
    for block in range(first, tl.minimum(first + per_split, tl.cdiv(k, BK))):
        words = block * (BK // 8) + tl.arange(0, THREADS) * EACH
        keep = None if WHOLE else words * 8 < k
        # everything that this block of columns needs is asked for before anything is waited for
        found, scales, zeros, xs = (), (), (), ()
        for r in tl.static_range(BN):
            row = tl.minimum(row0 + r, n - 1)
            for j in tl.static_range(EACH):
                found += (_codes(codes, row, words + j, None if WHOLE else (words + j) * 8 < k, k, BITS),)
            if SCALED:
                group = words * 8 // GROUP if GROUP > 0 else words * 0
                scales += (scale_of(load((scale + row.to(tl.int64) * groups) + group, keep), SCALE),)
                if zero is not None:
                    zeros += (scale_of(load((zero + row.to(tl.int64) * groups) + group, keep), PLAIN),)
        for b in tl.static_range(MP):
            for j in tl.static_range(EACH):
                at = 8 * (words + j)[:, None] + tl.arange(0, 8)[None, :]
                there = None if WHOLE and MP == 1 else (b0 + b < m) & (at < k)
                xs += (load(x + (b0 + b) * k + at, there),)
        x32, sums = (), ()
        for b in tl.static_range(MP):
            total = tl.zeros((THREADS,), tl.float32)
            for j in tl.static_range(EACH):
                x32 += (xs[b * EACH + j].to(tl.float32),)
                if zero is not None:
                    total += tl.sum(x32[b * EACH + j], 1)
            sums += (total,)
        added = ()
        for r in tl.static_range(BN):
            parts = ()
            for j in tl.static_range(EACH):
                w = _values(found[r * EACH + j], magic, BITS, KIND, OFFSET, STEP)
                more = ()
                for b in tl.static_range(MP):
                    part = tl.sum(w * x32[b * EACH + j], 1)
                    more += ((part if j == 0 else part + parts[b]),)
                parts = more
            for b in tl.static_range(MP):
                total = totals[r * MP + b]
                total += parts[b] * scales[r] if SCALED else parts[b]
                if zero is not None:
                    total += sums[b] * zeros[r]
                added += (total,)
        totals = added
    y = tl.sum(_side_by_side(totals, BN * MP), 0)
    rows = row0 + tl.arange(0, BN * MP) // MP
    vectors = b0 + tl.arange(0, BN * MP) % MP
    if not SCALED:
        y *= load(scale + rows, rows < n)
    if tensor_scale is not None:
        y *= tl.load(tensor_scale)
    at = (tl.program_id(1) * m + vectors).to(tl.int64) * n + rows
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(rows < n) & (vectors < m))
