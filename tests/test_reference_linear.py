from __future__ import annotations

import pytest
import torch
from tiny import CPU, config
from torch import nn

from lowbit import backends, models, quality, texts
from lowbit.backends import coverage
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format
from lowbit.quantized import build
from lowbit.reference.linear import ReferenceLinear
from lowbit.reference.scheme import SCHEMES

ROWS = [row for row in FORMATS.values() if row.backend == "reference"]
EACH = pytest.mark.parametrize("fmt", ROWS, ids=lambda fmt: fmt.id)
K, N = 256, 96
BITS = {  # stored by weight [96, 256]: codes, and one scale per block of 32 (8 bits), group, row or matrix (16 bits)
    "mxfp6_e3m2": 6.25,
    "mxfp6_e2m3": 6.25,
    "mxfp6_e3m2_dynamic": 6.25,
    "mxfp6_e2m3_dynamic": 6.25,
    "fp6_e3m2_row": 6 + 16 / K,
    "fp6_e2m3_row": 6 + 16 / K,
    "int4_dynamic": 4.125,
    "ternary_dynamic": 52 * 8 / K + 16 / (N * K),
    "binary_dynamic": 1 + 16 / K,
}
WEIGHT_ERROR = {"6": 0.07, "4": 0.13, "1.58": 0.55, "1": 0.61}
"""Of normal weights at most lost, relative. 6: half a step of two mantissa bits / sqrt(3), at worst. 4: a step of the
largest of 128, 2.7 sigma, / 7, / sqrt(12) = 0.11. 1: sqrt(1 - 2 / pi) = 0.603."""


def linear(weight=None, dtype=torch.bfloat16, bias=False):
    torch.manual_seed(0)
    made = nn.Linear(K, N, bias=bias, dtype=dtype)
    nn.init.normal_(made.weight, std=0.05)
    made.requires_grad_(False)
    if weight is not None:
        made.weight.data.copy_(weight)
    return made


def made_of(fmt, **fields):
    return ReferenceLinear(linear(**fields), fmt.scheme, fmt.group_size)


def hostile(rows=8):
    """Activations with a row of zeros and one with an outlier 100 times the rest."""
    torch.manual_seed(1)
    x = torch.randn(rows, K)
    x[0] = 0
    x[1, 5] = 100
    return x


def test_every_scheme_has_a_row():
    assert {row.scheme for row in ROWS} == set(SCHEMES)
    assert not any(row.fast for row in ROWS)
    assert {row.suite for row in ROWS} == {"full"}


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_is_that_of_its_own_weights_and_activations(fmt, dtype):
    module = made_of(fmt, dtype=dtype, bias=True)
    x = hostile().to(dtype)
    weight, seen = module.dequantize(), module.quantize_activations(x)
    assert (weight.shape, seen.shape, seen.dtype) == ((N, K), x.shape, dtype)
    got = module(x).float()
    want = seen.double() @ weight.double().T + module.bias.double()
    # one rounding of a weight, one of the output
    assert ((got - want).norm(dim=1) / want.norm(dim=1)).max() <= 2 * torch.finfo(dtype).eps
    original = linear(dtype=dtype, bias=True).weight.float()
    assert (weight - original).norm() / original.norm() < WEIGHT_ERROR[f"{fmt.weight_bits:g}"]


@EACH
def test_activations_keep_their_bits_only(fmt):
    x = hostile().bfloat16()
    seen = made_of(fmt).quantize_activations(x)
    if fmt.activation_bits == 16:
        assert seen is x
        return
    assert not seen[0].any()
    groups = seen.view(-1, fmt.group_size or K)
    counts = {len(group.abs().unique()) for group in groups if group.any()}
    assert max(counts) <= {6: 32, 4: 8, 1.58: 2, 1: 1}[fmt.activation_bits]
    # the outlier costs its own group alone
    assert torch.equal(seen[2:], made_of(fmt).quantize_activations(x[2:]))


@EACH
def test_stored_bits_are_measured(fmt):
    module = made_of(fmt)
    stored = coverage.storage_bytes(coverage.tensors_of(module))
    assert 8 * stored / (N * K) == pytest.approx(BITS[fmt.scheme], abs=1e-9)


