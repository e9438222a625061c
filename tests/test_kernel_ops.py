"""The custom ops: schema and fake (opcheck), what they compute, and which kernel is chosen to do it."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.kernels import WEIGHT_FORMATS, dispatch, ops, quantize, weights

NAMES = list(WEIGHT_FORMATS)


def packed(name, n=16, k=256):
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02, name)


@pytest.fixture
def kernel():
    """A kernel that multiplies by two what the reference gives, for int8 and up to 4 rows."""
    asked = []

    def supports(problem):
        asked.append(problem)
        return problem.format == "int8" and problem.rows <= 4

    def impl(x, weight, dtype):
        return (2 * weights.matmul(x, weight)).to(dtype)

    dispatch.register("linear", "twice", supports, impl)
    dispatch.forget_used()
    yield asked
    dispatch.unregister("linear", "twice")
    dispatch.forget_used()


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    weight = packed(name)
    torch.library.opcheck(torch.ops.lowbit.linear, (torch.randn(2, 3, 256).bfloat16(), *ops.parts(weight)))
    torch.library.opcheck(torch.ops.lowbit.dequantize, (*ops.parts(weight), torch.bfloat16))
    ids = torch.tensor([[1, 15, 1]])
    torch.library.opcheck(torch.ops.lowbit.embedding, (ids, *ops.parts(weight), torch.float16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ops_are_the_reference_in_the_dtype_asked_for(name, dtype, monkeypatch):
    weight = packed(name)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = weights.dequantize(weight)
    out = ops.linear(x, *ops.parts(weight))
    assert out.dtype == dtype
    assert torch.allclose(out.float(), (x.float() @ whole.T).to(dtype).float(), rtol=1e-2, atol=1e-5)
    monkeypatch.setattr(weights, "CHUNK", 5 * 256)
    assert torch.equal(ops.dequantize(*ops.parts(weight), dtype), whole.to(dtype))
    assert torch.equal(
        ops.embedding(torch.tensor([[4, 0]]), *ops.parts(weight), dtype), whole[torch.tensor([[4, 0]])].to(dtype)
    )


def test_an_op_is_one_node_of_a_compiled_graph():
    weight = packed("int4_g128")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: ops.linear(x, *ops.parts(weight)) + 1, backend=backend, fullgraph=True)
    x = torch.randn(1, 256)
    assert torch.equal(compiled(x), ops.linear(x, *ops.parts(weight)) + 1)
    assert sum("lowbit" in str(node.target) for node in graphs[0].graph.nodes) == 1
    torch._dynamo.reset()


def test_x_of_another_width_is_refused():
    with pytest.raises(LowbitError, match=r"a weight \[16, 256\] expects x \[\.\.\., 256\], got \[3, 128\]"):
        ops.linear(torch.zeros(3, 128), *ops.parts(packed("int8")))


def test_a_registered_kernel_runs_what_it_supports(kernel):
    weight, x = packed("int8"), torch.randn(4, 256)
    assert torch.allclose(ops.linear(x, *ops.parts(weight)), 2 * weights.matmul(x, weight))
    assert kernel[-1] == dispatch.Problem("int8", 16, 256, 4, torch.float32, "cpu", None)
    many = torch.randn(5, 256)
    assert torch.equal(ops.linear(many, *ops.parts(weight)), weights.matmul(many, weight))
    assert dispatch.used() == {("linear", "int8", "twice"): 1, ("linear", "int8", dispatch.REFERENCE): 1}
    assert dispatch.chosen("linear", dispatch.problem(weight, 1, torch.float32)) == "twice"
    assert dispatch.chosen("linear", dispatch.problem(packed("ternary"), 1, torch.float32)) == dispatch.REFERENCE


def test_the_reference_can_be_forced(kernel):
    weight, x = packed("int8"), torch.randn(2, 256)
    with dispatch.forced(dispatch.REFERENCE):
        assert torch.equal(ops.linear(x, *ops.parts(weight)), weights.matmul(x, weight))
    assert torch.allclose(ops.linear(x, *ops.parts(weight)), 2 * weights.matmul(x, weight))


def test_a_forced_kernel_never_falls_back(kernel):
    with dispatch.forced("twice"), pytest.raises(LowbitError, match="twice was forced, but does not do linear for"):
        ops.linear(torch.zeros(1, 256), *ops.parts(packed("ternary")))
    with pytest.raises(LowbitError, match=r"unknown kernel 'thrice'; known: PyTorch reference, .*, twice"):
        with dispatch.forced("thrice"):
            pass


def test_registering_a_name_again_replaces_it(kernel):
    dispatch.register("linear", "twice", lambda problem: False, lambda x, weight, dtype: x)
    assert dispatch.chosen("linear", dispatch.problem(packed("int8"), 1, torch.float32)) == dispatch.REFERENCE


def test_only_known_operations_have_kernels():
    with pytest.raises(LowbitError, match="unknown operation 'conv'; known: dequantize, embedding, linear"):
        dispatch.register("conv", "x", lambda problem: True, lambda x, weight, dtype: x)
    with pytest.raises(LowbitError, match="unknown kernel for linear 'nothing'"):
        dispatch.unregister("linear", "nothing")
