"""The decode kernels as products of their own: right by their own source on the CPU, and offered by the bench."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedModule, unmet
from test_products import contender
from tiny import config

from lowbit import contenders, device, products
from lowbit.backends import Shape
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.kernels import batch, geometry, nvrtc, product_launch, stream_product
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.stream import LAYOUTS
from lowbit.kernels.stream_product import StreamProduct
from lowbit.kernels.weights import dequantize

SEVERAL = batch.PRODUCTS["o"]
ROW_SCALED = ("int8", "fp8_e4m3", "ternary", "binary", "nvfp4")
emulated = pytest.mark.skipif(unmet() is not None, reason=str(unmet()))


@pytest.fixture
def launched(monkeypatch, kernels_folder):
    """Kernels by the emulator; the list of what was launched, with how many blocks."""
    found = []

    class Recorded(EmulatedModule):
        def launch(self, kernel, grid, threads, argument, **more):
            found.append((kernel, grid[0]))
            super().launch(kernel, grid, threads, argument, **more)

    def load(shape, _):
        files, kernels = product_launch.sources(shape.batch), (stream_product.kernel(shape),)
        return Recorded(kernels_folder, files, kernels, shape.macros())

    monkeypatch.setattr(stream_product, "load", load)
    return found


def packed(name, n, k):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.1
    weight[3] = 0
    return quantize(weight.to(torch.bfloat16 if name == "bf16" else torch.float16), name, search=False)


@emulated
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_vector_and_several_give_the_product_of_the_dequantized_weights(launched, name):
    made = packed(name, 40, 768)  # a tile is half padding
    module, exact = StreamProduct(made), dequantize(made)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 3):
        x = torch.randn(count, 768, generator=generator).to(module.dtype)
        x[-1, 7] = 100
        for _ in range(2):  # the second by what the first made
            y = module(x)
        want = x.float() @ exact.T
        error = (y.float() - want).norm(dim=1) / want.norm(dim=1)
        assert y.shape == (count, 40)
        assert y.dtype == x.dtype
        assert float(error.max()) < (4e-3 if name == "bf16" else 6e-4)  # 5e-4, and rounded to 16 bits
        assert torch.equal(module(2 * x.clone()), 2 * y)  # another x, other memory; a power of two changes no bit
    assert [kernel for kernel, _ in launched] == [stream_product.ALONE] * 3 + [SEVERAL] * 3
    assert module.nbytes == module.part.stream.data.numel() + (4 * 48 if name in ROW_SCALED else 0)


@emulated
def test_more_tiles_than_a_block_finishes_at_once(launched, monkeypatch):
    for module in (geometry, product_launch):
        monkeypatch.setattr(module, "BLOCKS", 2)  # of 20 tiles each; 14 at once
    made = packed("int4_g128", 640, 256)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).half()
    y, want = StreamProduct(made)(x).float(), x.float() @ dequantize(made).T
    assert float((y - want).norm() / want.norm()) < 6e-4
    assert launched == [(stream_product.ALONE, 2)]


@pytest.mark.skipif(nvrtc.available() is not None, reason=f"NVRTC is not installed: {nvrtc.available()}")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("k", "batch"), [(14336, 1), (4096, 8)])
def test_they_compile_for_sm90_without_spills(name, k, batch):
    shape = stream_product.shape_of(name, k, batch)
    source = nvrtc.read_sources("ptx", *product_launch.sources(shape.batch))
    kernel = stream_product.kernel(shape)
    binary = nvrtc.compile_source(source, (kernel,), shape.macros(), "sm_90a")
    registers, spilled = binary.resources()[binary.names[kernel]]
    assert (spilled, registers * shape.threads <= 65536) == (0, True)


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(9, 256, dtype=torch.float16), "9 in torch.float16"),
        (torch.zeros(1, 256, dtype=torch.bfloat16), "1 in torch.bfloat16"),
        (torch.zeros(2, 512, dtype=torch.float16)[:, ::2], "2 in torch.float16 with gaps"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(x, got):
    module = StreamProduct(packed("int4_g128", 16, 256))
    with pytest.raises(LowbitError, match=rf"int4_g128 with 1 to 8 vectors in torch\.float16, .*got {got}$"):
        module(x)


def test_every_streamed_format_takes_part_and_says_what_it_needs():
    known = {each.id: each for each in contenders.contenders() if each.mode == "native"}
    assert {each.format.scheme for each in known.values()} == set(LAYOUTS)
    one = known["a16w4_g128-lowbit-native"]
    assert one.format is FORMATS["a16w4_g128-lowbit"]
    here = device.of(torch.device("cpu"))
    assert "needs a CUDA device" in str(one.unmet(here, config()))
    assert contender("a16w4_g128-lowbit").unmet(here, config()) is None


@emulated
def test_the_bench_checks_the_product_and_times_the_kernel(launched, monkeypatch):
    monkeypatch.setattr(products, "_median", lambda sample: sample())
    monkeypatch.setattr(products, "BATCHES", (1, 2))
    monkeypatch.setattr(device.Device, "dtype_for", lambda self, fmt: "fp16")
    found = products.measure(
        contender("a16w4_g128-lowbit-native"), Shape("q_proj", 32, 256), device.of(torch.device("cpu")), 10.0
    )
    assert [(timing.batch, timing.kernel, timing.weight_bytes) for timing in found] == [
        (count, "decode kernel", 32 * (128 + 8)) for count in (1, 2)
    ]
    assert all(0 < timing.error < 6e-4 for timing in found)
    assert {kernel for kernel, _ in launched} == {stream_product.ALONE, SEVERAL}
