from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_runner import fake_kernels
from tiny import model

from lowbit import compilers, process_state, timing
from lowbit.cases import Case
from lowbit.device import Device
from lowbit.formats import FORMATS
from lowbit.metrics import Measurement
from lowbit.spent import Spent
from lowbit.workloads import WORKLOADS, Workload

CPU = Device("cpu", 0, "a test's CPU", "cpu-test", None, 100_000.0, 2, driver=None, cuda=None)
CARD = dataclasses.replace(CPU, kind="cuda", capability=(9, 0))


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(1e-9, 15), (0.1, 15), (0.25, 8), (0.9, 3), (2.0, 3), (2.1, 1), (60.0, 1)]
)
def test_rounds_fill_two_seconds(seconds, rounds):
    assert timing.round_count(seconds) == rounds


def test_the_prompt_is_the_same_in_every_run():
    ids = timing.prompt(1000, 2, 3, CPU)
    assert ids.tolist() == [[13, 932, 851], [770, 689, 608]]
    assert ids.dtype == torch.int64


def test_a_round_timer_keeps_one_figure_a_round():
    calls = []
    timer = timing.RoundTimer(CPU, lambda: calls.append("round"), lambda: calls.append("after"))
    timer()
    timer()
    assert calls == ["round", "after"] * 2
    assert len(timer.seconds) == 2
    assert all(0 <= issued <= whole for issued, whole in zip(timer.issued, timer.seconds, strict=True))


@pytest.mark.parametrize(
    ("mode", "device", "skips"),
    [("reduce-overhead", CARD, 3), ("max-autotune", CARD, 3), ("default", CARD, None), ("reduce-overhead", CPU, None)],
)
def test_cuda_graphs_given_up_are_counted_where_a_mode_has_them(monkeypatch, mode, device, skips):
    monkeypatch.setattr(process_state, "cudagraph_skips", lambda: 3)
    case = Case("decode", FORMATS["bf16-torch"], mode, WORKLOADS[2])
    assert timing.cudagraph_skips(case, device) == skips
    assert timing.cudagraph_skips(Case("quality", FORMATS["bf16-torch"]), CARD) is None


class Vram:
    """A meter that measures nothing."""

    def trim(self): ...

    def reset_peak(self): ...


KV_ROW = "a16w4_g128_lowbit_kv_fp8-recipe"


@pytest.mark.parametrize(
    ("row", "taken", "prompts"),
    [("a16w4_g128-lowbit", True, [24] * 9), ("a16w4_g128-lowbit", False, None), (KV_ROW, True, None)],
)
def test_a_native_prefill_is_that_of_our_kernels_where_they_take_the_model(monkeypatch, row, taken, prompts):
    """The proof, three of the warm-up, an estimate, one untimed and three rounds; else the modules, as one graph:
    they alone fill a cache of codes."""
    fake_kernels(monkeypatch)
    monkeypatch.setattr(timing.native, "takes", lambda model, batch: taken)
    captured, decoders = [], []
    monkeypatch.setattr(compilers, "compile_call", lambda call, mode, *args: captured.append(mode) or call)
    made = timing.Stopwatch._decoder
    monkeypatch.setattr(timing.Stopwatch, "_decoder", lambda *args: decoders.append(made(*args)) or decoders[-1])
    watch = timing.Stopwatch(CPU, None, Vram(), Spent(), lambda text: None)
    case = Case("prefill", FORMATS[row], "native", Workload("p24", "prefill", 1, 24, 0, "small"))
    quantized = SimpleNamespace(model=model(torch.float16), dtype="fp16")
    found = SimpleNamespace(prefill_s=[], compile_s=None, yardstick_s=[])
    ids = timing.prompt(512, 1, 24, CPU)
    watch.time_prefill(case, quantized, ids, found, lambda timer, setup, rounds: [timer() for _ in range(3)])
    assert len(found.prefill_s) == 3
    (decoder,) = decoders
    if prompts:
        assert decoder.native_prefill.prompts == prompts
        assert not captured
    else:
        assert decoder.native_prefill is None
        assert captured == ["native"]


def test_a_native_decode_says_how_it_reads_which_cache(monkeypatch):
    fake_kernels(monkeypatch)
    watch = timing.Stopwatch(CPU, None, Vram(), Spent(), lambda text: None)
    case = Case("decode", FORMATS[KV_ROW], "native", Workload("b1_c8", "decode", 1, 8, 4, "small"))
    quantized = SimpleNamespace(model=model(torch.float16), dtype="fp16")
    found = Measurement("decode", prompt_tokens=8, new_tokens=4)
    watch.time_decode(
        case, quantized, timing.prompt(512, 1, 8, CPU), found, lambda timer, setup, rounds: (setup(), timer())
    )
    assert found.attention == "a fake's: fp8"
    assert found.kv_bytes_per_token == 2 * 2 * 2 * (32 + 2)  # layers, keys and values, KV heads, codes and their scale


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_process_is_settled_when_its_graphs_are_there_and_uses_a_second_stream_before_each_round(monkeypatch, kind):
    log = []
    monkeypatch.setattr(compilers, "compile_call", lambda call, mode, *args: log.append("compiled") or call)
    monkeypatch.setattr(timing.measure, "settle", lambda device: log.append("settled"))
    monkeypatch.setattr(timing.measure, "use_second_stream", lambda device: log.append("second stream"))
    watch = timing.Stopwatch(CPU, None, Vram(), Spent(), lambda text: None)
    workload = Workload("w", kind, 1, 8, 4 if kind == "decode" else 0, "small")
    case = Case(kind, FORMATS["bf16-torch"], "regional", workload)
    quantized = SimpleNamespace(model=model(torch.float16), dtype="fp16")
    found = Measurement(kind, prompt_tokens=8, new_tokens=4)
    take = watch.time_decode if kind == "decode" else watch.time_prefill
    ids = timing.prompt(512, 1, 8, CPU)

    def rounds(timer, setup, rounds):
        for _ in range(2):
            setup()
            log.append("round")
            timer()

    take(case, quantized, ids, found, rounds)
    assert log[log.index("settled") :] == ["settled", *["second stream", "round"] * 2]
    assert "compiled" in log[: log.index("settled")]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_layers_and_head_of_the_model_are_handed_to_the_compiler(monkeypatch, kind):
    handed = []
    monkeypatch.setattr(compilers, "compile_call", lambda call, mode, *args: handed.append(args))
    case = Case(kind, FORMATS["a16w8-torchao"], "regional", Workload("w", kind, 1, 8, 4, "small"))
    watch, made = timing.Stopwatch(CPU, None, Vram(), Spent(), lambda text: None), model()
    watch._compiler(case, SimpleNamespace(model=made))(print)
    ((*_, layers, head),) = handed
    assert layers == list(made.model.layers)
    assert head is made.lm_head
