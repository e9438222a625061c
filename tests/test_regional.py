from __future__ import annotations

import math
import re
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, model
from torch import nn

from lowbit import backends, compilers, faults, generate, process_state, regional
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS

HQQ = pytest.param("a16w4_g64-hqq", marks=pytest.mark.skipif(find_spec("hqq") is None, reason="needs hqq"))

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
        *("a16w4_g128-torchao", "a16w4_intx_g32-torchao", "a8w4_intx_g32-torchao", HQQ),
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


# -- a quantized head --------------------------------------------------------------------------------------------------

INT8 = FORMATS["a16w8-torchao"]
HEADS = [
    *("a16w8-torchao", "a16w4_g128-torchao", "a16w4_intx_g32-torchao", "a8w8-torchao", "a16w8_fp8-torchao"),
    *(HQQ, "a16w4_nf4_dq-bitsandbytes", "a8w8_llmint8_t0-bitsandbytes", "a16w6_e3m2-reference"),
    *("a16w8-tables", "a16w4_g64-tables", "a16w3_g128-lowbit"),
]


def with_head(fmt, dtype=torch.bfloat16, **changes):
    """A tiny Llama whose lm_head alone is quantized, and its embedding where the row is that of both."""
    made = model(dtype, **changes)
    names = tuple(name for name in fmt.targets if name in ("embed_tokens", "lm_head")) or ("lm_head",)
    for name in names:
        owner = made if name == "lm_head" else made.model
        backends.get(fmt.backend).quantize(owner, replace(fmt, targets=(name,)), dtype)
    return made


def by_region(made, fmt):
    return lambda step: compilers.compile_call(step, "regional", CPU, fmt.inductor, made.model.layers, made.lm_head)


def distance(got, want):
    return ((got - want).float().norm() / want.float().norm()).item()


@pytest.fixture
def traced(monkeypatch):
    """Without Inductor's half of a compile: whether a head can be traced, and how often, is Dynamo's."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda fn, **how: compiled(fn, **{**how, "backend": "aot_eager", "options": None})
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_quantized_head_is_a_region_of_its_own(tied):
    made = with_head(INT8, tie_word_embeddings=tied)
    before = vars(made.lm_head).copy()
    with torch.inference_mode(), process_state.preserved_state():
        want = logits_after_prefill(made, lambda step: step)
        got = logits_after_prefill(made, by_region(made, INT8))
        assert process_state.compiled_graphs() == 2
        assert process_state.counters() == (0, 0)
    assert 0 < distance(got, want) < 2**-7
    assert vars(made.lm_head) == before
    assert made.model.embed_tokens.weight.dtype == torch.bfloat16


def test_the_compiled_head_multiplies_with_its_codes():
    """On a CPU Inductor takes a product of int8 weights as they are. No buffer of it is as large as the weight."""
    from torch._inductor.utils import run_and_get_code

    made = with_head(INT8)
    with torch.inference_mode(), process_state.preserved_state():
        step = by_region(made, INT8)(lambda x: made.lm_head(x))
        _, (code,) = run_and_get_code(step, torch.ones(1, 1, 256, dtype=torch.bfloat16))
    assert "_weight_int8pack_mm" in code
    sizes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    assert sizes
    assert all(math.prod(int(n) for n in size.split(",") if n.strip()) <= 512 for size in sizes)


def test_a_plain_head_stays_as_it_is(traced):
    made, seen = model(), []
    made.lm_head.register_forward_pre_hook(lambda head, args: seen.append("forward" in vars(head)))
    with torch.inference_mode(), process_state.preserved_state():
        want = logits_after_prefill(made, lambda step: step)
        got = logits_after_prefill(made, by_region(made, FORMATS["bf16-torch"]))
        assert process_state.compiled_graphs() == 1
    assert seen
    assert not any(seen)
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # hqq's, by Dynamo
@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_each_library_is_traced_once_whole(name, traced):
    fmt = FORMATS[name]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[fmt.dtypes[0]]
    made = with_head(fmt, dtype, tie_word_embeddings=fmt.backend == "tables")
    with torch.inference_mode(), process_state.preserved_state():
        want = logits_after_prefill(made, lambda step: step)
        got = logits_after_prefill(made, by_region(made, fmt))
        assert process_state.compiled_graphs() == 2
        assert process_state.counters() == (0, 0)
    assert distance(got, want) < 2**-8
    assert "forward" not in vars(made.lm_head)


class OwnForward(nn.Module):
    """As gemlite's linear: ``forward`` is an attribute of the instance, and the class has none."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.forward = self.forward_auto

    def forward_auto(self, x):
        return self.linear(x)


@pytest.mark.parametrize("failure", [None, "no kernel image"])
def test_a_head_is_given_back_with_the_forward_that_it_had(traced, failure):
    for own in (False, True):
        made = with_head(INT8)
        if own:
            made.lm_head = OwnForward(made.lm_head)
        before, x = vars(made.lm_head).copy(), torch.ones(1, 1, 256, dtype=torch.bfloat16)

        def step(x, head=made.lm_head, before=before):
            assert vars(head)["forward"] != before.get("forward")
            if failure:
                raise RuntimeError(failure)
            return head(x)

        with torch.inference_mode(), process_state.preserved_state():
            call = by_region(made, INT8)(step)
            if failure:
                with pytest.raises(RuntimeError, match=failure):
                    call(x)
            else:
                assert distance(call(x), made.lm_head(x)) < 2**-8
                assert process_state.compiled_graphs() == 1
        assert vars(made.lm_head) == before
        made.lm_head(x)


def test_two_models_one_after_the_other_have_heads_of_their_own():
    with torch.inference_mode(), process_state.preserved_state():
        for seed in range(2):
            made = with_head(INT8)
            noise = torch.randn(512, 256, generator=torch.Generator().manual_seed(seed))
            made.lm_head = nn.Linear(256, 512, bias=False, dtype=torch.bfloat16)
            made.lm_head.weight = nn.Parameter(noise.bfloat16(), requires_grad=False)
            backends.get("torchao").quantize(made, replace(INT8, targets=("lm_head",)), torch.bfloat16)
            want = logits_after_prefill(made, lambda step: step)
            assert distance(logits_after_prefill(made, by_region(made, INT8)), want) < 2**-7
        assert process_state.counters().graph_breaks == 0


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_prompts_of_a_decoder_share_the_compiled_head(kind, traced):
    made = with_head(INT8)
    lengths = (8, 5, 7) if kind == "decode" else (8, 8, 8)  # a compiled prefill is of one length
    prompts = [(IDS + 100 * index)[:, :length] for index, length in enumerate(lengths)]
    want = [generate.Decoder(made, 1, 32).generate(ids, 4) for ids in prompts]
    with process_state.preserved_state():
        decoder = generate.Decoder(made, 1, 32)
        (decoder.compile if kind == "decode" else decoder.compile_prefill)(by_region(made, INT8))
        got = [decoder.generate(ids, 4) for ids in prompts]
        assert process_state.compiled_graphs() == 2
        assert process_state.counters() == (0, 0)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


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
