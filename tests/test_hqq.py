"""HQQ on a CPU: every bit width, its kernels where they run, and that it never falls back unnoticed."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, OneLinear, config, gpu
from torch import nn

from lowbit import backends, truth
from lowbit.backends import NoTruth, coverage, gemlite
from lowbit.backends import hqq as backend
from lowbit.embedded import evaluate, load_path
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS

pytest.importorskip("hqq")

ROWS = [row for row in FORMATS.values() if row.backend == "hqq"]
ON_CPU = [row for row in ROWS if "cpu" in row.devices]
BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)
FAMILY = [FORMATS[f"a16w{bits:g}_g64-hqq"] for bits in BITS]
K, N = 256, 64


def quantized(row, dtype=torch.float16):
    holder = OneLinear(N, K, dtype)
    backend.quantize(holder, row, dtype)
    return holder.q_proj


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ON_CPU if row.scheme == "pytorch"], ids=lambda row: row.id)
def test_the_product_is_that_of_its_own_weights(row):
    module = quantized(row)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
    x[1], x[2, 7] = 0, 100.0
    x = x.half()
    for rows in (x[:1], x):
        want = rows.float() @ backend.dequantize(module).T
        with torch.no_grad():
            got = module(rows).float()
        norms = want.norm(dim=1)
        assert ((got - want).norm(dim=1)[norms > 0] / norms[norms > 0]).max() <= 2.0**-10
        assert not got[norms == 0].any()


def test_more_bits_never_lose_accuracy():
    weight = OneLinear(N, K, torch.float16).q_proj.weight.float()
    errors = [(backend.dequantize(quantized(row)) - weight).norm().item() for row in FAMILY]
    assert errors == sorted(errors)
    assert errors[0] < 0.01 * weight.norm().item() < 0.3 * weight.norm().item() < errors[-1]


def test_bits_stored_are_those_of_the_packing():
    stored = [8 * coverage.storage_bytes(coverage.tensors_of(quantized(row))) / (N * K) for row in FAMILY]
    scales = 2 * 16 / 64
    packed = (8, 8, 8, 4, 3.2, 2, 2, 1)
    assert stored == pytest.approx([bits + scales for bits in packed], rel=0.03)


def test_more_bits_never_more_kl_on_the_embedded_model():
    from transformers import LlamaForCausalLM

    ids = torch.from_numpy(evaluate.heldout_ids(load_path()))[: 2 * 256].view(2, 256)

    def model():
        return LlamaForCausalLM.from_pretrained(load_path(), dtype=torch.float32).eval()

    base, divergence = model(), []
    for row in FAMILY:
        made = model()
        backend.quantize(made, row, torch.float32)
        assert coverage.inspect(made, row).linears == 28
        divergence.append(evaluate.mean_kl(base, made, ids))
    assert divergence == sorted(divergence)
    assert divergence[0] < 1e-3 < 0.1 < divergence[-1]


def test_the_kernel_of_a_row_is_not_that_of_the_process():
    core = pytest.importorskip("hqq.core.quantize")
    before = core.HQQLinear.backend
    try:
        core.HQQLinear.set_backend(core.HQQBackend.PYTORCH_COMPILE)
        module = quantized(FORMATS["a16w4_g64-hqq"])
        assert type(module).forward is core.HQQLinear.forward_pytorch_backprop
        assert core.HQQLinear.backend is core.HQQBackend.PYTORCH_COMPILE
    finally:
        core.HQQLinear.set_backend(before)
    compiled = quantized(FORMATS["a16w4_compile_g64-hqq"])
    assert type(compiled).forward is core.HQQLinear.forward_pytorch_backprop_compile
    assert core.HQQLinear.backend is before


# -- its silent fallbacks ----------------------------------------------------------------------------------------------


def test_a_kernel_that_is_not_built_is_an_error():
    with pytest.raises(LowbitError, match=r"hqq_aten can't be imported: hqq would run its PyTorch path instead"):
        quantized(FORMATS["a16w4_aten_g64-hqq"])


def test_a_layer_that_hqq_does_not_convert_is_an_error():
    # hqq itself says "Skipping aoint4 conversion" on standard output, and gives the unconverted layer back
    row = replace(FORMATS["a16w4_torchao_g64-hqq"], weight_bits=2)
    with pytest.raises(
        LowbitError,
        match=r"hqq left q_proj \[64, 256\] on its PyTorch path: expected a HQQLinearTorchWeightOnlynt4, "
        r"got a HQQLinear \(Skipping aoint4 conversion",
    ):
        quantized(row, torch.bfloat16)


class MarlinLayer:
    """Of the package marlin, which no machine here has: only what hqq's conversion touches."""

    def __init__(self, k, n, groupsize):
        self.B = self.s = None

    def pack(self, linear, scales):
        self.s.copy_(scales.t().half())


