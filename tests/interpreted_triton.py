"""What the Triton kernels compute, by Triton's interpreter on the CPU: run by tests/test_triton_linear.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from lowbit.kernels import WEIGHT_FORMATS, dispatch, ops, quantize, triton_linear, weights

PACKED = [name for name in WEIGHT_FORMATS if name != "bf16"]
STORED = ["int2_zp", "int3_zp", "int4_zp", "int8_zp", "int2_zp_g32", "int4_zp_g64", "int8_zp_g128", "fp8_e4m3_g128"]


def matrix(n, k):
    """Small weights with a row of zeros and an outlier."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    weight[5, 7] = 3.0
    return weight


def packed_as(name, n, k):
    """A matrix in this format; of STORED what a checkpoint holds: any codes, a scale and, of integers, a zero for every
    group or row."""
    if name in PACKED:
        return quantize(matrix(n, k), name)
    row, generator = weights.find(name), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 120, (n, row.row_bytes(k)), dtype=torch.uint8, generator=generator)  # e4m3: no NaN
    scale = torch.rand(n, row.groups(k), generator=generator) + 0.5
    zero = None if row.zero is None else torch.randn(n, row.groups(k), generator=generator)
    return weights.Packed(name, n, k, codes, scale, zero)


def vectors(m, k, dtype):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
    x[0, k // 3] = 100.0
    return x.to(dtype)


def relative(y, x, packed):
    ref = x.double() @ weights.dequantize(packed).double().T
    assert y.shape == ref.shape
    return float((y.double() - ref).norm() / ref.norm())


@pytest.fixture(autouse=True)
def written(monkeypatch):
    """Memory that a kernel does not write is not a number; the tensors made for its output."""
    empty, made = torch.empty, []

    def filled(*shape, **options):
        made.append(empty(*shape, **options))
        return made[-1].fill_(float("nan")) if made[-1].is_floating_point() else made[-1]

    monkeypatch.setattr(triton_linear.torch, "empty", filled)
    return made


class Guarded:
    """Triton's interpreter, but that an address outside of ``tensors`` fails: what lies there is read by no kernel."""

    def __init__(self, inner, tensors):
        self.inner, self.tensors = inner, tensors

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def check(self, pointers, mask, size):
        at = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        inside = np.zeros(at.shape, bool)
        for tensor in self.tensors():
            start = tensor.data_ptr()
            inside |= (at >= start) & (at + size <= start + tensor.nbytes)
        assert inside.all(), f"{(~inside).sum()} of {at.size} addresses are outside"

    def load(self, pointers, mask, other, dtype):
        self.check(pointers, mask, np.dtype(dtype).itemsize)
        return self.inner.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self.check(pointers, mask, values.dtype.itemsize)
        return self.inner.store(pointers, values, mask)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "int4_g128", "int3_g128", "nvfp4", "ternary", "int4_zp"])
@pytest.mark.parametrize("k", [256, 1280, 2176, 4096], ids="K {}".format)
def test_one_step_along_k_or_several_read_what_is_there_and_nothing_else(monkeypatch, written, name, k):
    """2048 columns are a step: a part of one, one and a part, two whole ones; the last program has one row of two."""
    n, m = (11, 3) if k < 4096 else (7, 1)
    packed = packed_as(name, n, k)
    x = vectors(m, k, torch.float16)
    guarded = Guarded(interpreter._interpreter, lambda: (x, *packed.tensors().values(), *written))
    monkeypatch.setattr(interpreter, "_interpreter", guarded)
    for kernel in (triton_linear.gemv, triton_linear.gemm):
        written.clear()
        assert relative(kernel(x, packed, torch.float32), x, packed) < 1e-6
    written.clear()
    assert torch.equal(triton_linear.unpack(None, packed, torch.float32), weights.dequantize(packed))


@pytest.mark.parametrize("name", [*PACKED, *STORED])
def test_products_are_those_with_the_dequantized_weight(name):
    packed = packed_as(name, 10, 384)  # no multiple of a tile's rows or columns
    for kernel, m, dtype in (
        (triton_linear.gemv, 1, torch.bfloat16),
        (triton_linear.gemv, 2, torch.float16),
        (triton_linear.gemv, 4, torch.bfloat16),
        (triton_linear.gemv, 7, torch.float32),
        (triton_linear.gemm, 3, torch.float16),
    ):
        x = vectors(m, 384, dtype)
        assert relative(kernel(x, packed, torch.float32), x, packed) < 1e-6


@pytest.mark.parametrize("name", [*PACKED, *STORED])
def test_unpacking_is_the_definition_bit_by_bit(name):
    packed = packed_as(name, 10, 384)
    for dtype in (torch.float16, torch.float32):  # the interpreter rounds to bf16 by cutting off
        assert torch.equal(triton_linear.unpack(None, packed, dtype), weights.dequantize(packed).to(dtype))


@pytest.mark.parametrize("name", ["int8", "int4_g64", "nvfp4"])
def test_a_large_weight_is_unpacked_and_multiplied_in_pieces(name, monkeypatch):
    packed, x = quantize(matrix(40, 384), name), vectors(12, 384, torch.float16)
    whole = triton_linear.unpack_gemm(x, packed, torch.float16)
    monkeypatch.setattr(weights, "PIECE", 20 * 384)  # 16 rows of 40
    assert relative(triton_linear.unpack_gemm(x, packed, torch.float16), x, packed) < 1e-3
    assert relative(whole, x, packed) < 1e-3


@pytest.mark.parametrize("name", ["int8", "int4_g64"])
def test_parts_of_k_are_summed_in_order(name):
    packed = quantize(matrix(40, 2048), name)
    x = vectors(4, 2048, torch.float16)
    cut = triton_linear.tiles(packed.row, 40, 2048, True)
    assert cut.splits > 1
    once, again = (triton_linear.gemm(x, packed, torch.float32) for _ in range(2))
    assert torch.equal(once, again)
    assert relative(once, x, packed) < 1e-6


def test_a_k_that_no_tile_divides():
    for name, k in (("int8", 250), ("ternary", 264), ("nvfp4", 272), ("int8", 2049), ("ternary", 2056)):
        packed = quantize(matrix(6, k), name)
        x = vectors(1, k, torch.float16)
        assert relative(triton_linear.gemv(x, packed, torch.float32), x, packed) < 1e-6
        assert relative(triton_linear.gemm(x, packed, torch.float32), x, packed) < 1e-6


def test_the_op_runs_them_and_says_so():
    packed = quantize(matrix(10, 256), "int4_g128")
    dispatch.forget_used()
    for m, kernel in ((4, "Triton GEMV"), (5, "Triton small GEMM"), (9, "Triton unpack + cuBLAS")):
        x = vectors(m, 256, torch.float16)
        y = ops.linear(x.view(1, m, 256), *ops.parts(packed))
        assert y.dtype == torch.float16
        assert relative(y[0], x, packed) < 1e-3
        assert dispatch.used()["linear", "int4_g128", kernel] == 1
    assert not [key for key in dispatch.used() if key[2] == dispatch.REFERENCE]


def test_a_compiler_sees_one_op():
    packed = quantize(matrix(10, 256), "int4_g128")
    x = vectors(1, 256, torch.float16)
    torch.library.opcheck(torch.ops.lowbit.linear, (x, *ops.parts(packed)))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: ops.linear(x, *ops.parts(packed)) + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), ops.linear(x, *ops.parts(packed)) + 1)
    assert sum("lowbit" in str(node.target) for node in graphs[0].graph.nodes) == 1
