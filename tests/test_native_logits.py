"""`python -m lowbit step --logits`: what is held against fp32, by the kernels' own source on the CPU and by fakes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from emulated import emulate_runner, unmet
from test_runner import FakeStep, fake_kernels
from tiny import config, model
from torch import nn

from lowbit import __main__, native_logits, native_step
from lowbit.kernels import weights
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.runner import NativeStep

CPU = torch.device("cpu")


class Host:
    """The tiny Llama, as a HostModel builds it."""

    def __init__(self, **changes):
        self.changes, self.config = changes, config(**changes)

    def build(self, where, dtype, transform, tables):
        assert (where, list(tables)) == (CPU, ["lm_head"])
        made = model(dtype, **self.changes)
        transform(made)
        return made


def plain(module, name):
    """The same weights in 16 bits, as modules that need no kernel to be unpacked."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = weights.dequantize(quantize(linear.weight.detach(), name)).to(linear.weight.dtype)


def lines(name, dtype, positions, attach=plain, **changes):
    host = Host(**changes)
    streamed = host.build(CPU, dtype, lambda module: attach(module, name), ["lm_head"])
    found = list(native_logits.of_format(host, streamed, name, dtype, positions))
    assert streamed.config.num_hidden_layers == len(streamed.model.layers) == host.config.num_hidden_layers
    return found


@pytest.mark.skipif(unmet() is not None, reason=str(unmet()))
def test_the_kernels_come_as_near_to_fp32_as_operands_of_16_bits_can(monkeypatch, kernels_folder):
    emulate_runner(monkeypatch, kernels_folder)
    monkeypatch.setattr(NativeStep, "capture", lambda self: None)
    monkeypatch.setattr(NativeStep, "__call__", NativeStep.launch)
    monkeypatch.setattr(native_logits, "DEPTHS", ())
    found = lines("int4_g128", torch.float16, 8, native_step.attach)
    native, modules, operands, cached = found
    assert [line["way"] for line in found] == ["native, prompt 1", "modules", "x in 16 bits", "k, v in 16 bits"]
    assert native["positions"] == "1-7"
    assert 0 < native["error"] < 2e-3
    assert native["error"] < 3 * operands["error"]
    assert 0 < cached["error"] < operands["error"]
    assert native["mean"] < 1.5 * modules["mean"]
    assert native["wrong"] == modules["wrong"] == operands["wrong"] == 0
    assert native["clear"] <= native["top1"] <= 7


def test_long_texts_are_told_in_stretches_and_behind_a_long_prompt_too(monkeypatch):
    monkeypatch.setattr(native_logits, "SPAN", 16)
    monkeypatch.setattr(native_logits, "SHORT", 20)
    fake_kernels(monkeypatch)
    found = lines("int8", torch.float16, 200, num_hidden_layers=2)
    assert [line["positions"] for line in found if line["layers"] == 2] == [
        *("1-199", "128-143", "184-199"),  # behind one token
        "184-199",  # behind 184
        *("0-199", "128-143", "184-199") * 3,
    ]
    assert {line["positions"] for line in found if line["layers"] == 1} == {"1-19", "0-19"}
    assert max(line["error"] for line in found) < 5e-3


def test_wrong_kernels_are_seen(monkeypatch):
    class Wrong(FakeStep):
        def launch(self):
            super().launch()
            self.logits = -self.logits if int(self.position) == 6 else self.logits

        __call__ = launch

    fake_kernels(monkeypatch, Wrong)
    native, modules, *_ = lines("int8", torch.float16, 12, num_hidden_layers=1)
    assert native["error"] == pytest.approx(2, rel=1e-2)
    assert native["top1"] == 10
    assert modules["error"] < 5e-3


def test_an_arg_max_is_owed_where_fp32_is_ahead_by_four_times_the_difference():
    want = torch.zeros(3, 400)
    want[:, 7] = 1.0
    found = want.clone()
    found[0, 3] = 1.5  # the difference is 1.5 / 20 per logit: 4 times that is 0.3 below 1
    found[1, 3] = 0.5
    found[2, 3:] -= 5.0  # 5 per logit: nothing is owed
    line = native_logits.held_against(found, want, 128)
    assert line == {"positions": "128-130", "error": 99.6, "mean": 33.9, "top1": 1, "clear": 2, "wrong": 1}


@pytest.mark.parametrize("count", ["1", "-4", "9999"])
def test_the_model_has_room_for_the_positions(monkeypatch, capsys, count):
    monkeypatch.setattr(native_step.batches, "unmet", lambda *args: None)
    monkeypatch.setattr(native_step.nvrtc, "available", lambda: None)
    monkeypatch.setattr(native_step.models, "choose", lambda *args: SimpleNamespace(config=config()))
    assert __main__.main(["step", "--formats", "int8", "--logits", count, "--prefill", ""]) == __main__.UNUSABLE
    assert f"--logits: expected 0 (none) or 2 to 512 positions, got {count}" in capsys.readouterr().err