@pytest.fixture
def marlin(monkeypatch):
    monkeypatch.setitem(sys.modules, "marlin", SimpleNamespace(Layer=MarlinLayer, mul=None))
    monkeypatch.delitem(sys.modules, "hqq.backends.marlin", raising=False)


def test_marlin_takes_rows_without_groups_only(marlin):
    module = quantized(FORMATS["a16w4_marlin-hqq"])
    assert type(module).__name__ == "MarlinLinear"
    assert backend.is_quantized(module)
    with pytest.raises(LowbitError, match=r"left q_proj \[64, 256\] on its PyTorch path: expected a MarlinLinear"):
        quantized(replace(FORMATS["a16w4_marlin-hqq"], group_size=64))


def test_an_unknown_kernel_lists_the_known_ones():
    with pytest.raises(LowbitError, match=r"unknown hqq kernel 'cutlass'; known: .*aten.*pytorch_compile"):
        quantized(replace(FORMATS["a16w4_g64-hqq"], scheme="cutlass"))


# -- other libraries' kernels ------------------------------------------------------------------------------------------


class GemLiteLinearTriton(nn.Module):
    """gemlite's can't be imported without a GPU: the fields that its pack() leaves behind (0.6.0.post2, core.py)."""

    def __init__(self, codes, scales, zeros, dtype):
        super().__init__()
        n, k = codes.shape
        self.W_nbits, self.elements_per_sample, self.W_group_mode, self.channel_scale_mode = 4, 8, 4, 0
        self.input_dtype, self.scaled_activations, self.bias = SimpleNamespace(name="FP16"), False, None
        words = sum(codes.T[position::8].long() << 4 * position for position in range(8))
        stored = {
            "W_q": torch.where(words < 2**31, words, words - 2**32).int(),
            "scales": scales.view(n, -1).t().contiguous(),
            "zeros": (-zeros.float() * scales.float()).to(dtype).view(n, -1).t().contiguous(),
        }
        assert [tuple(tensor.shape) for tensor in stored.values()] == [(k // 8, n), (k // 64, n), (k // 64, n)]
        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x):
        return nn.functional.linear(x, gemlite.dequantize(self).to(x.dtype))


class A16Wn:
    def __init__(self, device):
        self.device = device

    def from_hqqlinear(self, layer):
        assert (layer.meta["nbits"], layer.meta["group_size"], layer.meta["axis"]) == (4, 64, 1)
        codes = layer.unpack(dtype=torch.uint8).view(layer.meta["shape"])
        return GemLiteLinearTriton(codes, layer.meta["scale"], layer.meta["zero"], layer.compute_dtype)


def tiles(pairs, inner_k_tiles):
    """In place of the operator that packs int4 on a GPU: [n, k / 2] uint8 -> [n / 8, k / 128, 32, 4] int32, each tile's
    nibbles in one random order."""
    assert (pairs.dtype, inner_k_tiles) == (torch.uint8, 8)
    n, k = pairs.shape[0], 2 * pairs.shape[1]
    numbers = torch.stack([pairs >> 4, pairs & 15], -1).view(n // 8, 8, k // 128, 128).transpose(1, 2).flatten(2)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    words = (numbers[..., order].view(n // 8, k // 128, 32, 4, 8).long() << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


@pytest.fixture
def kernels_of_others(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemlite", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "gemlite.helper", SimpleNamespace(A16Wn=A16Wn))
    monkeypatch.delitem(sys.modules, "hqq.backends.gemlite", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.9.1")  # one that hqq can read
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", tiles)


@pytest.mark.parametrize(
    ("name", "dtype", "rounding"),
    # gemlite and tinygemm keep scale times zero point, rounded: 8 levels of a group's scale and one more rounding
    [("a16w4_gemlite_g64-hqq", torch.float16, 2.0**-11), ("a16w4_torchao_g64-hqq", torch.bfloat16, 2.0**-8)],
)
def test_a_converted_linear_gives_back_the_weights_that_hqq_found(kernels_of_others, name, dtype, rounding):
    module = quantized(FORMATS[name], dtype)
    assert type(module).__name__ == backend.CONVERSIONS[FORMATS[name].scheme][2]
    assert backend.is_quantized(module)
    want = backend.dequantize(quantized(FORMATS["a16w4_g64-hqq"], dtype))
    got = backend.dequantize(module)
    assert got.dtype == torch.float32
    assert got.shape == (N, K)
    assert (got - want).abs().max() <= 4 * rounding * want.abs().max()
    assert (want - OneLinear(N, K, dtype).q_proj.weight).abs().max() > 16 * rounding * want.abs().max()


def test_gemlites_kernel_is_held_against_hqqs_weights(kernels_of_others):
    row = FORMATS["a16w4_gemlite_g64-hqq"]
    original = OneLinear(N, K, torch.float16).q_proj.weight
    found = truth.measure(quantized(row), row, torch.float16, original)
    assert 0 < found.kernel <= truth.BOUNDS[torch.float16]
    plain = truth.measure(quantized(FORMATS["a16w4_g64-hqq"]), row, torch.float16, original)
    assert found.weight == pytest.approx(plain.weight, rel=1e-2)


@pytest.mark.parametrize("kind", ["HQQLinearBitBlas", "MarlinLinear"])
def test_what_no_library_gives_back_is_said(kind):
    with pytest.raises(NoTruth, match=f"hqq's {kind} gives its weights back in no way"):
        backend.dequantize(type(kind, (nn.Module,), {})())


# -- what can't run, and why -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "missing", "reason"),
    [
        ("a16w4_g64", "hqq", 'package: hqq is not installed; pip install "lowbit[hqq]"'),
        ("a16w4_aten_g64", "hqq_aten", "package: hqq_aten is not installed; it is built from hqq's sources"),
        ("a16w4_gemlite_g64", "gemlite", 'package: gemlite is not installed; pip install "lowbit[gpu]"'),
        ("a16w4_bitblas_g64", "bitblas", "package: bitblas is not installed; pip install bitblas"),
        ("a16w4_marlin", "marlin", "package: marlin is not installed; it is built from github.com/IST-DASLab/marlin"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, fmt, missing, reason):
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == missing else object())
    assert str(backends.unmet(FORMATS[f"{fmt}-hqq"], gpu(9, 0), config())).startswith(reason)


def test_torchao_int4_needs_an_hqq_that_can_read_the_version_of_torch(monkeypatch):
    row = FORMATS["a16w4_torchao_g64-hqq"]
    for version, reads in (("2.9.1+cu130", True), ("2.13.0+cu130", False), ("3.0.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        reason = backend.requirement(row, gpu(9, 0), config())
        assert (reason is None) == reads
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert "hqq 0.2.8 takes torch 2.13.0 for 2.1" in str(backend.requirement(row, gpu(9, 0), config()))
    assert str(backend.requirement(row, gpu(7, 5), config())).startswith("capability: needs SM80 (tinygemm int4)")


def test_bitblas_needs_a_library_of_cuda_12(monkeypatch):
    monkeypatch.setattr(backend, "NVRTC", "libnone-such.so.12")
    reason = backend.requirement(FORMATS["a16w4_bitblas_g64-hqq"], gpu(9, 0), config())
    assert str(reason) == "package: bitblas needs libnone-such.so.12 (CUDA 12), which can't be loaded here"


def test_every_width_of_issue_3_runs_here_as_a_reference():
    assert [row.weight_bits for row in FAMILY] == list(BITS)
    assert all(row.suite == "full" and not row.fast for row in ON_CPU)
    assert [row.id for row in ON_CPU if backends.unmet(row, CPU, config())] == []
    assert {row.scheme for row in ROWS} == backend.OWN.keys() | backend.CONVERSIONS.keys()
