from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny import CPU, model

from lowbit import backends, compilers, generate, process_state, regional
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS

IDS = torch.arange(8).view(1, 8)


def logits_after_prefill(made, step_of):
    """Prefill 8 tokens eagerly, then two steps through ``step_of(step)`` -> their logits, [2, V]."""
    cache = generate.make_cache(made, 1, 32)
    generate.prefill(made, cache, IDS)
    step = step_of(lambda token, position: generate.decode_logits(made, token, position, cache))
    return torch.cat([step(torch.tensor([[3 + n]]), torch.tensor([8 + n])).clone()[0] for n in range(2)])


@pytest.mark.parametrize("name", ["bf16-torch", "a16w8-torchao", "a16w4_nf4_dq-bitsandbytes"])
def test_one_compile_serves_every_layer(name):
    fmt = FORMATS[name]
    made = model(num_hidden_layers=3)
    layers = made.model.layers
    for layer in layers:
        backends.get(fmt.backend).quantize(layer, fmt, torch.bfloat16)
    with torch.inference_mode(), process_state.preserved_state():
        want = logits_after_prefill(made, lambda step: step)
        assert process_state.compiled_graphs() == 0
        got = logits_after_prefill(made, lambda step: compilers.compile_call(step, "regional", CPU, {}, layers=layers))
        assert process_state.compiled_graphs() == 1
        assert process_state.counters() == (0, 0)
    assert ((got - want).float().norm() / want.float().norm()).item() < 0.02
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    assert not any("forward" in vars(layer) for layer in layers)


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
    def record(graph):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return made


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
