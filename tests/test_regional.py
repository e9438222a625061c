from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, model

from lowbit import backends, compilers, faults, generate, process_state, regional
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS

IDS = torch.arange(8).view(1, 8)


def logits_after_prefill(made, step_of, kv=""):
    """Prefill 8 tokens eagerly, then two steps through ``step_of(step)`` -> their logits, [2, V]."""
    cache = generate.make_cache(made, 1, 32, kv=kv)
    generate.prefill(made, cache, IDS)
    step = step_of(lambda token, position: generate.decode_logits(made, token, position, cache))
    return torch.cat([step(torch.tensor([[3 + n]]), torch.tensor([8 + n])).clone()[0] for n in range(2)])


def three_layers_of(fmt):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[fmt.dtypes[0]]
    made = model(dtype, num_hidden_layers=3)
    for layer in made.model.layers:
        backends.get(fmt.backend).quantize(layer, fmt, dtype)
    return made


@pytest.mark.parametrize("name", ["bf16-torch", "a16w8-torchao", "a16w4_nf4_dq-bitsandbytes"])
def test_one_compile_serves_every_layer(name):
    made = three_layers_of(FORMATS[name])
    layers = made.model.layers
    with torch.inference_mode(), process_state.preserved_state():
        want = logits_after_prefill(made, lambda step: step)
        assert process_state.compiled_graphs() == 0
        got = logits_after_prefill(made, lambda step: compilers.compile_call(step, "regional", CPU, {}, layers=layers))
        assert process_state.compiled_graphs() == 1
        assert process_state.counters() == (0, 0)
    assert ((got - want).float().norm() / want.float().norm()).item() < 0.02
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # hqq's, by Dynamo
@pytest.mark.parametrize(
    "name",
    [
        *("a16w4_g128-torchao", "a16w4_intx_g32-torchao", "a8w4_intx_g32-torchao", "a16w4_g64-hqq"),
        *("a8w8_llmint8_t0-bitsandbytes", "a16w6_e3m2-reference", "a16w3_g128-lowbit", "bf16_kv_fp8-torch"),
    ],
)
def test_one_trace_serves_every_layer_of_each_library(name, monkeypatch):
    """As above, without Inductor's half of a compile: what tells layers apart is Dynamo's."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, options, **how: compiled(fn, **{**how, "backend": "aot_eager"}))
    fmt = FORMATS[name]
    made = three_layers_of(fmt)
    with torch.inference_mode(), process_state.preserved_state():
        want = logits_after_prefill(made, lambda step: step, fmt.kv)
        got = logits_after_prefill(
            made, lambda step: regional.compile_layers(step, made.model.layers, {}, graph=False), fmt.kv
        )
        assert process_state.compiled_graphs() == 1
        assert process_state.counters() == (0, 0)
    assert ((got - want).float().norm() / want.float().norm()).item() < 0.02


def test_layers_are_given_back_after_a_failure():
    made = model()

    def broken():
        assert "forward" in vars(made.model.layers[0])
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"), process_state.preserved_state():
        regional.compile_layers(broken, made.model.layers, {}, graph=False)()
    assert [layer.self_attn.layer_idx for layer in made.model.layers] == [0, 1]
    assert not any("forward" in vars(layer) for layer in made.model.layers)


def test_layers_of_two_kinds_are_refused():
    made = model()
    with pytest.raises(LowbitError, match=r"layers of one class, got \['LlamaDecoderLayer', 'LlamaMLP'\]"):
        regional.compile_layers(print, [made.model.layers[0], made.model.layers[0].mlp], {}, graph=False)


def test_a_cache_without_memory_is_refused():
    from transformers import StaticCache

    made = model()
    lazy = StaticCache(made.config, max_cache_len=16)
    step = regional.compile_layers(lambda ids: made(ids, past_key_values=lazy), made.model.layers, {}, graph=False)
    with pytest.raises(LowbitError, match="expects a KV cache with memory"), process_state.preserved_state():
        step(IDS)


# -- CUDA graphs, with a stand-in that replays what was recorded -------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """Counts recordings; what runs inside ``torch.cuda.graph`` counts as recorded."""
    made = []

    class Graph:
        replays = 0

        def __init__(self):
            made.append(self)

        def replay(self):
            self.replays += 1

    @contextmanager
    def record(graph, pool, capture_error_mode):
        assert (pool, capture_error_mode) == ((0, 7), "thread_local")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: STREAM)
    return made


STREAM = SimpleNamespace(device_index=3)


@pytest.fixture
def left(monkeypatch):
    """What is done after a capture that failed."""
    done = []

    def give_back(name):
        def call(device, pool):
            done.append((name, device, pool))
            raise RuntimeError("not currently recording to mempool_id")  # torch gave it back itself

        return call

    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: done.append(("stream", stream)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronized"))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, give_back(name), raising=False)
    return done


def test_what_no_graph_can_hold_is_named_and_costs_no_more_than_the_case(graphs, left):
    def step(x):
        if len(calls) > 1:
            try:
                raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nSearch for")
            finally:  # as torch.cuda.graph does: its end fails too
                raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
        return x

    calls = []
    call = regional.GraphedCall(lambda x: [calls.append(x), step(x)][1])
    call(torch.zeros(2))
    with pytest.raises(LowbitError, match="one CUDA graph: AcceleratorError: operation not permitted when") as caught:
        call(torch.zeros(2))
    assert not faults.is_device_fault(caught.value)
    pool = (3, (0, 7))
    assert left == [
        ("stream", STREAM),
        ("_cuda_endAllocateToPool", *pool),
        ("_cuda_releasePool", *pool),
        "synchronized",
    ]


def test_a_fault_that_outlasts_a_capture_is_the_devices(graphs, left, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    call = regional.GraphedCall(lambda x: x if not call._inputs else 1 / 0)
    call(torch.zeros(2))
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        call(torch.zeros(2))
    assert faults.is_device_fault(caught.value)


def test_the_first_call_runs_and_the_second_records(graphs):
    seen = []

    def step(x):
        seen.append(x)
        return x

    call = regional.GraphedCall(step)
    x = torch.zeros(2)
    torch._dynamo.mark_static_address(x)
    assert call(x) is x
    assert graphs == []
    for _ in range(3):
        assert call(x) is x
    assert len(seen) == 2
    assert [graph.replays for graph in graphs] == [3]
    assert seen[1] is x  # marked as static: read where it is


def test_other_arguments_are_copied_in(graphs):
    call = regional.GraphedCall(lambda x: x)
    call(torch.zeros(2))
    first = torch.ones(2)
    inside = call(first)
    assert inside is not first
    call(torch.full((2,), 5.0))
    assert inside.tolist() == [5.0, 5.0]
    assert first.tolist() == [1.0, 1.0]
    assert len(graphs) == 1


def test_a_new_address_or_shape_is_recorded_anew(graphs):
    calls = []

    def step(x):
        calls.append(tuple(x.shape))
        return x

    call = regional.GraphedCall(step)
    for size in (2, 2, 3, 3):
        x = torch.zeros(size)
        torch._dynamo.mark_static_address(x)
        call(x)
        call(x)
    assert calls == [(2,), (2,), (2,), (3,), (3,), (3,)]
    assert len(graphs) == 4
