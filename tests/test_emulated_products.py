"""Every streamed format's product and unpacking by the kernels' own source on the CPU, against fp32 maths on the
dequantized weights: rows of zeros, outliers, padded tiles, memory that holds NaN before."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedModule, unmet

from lowbit.kernels import runner, stream, unpacking, weights
from lowbit.kernels.arguments import Embed, Product, fill
from lowbit.kernels.geometry import RING_BYTES, Geometry
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.stream import LAYOUTS
from lowbit.kernels.stream_modules import StreamPart

pytestmark = pytest.mark.skipif(unmet() is not None, reason=str(unmet()))
WIDTHS = {"hidden": 768, "inter": 2048, "heads": 2, "kv_heads": 2, "head_dim": 128, "eps": 1e-5}
SHAPE = Geometry("int8", **WIDTHS)
"""K of 768: stages of 256 columns, whatever the format; K of 2048: its widest."""


def module(folder, name):
    """One library: the products of both widths and the way back of both stages."""
    shape = Geometry(name, **WIDTHS)
    stages = {stream.stage_columns(name, k) for k in shape.widths}
    kernels = [runner.PRODUCTS["down"], runner.PRODUCTS["head"], *(f"unpack_kernel<{ku}>" for ku in sorted(stages))]
    return EmulatedModule(folder, ("common", "decode", "product", "unpack"), kernels, shape.macros())


def matrix(name, n, k):
    """Packed weights [n, k] with a row of zeros, a group of zeros, and single weights 50 times as large as others."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator) * 0.1
    weight[3] = 0
    weight[5, :128] = 0
    weight[7, ::97] *= 50
    return quantize(weight.to(torch.bfloat16 if name == "bf16" else torch.float16), name, search=False)


def vector(k, dtype):
    """x with outliers, values that vanish beside them, and 128 zeros."""
    x = torch.randn(k, generator=torch.Generator().manual_seed(k))
    x[::211] *= 40
    x[128:256] = 0
    x[300:310] *= 1e-4
    return x.to(dtype)


def launch(emulated, shape, name, packed, **argument):
    made = stream.pack_stream(packed)
    ring, batch, shared = shape.shared(made.k, made.tiles, RING_BYTES)
    fields = {"weights": made.data, "row_scale": made.row_scale, "tiles": made.tiles, "rows": made.rows}
    filled = fill(Product, **fields, ring=ring, batch=batch, **argument)
    emulated.launch(runner.PRODUCTS[name], (made.tiles, 1), shape.threads, filled, shared_bytes=shared)


def error(found, want):
    return float((found - want).norm() / want.norm())


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_those_of_the_dequantized_weights(kernels_folder, monkeypatch, name):
    emulated, shape = module(kernels_folder, name), Geometry(name, **WIDTHS)
    bound = 4e-3 if name == "bf16" else 5e-4
    packed, x = matrix(name, 64, 2048), vector(2048, shape.dtype)
    residual = torch.linspace(-1, 1, 64)
    out = residual.clone()
    launch(emulated, shape, "down", packed, x=x, out=out)
    want = weights.matvec(x, packed)
    assert error(out - residual, want) < bound
    assert abs(float(out[3] - residual[3]) - float(want[3])) < 1e-6 + bound * abs(float(want[3]))

    head, x = matrix(name, 40, 768), vector(768, torch.float32)
    norm = torch.rand(768, generator=torch.Generator().manual_seed(1)).to(shape.dtype) + 0.5
    logits = torch.full((48,), torch.nan)
    token, position, history = (torch.zeros(count, dtype=torch.int64) for count in (1, 1, 4))
    counters = {"best": torch.zeros(1, dtype=torch.int64), "arrived": torch.zeros(1, dtype=torch.int32)}
    handed = {"token": token, "position": position, "history": history}
    launch(emulated, shape, "head", head, x=x, norm=norm, out=logits, **handed, **counters)
    normed = x * torch.rsqrt(x.square().mean() + shape.eps) * norm.float()
    assert error(logits[:40], weights.matvec(normed, head)) < bound
    assert logits[40:].isnan().all()  # the padding of the last tile is nobody's
    assert int(token) == int(logits[:40].argmax()) == int(history[1])

    monkeypatch.setattr(unpacking, "_unpacker", lambda *_: emulated)
    for one in (packed, head):
        made = stream.pack_stream(one)
        for dtype in (torch.float16, torch.bfloat16):
            found = torch.full((one.n, one.k), torch.nan, dtype=dtype)
            unpacking.unpack_into(StreamPart(made, one.n), found)
            assert torch.equal(found, weights.dequantize(one).to(dtype))


@pytest.mark.parametrize("name", [name for name in weights.WEIGHT_FORMATS if name != "bf16"])
def test_packed_tables_give_the_rows_they_stand_for(kernels_folder, name):
    emulated = EmulatedModule(kernels_folder, ("common", "decode", "embedding"), ("embed_kernel",), SHAPE.macros())
    table = matrix(name, 12, 768)
    for row in (0, 3, 11):
        token, found = torch.tensor([row]), torch.full((768,), torch.nan)
        emulated.launch("embed_kernel", (3, 1), 256, fill(Embed, token=token, x=found, **runner.lookup(table)))
        assert torch.equal(found, weights.embedding(token, table)[0])
