"""`python -m lowbit step`: what it measures, with steps that the CPU can take, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_runner import FakeStep, fake_kernels, streamed
from tiny import model

from lowbit import __main__, generate, native_step, native_times
from lowbit.errors import LowbitError
from lowbit.kernels import runner

CPU = torch.device("cpu")


def test_it_says_what_it_needs(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the refusal is for machines without")
    assert __main__.main(["step", "--model", "embedded"]) == __main__.UNUSABLE
    assert "bf16 can't run here: needs a CUDA device" in capsys.readouterr().err


def test_an_unknown_format_is_said_to_be_one_on_any_machine(capsys):
    assert __main__.main(["step", "--model", "embedded", "--formats", "bf16,int4"]) == __main__.UNUSABLE
    assert "unknown weight format in --formats 'int4'; known: bf16, binary" in capsys.readouterr().err


def test_prompts_are_numbers_too(capsys):
    assert __main__.main(["step", "--model", "embedded", "--prefill", "512,x"]) == __main__.UNUSABLE
    assert "--prefill: expected whole numbers of 1 or more, separated by commas, got '512,x'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "12,x", "0", "-3"])
def test_numbers_are_numbers(text):
    with pytest.raises(LowbitError, match="--tokens: expected whole numbers"):
        native_step._numbers(text, "--tokens")
    assert native_step._numbers("128,512", "--tokens") == [128, 512]


def test_a_rate_is_the_median_of_its_rounds(monkeypatch):
    ticks = itertools.accumulate([0, 9, 1, 2, 1, 4, 1, 1])  # a round that does not count, then 2, 4 and 1 s
    monkeypatch.setattr(native_step.time, "perf_counter", lambda: next(ticks))
    calls = []

    class Step:
        position = torch.zeros(1, dtype=torch.int64)

        def __call__(self):
            calls.append(int(self.position))

    assert native_step.rate(Step(), 128, 10, CPU) == 5.0
    assert calls == [128] * 40


def test_caches_are_named():
    assert native_step._caches("bf16,fp8, int8") == ["", "fp8", "int8"]
    with pytest.raises(LowbitError, match="unknown KV cache format in --kv 'int4'; known: bf16, fp8, int8"):
        native_step._caches("bf16,int4")


def test_each_cache_is_measured_with_its_name(monkeypatch, capsys):
    """The command's own lines, over fake kernels: what ran is in each."""
    fake_kernels(monkeypatch)
    monkeypatch.setattr(native_step, "rate", lambda step, context, count, where: 100.0)
    monkeypatch.setattr(native_step, "attention_us", lambda step, context: 2.0)
    monkeypatch.setattr(native_step, "operations", lambda step, made: {"head": (1, 3.0, 4.0)})
    lines = list(native_step._measure(model(torch.float16), "int8", "fp8", 1.0, [16, 32], [8], 2))
    assert {line["kv"] for line in lines} == {"fp8"}
    assert [line["what"] for line in lines] == [
        *("ready", "decode", "decode", "repeats", "attention", "attention", "kernel"),
    ]
    assert lines[0]["attention"] == "a fake's: fp8"
    # 2 layers, 2 KV heads of 32 dimensions with an fp16 scale each, keys and values: 136 bytes per position and layer
    assert lines[5]["gb_s"] == round(136 * 32 / 2.0 / 1e3)
    plain = next(native_step._measure(model(torch.float16), "int8", "", 1.0, [16], [8], 2))
    assert plain["kv"] == "float16"
    assert native_step._line(plain).split()[:3] == ["int8", "float16", "ready"]


@pytest.mark.parametrize(("noise", "want"), [(0.0, 0), (1e-3, 4)])
def test_runs_that_differ_in_a_bit_are_counted(monkeypatch, noise, want):
    class Noisy(FakeStep):
        def launch(self):
            super().launch()
            self.logits = self.logits + noise * torch.rand(1)

        __call__ = launch

    fake_kernels(monkeypatch, Noisy)
    made = model(torch.float16)
    decoder = generate.Decoder(made, 1, 64, torch.float16)
    prompt = torch.arange(8).unsqueeze(0)
    decoder.run_natively(prompt, "a case")
    assert native_step.differing(decoder, prompt, 6, 4) == want


def test_one_tokens_logits_are_enough_to_differ(monkeypatch):
    """The tokens and the last logits are the same in all runs, the third's logits in all but one."""
    seen = []

    class Noisy(FakeStep):
        def launch(self):
            super().launch()
            seen.append(int(self.position))
            if int(self.position) == 11 and seen.count(11) == 3:
                self.logits = self.logits.nextafter(torch.tensor(torch.inf))

        __call__ = launch

    fake_kernels(monkeypatch, Noisy)
    decoder = generate.Decoder(model(torch.float16), 1, 64, torch.float16)
    prompt = torch.arange(8).unsqueeze(0)
    decoder.run_natively(prompt, "a case")
    assert native_step.differing(decoder, prompt, 6, 4) == 1


def test_each_kind_of_kernel_is_timed_over_all_its_calls(monkeypatch):
    launched = []
    fake = type("Fake", (), {"launch": lambda self, kernel, *args, **kwargs: launched.append(kernel)})()
    monkeypatch.setattr(runner, "load", lambda shape, device, progress=None: fake)
    monkeypatch.setattr(native_times, "_time", lambda calls, step: float(len([call() for call in calls])) * 2)
    made, dtype = streamed("int8")
    decoder = generate.Decoder(made, 1, 160, dtype)
    step = runner.NativeStep(made, decoder.cache, decoder.token, decoder.position)
    found = native_times.operations(step, made)
    assert {name: calls for name, (calls, _, _) in found.items()} == {
        "embed": 1,
        "qkv": 2,
        "attention": 2,
        "o": 2,
        "gate_up": 2,
        "down": 2,
        "head": 1,
    }
    assert len(launched) == 12
    assert found["down"][1] == 2.0
    assert found["down"][2] == pytest.approx(768 * 256 / 2.0 / 1e3)  # bytes per µs are MB/s
    assert found["attention"][2] == 0
