"""The native prefill, as far as it can be checked without its GPU: its launches, products, memory and graphs."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import noted
import pytest
import torch
from test_runner import step_of, streamed

from lowbit.errors import LowbitError
from lowbit.kernels.prefill import NativePrefill
from lowbit.kernels.recorded import RecordedRuns
from lowbit.kernels.stream import unpack_stream
from lowbit.kernels.weights import dequantize

LAYER = ["norm", "unpack qkv", "gemm qkv", "rope", "attention", "unpack o", "gemm o", "norm", "unpack gate_up",
         "gemm gate_up", "silu", "unpack down", "gemm down"]  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    return noted.launches(monkeypatch)


@pytest.fixture
def graphs(monkeypatch):
    return noted.graphs(monkeypatch)


def ready(name="int4_g128", **changes):
    """(model, its step, a prefill of it)."""
    made, dtype = streamed(name, **changes)
    step, decoder = step_of(made, dtype)
    return made, step, NativePrefill(step, made, decoder.cache)


def prompt(tokens):
    return torch.arange(tokens).unsqueeze(0) % 512


def names(plan):
    return [f"{work.kind} {work.of}".strip() for work in plan]


def kinds(launched):
    return Counter(kernel.split("_kernel")[0] for kernel, *_ in launched)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_layer_is_one_unpacking_and_one_product_per_fused_matrix(launched, layers):
    _, _, run = ready_of(layers)
    run(prompt(20))
    last = ["norm", "unpack qkv", "gemm qkv", "rope", "attention the last token", "last the last token"]
    assert names(run.plan(20)) == LAYER * (layers - 1) + last
    whole = layers - 1
    assert kinds(launched) == {
        "norm": 2 * whole + 1,
        "unpack": 4 * whole + 1,
        "rope": whole + 1,
        **({"silu": whole} if whole else {}),
        "product": 4,  # of the last position: o, gate_up, down and the head, from the packed weights
    }


def ready_of(layers):
    """``ready`` for another depth: ``streamed`` counts the linears of two layers."""
    made, dtype = streamed()
    blocks = list(made.model.layers)
    extra = [blocks[1]] if layers == 3 else []
    for place, block in enumerate(extra):
        block.self_attn.layer_idx = 2 + place
    made.model.layers = torch.nn.ModuleList((blocks + extra)[:layers])
    made.config.num_hidden_layers = layers
    step, decoder = step_of(made, dtype)
    return made, step, NativePrefill(step, made, decoder.cache)


def test_what_is_unpacked_is_what_is_multiplied_and_one_memory_serves_all_layers(launched, monkeypatch):
    """The products see q, k and v below each other, gate and up woven by 8 rows; no layer allocates of its own."""
    made, _, run = ready()
    products = []
    monkeypatch.setattr(torch, "mm", lambda x, weight, out: products.append((x, weight, out)))
    run(prompt(20))
    unpacked = [argument for kernel, _, _, argument, *_ in launched if kernel.startswith("unpack")]
    assert [one.out for one in unpacked] == [weight.data_ptr() for _, weight, _ in products]
    assert len({one.out for one in unpacked}) == 1
    layer = made.model.layers[0]
    streams = [layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    for one, (x, weight, out), linear in zip(unpacked[:4], products[:4], streams, strict=True):
        stream = linear.part.stream
        assert (one.weights, one.row0, one.half) == (stream.data.data_ptr(), 0, 0)
        assert (one.rows, one.k) == (stream.rows, stream.k)
        assert weight.shape == (stream.k, stream.rows)
        assert (x.shape, out.shape) == ((20, stream.k), (20, stream.rows))
    gate_up = dequantize(unpack_stream(layer.mlp.gate_proj.part.stream))
    assert torch.equal(gate_up[8:16], dequantize(layer.mlp.up_proj.packed)[:8])
    assert run._scratch.numel() == 2 * 768 * 256


@pytest.mark.parametrize("tokens", [1, 160])
def test_a_prompt_up_to_the_caches_length_is_taken_and_its_last_position_goes_on(launched, tokens):
    _, step, run = ready()
    run(prompt(tokens))
    assert int(step.position) == tokens - 1  # the head, recorded only, would advance it
    assert torch.equal(step.residual, run.residual[tokens - 1])
    assert [one[1] for one in launched if one[0] == "norm_kernel"] == [(tokens, 1)] * 3


@pytest.mark.parametrize("ids", [prompt(161), prompt(0), torch.zeros(2, 4, dtype=torch.int64)])
def test_other_prompts_are_refused(launched, ids):
    _, _, run = ready()
    with pytest.raises(LowbitError, match=rf"one prompt of 1 to 160 tokens .* got \[{ids.shape[0]}, {ids.shape[1]}\]"):
        run(ids)
    assert not launched


def test_a_second_model_has_memory_of_its_own(launched):
    first, second = ready(), ready("int8", intermediate_size=512)
    first[2](prompt(8))
    count = len(launched)
    second[2](prompt(8))
    own = {one[3].out for one in launched[:count] if one[0].startswith("unpack")}
    other = {one[3].out for one in launched[count:] if one[0].startswith("unpack")}
    assert len(own) == len(other) == 1
    assert own != other
    silu = next(one[3] for one in launched[count:] if one[0] == "silu_kernel")
    assert silu.pieces == 8 * 512 // 8


def test_a_longer_prompt_makes_room_and_what_was_recorded_goes(launched, graphs):
    _, _, run = ready()
    for _ in range(2):
        run(prompt(8))
    assert (run.room, run.recorded) == (256, [8])
    run._make_room(300)
    assert (run.room, run.recorded) == (512, [])
    assert run.both.shape == (512, 1536)


# -- graphs, which replay nothing here ---------------------------------------------------------------------------------


def test_a_length_runs_then_is_recorded_then_replayed(graphs):
    ran = []
    runs = RecordedRuns(ran.append)
    for number in (5, 5, 7, 5, 7):
        runs(number)
    assert ran == [5, 5, 7, 7]  # each once by itself, once into its graph
    assert graphs == [("record", "pool 0"), ("replay", 0), ("replay", 0), ("record", "pool 0"), ("replay", 1)]
    assert runs.recorded == [5, 7]
    runs.forget()
    runs(5)
    assert ran[4:] == [5]
    assert runs.recorded == []
    runs(5)
    assert graphs[5:] == [("record", "pool 1"), ("replay", 2)]  # torch refuses a pool whose graphs are all gone


def test_the_graphs_used_last_are_kept(graphs):
    runs = RecordedRuns(lambda number: None, most=2)
    for number in (1, 1, 2, 2, 1, 3):
        runs(number)
    assert runs.recorded == [1]  # 2 had to go, 3 has run once
    runs(3)
    assert runs.recorded == [1, 3]
    runs(2)
    assert runs.recorded == [3]


def test_dropped_it_ends_at_once_with_its_graphs(launched, graphs):
    """And not when Python collects garbage, which may be inside the recording of another graph."""
    _, _, run = ready()
    for _ in range(2):
        run(prompt(8))
    held = [weakref.ref(one) for one in (run, run.step, run._runs)]
    gc.disable()
    try:
        del run
        assert [one() for one in held] == [None] * 3
    finally:
        gc.enable()


def test_two_lengths_are_recorded_with_the_same_launches_as_they_run(launched, graphs):
    """What a graph holds is what a run without it does: the same kernels with the same arguments, in order."""
    _, _, run = ready()

    def told():
        found = [(one[0], one[1], bytes(one[3])) for one in launched]
        launched.clear()
        return found

    for tokens in (20, 12):
        run(prompt(tokens))
        alone = told()
        run(prompt(tokens))
        assert told() == alone
    assert run.recorded == [20, 12]
    run(prompt(20))
    assert not launched
    assert graphs[-1] == ("replay", 0)
    run.forget()
    assert run.recorded == []