@EACH
def test_zero_rows_and_outliers_of_a_weight(fmt):
    weight = linear().weight.detach().clone()
    weight[0] = 0
    weight[1, 3] = 5.0  # 100 times the rest
    values = made_of(fmt, weight=weight).dequantize()
    assert torch.isfinite(values).all()
    if fmt.scheme != "ternary_dynamic":  # one scale per matrix there
        assert not values[0].any()
        assert torch.equal(values[2:], made_of(fmt).dequantize()[2:])
    if fmt.weight_bits >= 4:
        assert values[1, 3].item() == pytest.approx(5.0, rel=0.13)


@EACH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(fmt, bad):
    weight = linear().weight.detach().clone()
    weight[3, 3] = bad
    with pytest.raises(LowbitError, match=r"expected finite weights, got NaN or Inf in a \[96, 256\] linear"):
        made_of(fmt, weight=weight)


@EACH
def test_activations_that_are_not_finite_are_not_hidden(fmt):
    x = torch.ones(3, K, dtype=torch.bfloat16)
    x[1, 4] = torch.nan
    out = made_of(fmt)(x)
    assert not torch.isfinite(out[1]).any()
    assert torch.isfinite(out[[0, 2]]).all()


def test_all_of_them_compile_whole_and_give_the_same():
    modules = nn.ModuleList([made_of(fmt) for fmt in ROWS])

    def call(x):
        return torch.stack([module(x) for module in modules])

    x = hostile(4).bfloat16()
    with torch.no_grad():
        want, got = call(x), torch.compile(call, fullgraph=True, dynamic=False)(x)
    torch._dynamo.reset()
    for fmt, a, b in zip(ROWS, want.float(), got.float(), strict=True):
        assert (a - b).norm() / a.norm() <= torch.finfo(torch.bfloat16).eps, fmt.id


def test_the_backend_says_what_it_holds_and_refuses_the_rest():
    backend = backends.get("reference")
    module, x = made_of(ROWS[0]), hostile().bfloat16()
    assert torch.equal(backend.dequantize(module), module.dequantize())
    assert torch.equal(backend.quantize_activations(module, x), x)
    with pytest.raises(LowbitError, match="expected a linear of the reference backend, got a Linear"):
        backend.dequantize(linear())
    holder = nn.ModuleDict({"q_proj": linear()})
    with pytest.raises(LowbitError, match=r"unknown reference scheme 'fp5'; known: .*int4_dynamic"):
        backend.quantize(holder, Format("a16w5", "reference", "fp5", 16, 5), torch.bfloat16)
    with pytest.raises(LowbitError, match=r"expects q_proj in torch\.float16, got torch\.bfloat16"):
        backend.quantize(holder, ROWS[0], torch.float16)


def test_a_width_that_fills_no_whole_bytes_is_a_skip():
    odd = config(hidden_size=252, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    reason = backends.unmet(FORMATS["a1w1-reference"], CPU, odd)
    assert str(reason).startswith("shape: whole bytes of codes: 8 does not divide q_proj (K=252)")


@pytest.fixture(scope="module")
def divergences():
    """KL of every row on two windows of the embedded model's text, and the master's checksum before and after."""
    device = Device("cpu", 0, "a CPU", "a-cpu", None, None, 1, None, None)
    host = models.load(models.choose("embedded", "auto", device, {}))
    before = host.checksum()
    whole = texts.Source("embedded", 512, None).load(host.tokenizer)
    text = quality.Text(whole.name, whole.ids[:1024], 512)
    found = {}
    base = build(host, FORMATS["bf16-torch"], device).model
    with quality.Reference.build(base, text, source="bf16") as reference:
        for fmt in ROWS:
            found[fmt.name] = quality.score(build(host, fmt, device).model, text, reference, source=fmt.id).kld
    assert host.checksum() == before
    return found


def test_more_bits_never_diverge_more(divergences):
    for better, worse in (
        ("a16w6_e2m3_g32", "a6w6_e2m3_g32"),
        ("a16w6_e3m2_g32", "a6w6_e3m2_g32"),
        ("a6w6_e2m3_g32", "a4w4_g128"),
        ("a6w6_e3m2_g32", "a4w4_g128"),
        ("a4w4_g128", "a1.58w1.58"),
        ("a1.58w1.58", "a1w1"),
    ):
        assert divergences[better] < divergences[worse], (better, worse)


def test_six_bits_cost_little(divergences):
    assert max(value for name, value in divergences.items() if name.startswith("a16w6")) < 1e-3
