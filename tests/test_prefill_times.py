"""The prefill in `python -m lowbit step`: what it times and tells, with launches and graphs that are only noted."""

from __future__ import annotations

from types import SimpleNamespace

import noted
import pytest
import torch
from test_prefill import ready
from test_runner import streamed
from tiny import model

from lowbit import native_times, prefill_times, regional
from lowbit.errors import LowbitError

CPU = torch.device("cpu")
HERE = SimpleNamespace(torch=CPU, kind="cpu", capability=None)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Graphs that replay nothing; events that say 7 ms; one round."""
    monkeypatch.setattr(native_times, "event_seconds", lambda call: [call(), 7e-3][1])
    monkeypatch.setattr(prefill_times, "ROUNDS", 1)
    return noted.graphs(monkeypatch)


@pytest.fixture
def launched(monkeypatch):
    return noted.launches(monkeypatch)


def test_a_time_is_the_median_of_calls_behind_two_that_do_not_count(monkeypatch):
    monkeypatch.setattr(prefill_times, "ROUNDS", 3)
    ticks = iter([0, 90, 100, 150, 200, 201, 300, 305, 400, 403])
    monkeypatch.setattr(prefill_times.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert prefill_times.milliseconds(CPU, calls.append, "a prompt") == 3000
    assert calls == ["a prompt"] * 5


@pytest.mark.parametrize(("compiled", "names"), [(False, []), (True, ["compiled_ms"])])
def test_bf16_is_timed_eager_as_a_graph_and_compiled_if_wished(monkeypatch, compiled, names):
    made, modes, graphed = model(torch.bfloat16), [], []
    monkeypatch.setattr(
        prefill_times.compilers, "compile_call", lambda call, mode, *args: [call, modes.append(mode)][0]
    )
    record = regional.GraphedCall._record
    monkeypatch.setattr(
        regional.GraphedCall, "_record", lambda self, args: [graphed.append(args[0].shape), record(self, args)][1]
    )
    host = SimpleNamespace(config=made.config, build=lambda where, dtype, transform: made)
    first, second = prefill_times.reference(host, HERE, [12, 40], compiled)
    assert [first["tokens"], second["tokens"]] == [12, 40]
    assert list(first) == ["format", "what", "tokens", "eager_ms", "graph_ms", *names]
    assert modes == ["reduce-overhead"] * 2 * len(names)
    assert graphed == [(1, 12), (1, 40)]
    assert prefill_times.fastest({"tokens": 1, "eager_ms": 5.0, "graph_ms": 4.0}) == 4.0


def of_format(monkeypatch, against):
    monkeypatch.setattr("lowbit.generate.decoder.prove", lambda *args: None)  # what is only noted computes nothing
    made, dtype = streamed("int4_g128")
    return list(prefill_times.of_format(made, "int4_g128", dtype, CPU, against))


@pytest.fixture
def modules(monkeypatch):
    """The modules' own unpacking, by the reference."""
    from lowbit.kernels import stream_modules, weights

    def dequantize(linear, dtype, start, stop):
        return weights.dequantize(linear.rows(start, stop)).to(dtype)

    monkeypatch.setattr(stream_modules.StreamLinear, "dequantize", dequantize)


def test_a_format_is_timed_by_modules_launches_and_graphs_and_in_parts(launched, modules, monkeypatch):
    lines = of_format(monkeypatch, {12: 1e9, 40: 1e-9})
    short, long = (line for line in lines if line["what"] == "prefill")
    ways = ["modules_ms", "launched_ms", "graph_ms", "differ", "times_bf16"]
    assert list(short) == ["format", "what", "tokens", *ways]
    assert (short["tokens"], long["tokens"], short["differ"]) == (12, 40, 0)
    assert short["times_bf16"] == 0
    assert long["times_bf16"] > 1e6
    parts = {line["of"]: line for line in lines if line["what"] == "part" and line["tokens"] == 40}
    assert list(parts)[:3] == ["norm", "unpack qkv", "gemm qkv"]
    assert {"attention", "attention the last token", "last the last token", "silu", "unpack gate_up"} < set(parts)
    assert parts["unpack qkv"]["calls"] == 2
    us = 7000 / prefill_times.REPLAYS
    assert parts["unpack qkv"]["us"] == pytest.approx(us / 2)
    assert parts["gemm down"]["tflop_s"] == round(2 * 40 * 768 * 256 / us / 1e6, 1)
    assert parts["norm"].keys() == {"format", "what", "tokens", "us", "calls", "ms", "of"}


def test_an_unpacking_moves_the_codes_and_the_matrix(launched):
    made, _, run = ready()
    run(torch.arange(8).unsqueeze(0))
    works = [work for work in run.plan(8) if work.kind == "unpack"]
    stored = made.model.layers[0].mlp.down_proj.part.stream.data.numel()
    down = next(work for work in works if work.of == "down")
    assert down.moved == stored + 256 * 768 * 2


def test_replays_that_differ_from_the_launches_are_counted(launched, modules, monkeypatch):
    monkeypatch.setattr(prefill_times, "ROUNDS", 4)
    monkeypatch.setattr(prefill_times, "_logits", lambda native, ids: native.step.logits + 1)
    assert of_format(monkeypatch, {12: 1.0})[0]["differ"] == 4


def test_prompts_must_fit_the_model():
    config = model(torch.bfloat16).config
    prefill_times.check([511], config)
    prefill_times.check([], config)
    with pytest.raises(LowbitError, match="--prefill: expected prompts of up to 511 tokens for this model, got 2048"):
        prefill_times.check([512, 2048], config)
