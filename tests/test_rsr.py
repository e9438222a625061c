"""RSR against the definition of the ternary and binary product."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.kernels import matvec, quantize, rsr


def weight(n=48, k=256, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["ternary", "binary"])
@pytest.mark.parametrize("width", [None, 1, 2, 5, 8])
@pytest.mark.parametrize("n", [1, 48, 50])
def test_the_product_is_that_of_the_definition(name, width, n):
    packed = quantize(weight(n), name)
    index = rsr.preprocess(packed, width)
    for x in (torch.randn(256, generator=torch.Generator().manual_seed(1)), torch.zeros(256), torch.ones(256)):
        want = matvec(x, packed)
        assert torch.allclose(rsr.matvec(x, index), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()) + 1e-12)
    assert rsr.matvec(torch.randn(256).bfloat16(), index).dtype == torch.float32


def test_integers_are_exact():
    packed = quantize(weight(), "ternary")
    x = torch.randint(-8, 9, (256,)).float()
    ones = torch.ones_like(packed.scale)
    exact = type(packed)("ternary", packed.n, packed.k, packed.codes, ones)
    assert torch.equal(rsr.matvec(x, rsr.preprocess(exact)), matvec(x, exact))


def test_zero_rows_and_an_outlier():
    matrix = weight()
    matrix[3] = 0
    matrix[5, 7] = 1000
    packed = quantize(matrix, "ternary")
    x = torch.randn(256)
    got = rsr.matvec(x, rsr.preprocess(packed))
    assert got[3] == 0
    assert torch.allclose(got, matvec(x, packed), rtol=1e-5, atol=1e-4)


def test_the_index_is_the_papers():
    """A matrix small enough to read: two rows, four columns, one block of width 2."""
    packed = quantize(torch.tensor([[1.0, -1.0, 0.0, 1.0], [0.0, 1.0, -1.0, 1.0]]), "ternary")
    index = rsr.preprocess(packed, 2)
    # numbers of the +1s by column (row 0 is bit 0): 1, 2, 0, 3; of the -1s: 0, 1, 2, 0
    assert index.plus.order.tolist() == [[2, 0, 1, 3]]
    assert index.plus.starts.tolist() == [[0, 1, 2, 3, 4]]
    assert index.minus.order.tolist() == [[0, 3, 1, 2]]
    assert index.minus.starts.tolist() == [[0, 2, 3, 4, 4]]
    assert index.nbytes == 2 * (4 * 4 + 5 * 8) + 2 * 4


def test_the_width_is_that_of_fewest_additions():
    def additions(width, k):
        return (k + 2 * 2**width) / width

    for k in (256, 4096, 14336):
        best = rsr.best_width(k)
        assert all(additions(best, k) <= additions(width, k) for width in range(1, 17))
    assert rsr.best_width(4096) > rsr.best_width(256)


def test_what_it_takes():
    with pytest.raises(LowbitError, match="RSR takes ternary and binary weights, got int2_g128"):
        rsr.preprocess(quantize(weight(), "int2_g128"))
    with pytest.raises(LowbitError, match="RSR blocks are 1 to 16 rows high, got 17"):
        rsr.preprocess(quantize(weight(), "ternary"), 17)
