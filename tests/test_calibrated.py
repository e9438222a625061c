from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny import model
from torch import nn

from lowbit import backends, calibration, models, quality, quantized, texts, truth
from lowbit.backends.calibrated import gptq
from lowbit.backends.calibrated.layers import Walk, unit
from lowbit.device import Device
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, LINEARS, Format

CPU = Device("cpu", 0, "a CPU", "a-cpu", None, None, 1, None, None)
ROWS = [row for row in FORMATS.values() if row.backend == "calibrated"]
STORIES = texts.Source("embedded", 512, None)
TOKENS = torch.arange(96).view(3, 32)


def grid(columns):
    """16 levels over the range of a group."""
    low, high = columns.aminmax(dim=-1, keepdim=True)
    return (high - low) / 15, low


def nearest(weight, group):
    parts = []
    for columns in weight.split(group, dim=1):
        scale, zero = grid(columns)
        parts.append(((columns - zero) / scale).round().clamp(0, 15) * scale + zero)
    return torch.cat(parts, 1)


def value(rounded, group):
    scale, zero = (part.repeat_interleave(group, 1) for part in (rounded.scale, rounded.zero))
    return rounded.codes * scale + zero


def correlated(count, k):
    torch.manual_seed(3)
    mixed = torch.randn(k // 8, k)
    return torch.randn(count, k // 8) @ mixed + 0.3 * torch.randn(count, k)


# -- the algorithm -----------------------------------------------------------------------------------------------------


def test_inputs_without_correlation_leave_nothing_to_make_up_for():
    torch.manual_seed(0)
    weight = torch.randn(24, 256)
    rounded = gptq.quantize(weight, gptq.factor(torch.diag(torch.rand(256) + 0.1)), 64, 15, grid)
    assert rounded.scale.shape == rounded.zero.shape == (24, 4)
    assert torch.allclose(value(rounded, 64), nearest(weight, 64), atol=1e-6)


@pytest.mark.parametrize("group", [32, 128, 256])
def test_the_output_is_nearer_than_that_of_the_nearest_weights(group):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 256), correlated(3000, 256)
    x, fresh = x[:2000], x[2000:]
    moments = gptq.Moments(256, torch.device("cpu"))
    moments.add(x[:1000].view(10, 100, 256))
    moments.add(x[1000:].view(10, 100, 256))
    assert torch.allclose(moments.sum, x.T @ x, rtol=1e-4, atol=1e-2)
    rounded = gptq.quantize(weight, gptq.factor(moments.sum), group, 15, grid)
    lost, plain = ((fresh @ (other - weight).T).norm() for other in (value(rounded, group), nearest(weight, group)))
    assert lost < 0.6 * plain


@pytest.mark.parametrize("block", [32, 96])
def test_the_size_of_a_block_changes_nothing(monkeypatch, block):
    """A group may be wider than a block, or not begin with one."""
    torch.manual_seed(0)
    weight, x = torch.randn(16, 256).double(), correlated(2000, 256)
    upper = gptq.factor(x.T @ x)
    monkeypatch.setattr(gptq, "BLOCK", 256)
    whole = gptq.quantize(weight, upper, 128, 15, grid)
    monkeypatch.setattr(gptq, "BLOCK", block)
    parts = gptq.quantize(weight, upper, 128, 15, grid)
    assert (whole.codes != parts.codes).float().mean() < 0.01  # ties, by the order of sums
    assert torch.allclose(whole.scale, parts.scale, rtol=1e-4)


def test_an_input_that_is_always_zero_is_no_obstacle_and_nan_is_one():
    moments = torch.eye(128)
    moments[5, 5] = 0
    torch.manual_seed(0)
    weight = torch.randn(8, 128)
    weight[3] = 0.0  # a group of one value: its scale is 0
    rounded = gptq.quantize(weight, gptq.factor(moments), 128, 15, grid)
    assert torch.equal(value(rounded, 128)[3], torch.zeros(128))
    moments[7, 7] = torch.nan
    with pytest.raises(LowbitError, match="expected finite inputs, got NaN or Inf"):
        gptq.factor(moments)


# -- layer by layer ----------------------------------------------------------------------------------------------------


def test_a_walk_through_the_layers_is_the_models_own_way():
    made = model()
    walk = Walk(made, TOKENS)
    with torch.no_grad():
        for layer in made.model.layers:
            walk.advance(layer)
        for state, ids in zip(walk._hidden, TOKENS, strict=True):
            assert torch.equal(made.model.norm(state), made.model(input_ids=ids[None]).last_hidden_state)


def test_every_token_counts_alike_whatever_its_length():
    x = torch.tensor([[[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]]])
    assert torch.allclose(unit(x), torch.tensor([[[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]]))


@pytest.mark.parametrize("fmt", ROWS, ids=lambda fmt: fmt.id)
def test_a_row_is_finished_by_quantize_and_its_kernels_are_true(fmt):
    made, backend = model(), backends.get("calibrated")
    fmt = replace(fmt, calibration_windows=len(TOKENS))
    with pytest.raises(LowbitError, match=r"q_proj was not calibrated: give build\(\) tokens"):
        backend.quantize(made, fmt, torch.bfloat16)
    source = {path: p.detach().clone() for path, p in made.named_parameters()}
    backend.calibrate(made, fmt, TOKENS)
    linears = [module for path, module in made.named_modules() if path.endswith(LINEARS)]
    assert [type(linear) for linear in linears] == [nn.Linear] * 14
    assert not any(linear.weight.numel() for linear in linears)  # freed
    backend.quantize(made, fmt, torch.bfloat16)
    assert all(backend.is_quantized(module) for path, module in made.named_modules() if path.endswith(LINEARS))
    proven = truth.prove(made, fmt, torch.bfloat16)
    assert len(proven) == 7
    for path in proven:
        stored, original = backend.dequantize(made.get_submodule(path)), source[f"{path}.weight"].float()
        assert (stored - original).norm() / original.norm() < {4: 0.2, 3: 0.4, 2: 0.9}[fmt.weight_bits]


def test_an_unknown_scheme_lists_the_known_ones():
    with pytest.raises(LowbitError, match="unknown calibrated scheme 'spqr'; known: awq, gptq"):
        backends.get("calibrated").calibrate(model(), Format("a16w4", "calibrated", "spqr", 16, 4), TOKENS)


# -- what it is good for -----------------------------------------------------------------------------------------------


def as_it_is(llama):
    """Leave a model unchanged."""


@pytest.fixture(scope="module")
def scored():
    """KL of a format on four windows of the embedded model's held-out text, from a host's own bf16."""
    host = models.load(models.choose("embedded", "auto", CPU, {}))
    whole = STORIES.load(host.tokenizer)
    text = quality.Text(whole.name, whole.ids[: 4 * 512], 512)
    before = host.checksum()

    @cache
    def base(change):
        """The changed host and its own logits."""
        changed = replace(host, master=host.skeleton())
        for parameter in changed.master.parameters():
            parameter.data = parameter.data.clone()
        change(changed.master)
        model = quantized.build(changed, FORMATS["bf16-torch"], CPU).model
        return changed, quality.Reference.build(model, text, source="bf16")

    def score(fmt, change=as_it_is):
        changed, reference = base(change)
        tokens = calibration.tokens(host, STORIES, fmt.calibration_windows) if fmt.calibration_windows else None
        made = quantized.build(changed, fmt, CPU, tokens)
        found = quality.score(made.model, text, reference, source=fmt.id).kld
        assert host.checksum() == before
        return found

    return score


@pytest.mark.parametrize("bits", [4, 2])
def test_gptq_diverges_less_than_plain_rounding(scored, bits):
    calibrated = replace(FORMATS[f"a16w{bits}_gptq_g128-calibrated"], calibration_windows=8)
    plain = replace(FORMATS[f"a16w{bits}_g128-lowbit"], targets=LINEARS)
    assert scored(calibrated) < {4: 0.85, 2: 0.75}[bits] * scored(plain)


@torch.no_grad()
def make_outliers(llama):
    """Four channels of the inputs of attention and feed-forward 30 times as large, their weights 30 times as small: the
    same function, with the outlier channels that large models have and the embedded one has not."""
    for layer in llama.model.layers:
        for norm, names in (
            (layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
            (layer.post_attention_layernorm, ("gate_proj", "up_proj")),
        ):
            norm.weight[17::64] *= 30
            for name in names:
                getattr(layer.self_attn if name[0] in "qkv" else layer.mlp, name).weight[:, 17::64] /= 30


def test_awq_saves_outlier_channels(scored):
    calibrated = replace(FORMATS["a16w4_awq_g128-calibrated"], calibration_windows=1)
    plain = FORMATS["a16w4_g128-torchao"]
    assert scored(calibrated, make_outliers) < 0.5 * scored(plain, make_outliers)
