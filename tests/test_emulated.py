"""The CUDA kernels' own source, run on the CPU: every format's decode step against the same weights in fp32."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from emulated import emulate_runner, unmet
from streaming import build
from tiny import model
from torch import nn

from lowbit import generate, kvcache
from lowbit.kernels import geometry, prefill, product_launch, runner, stream_modules, weights
from lowbit.kernels.modules import NativeEmbedding, NativeLinear
from lowbit.kernels.quantizer import quantize

pytestmark = pytest.mark.skipif(unmet() is not None, reason=str(unmet()))
FORMATS = ["bf16", "int8", "fp8_e4m3", "int4_g128", "int2_g128", "ternary"]
"""A step, a prompt: with whom one goes, all others go whose products and way back test_emulated_products proves."""
LENGTH = 96


@pytest.fixture
def emulate(monkeypatch, kernels_folder):
    """The runner's kernels, by the emulator."""
    emulate_runner(monkeypatch, kernels_folder)


@torch.no_grad()
def held_against(exact, decoder, step, count, bound):
    tokens = torch.arange(count) * 31 % 512
    want = exact(tokens.unsqueeze(0), use_cache=False).logits[0]
    decoder.position.zero_()
    for place in range(count):
        decoder.token.fill_(int(tokens[place]))
        step.launch()
        error = float((step.logits - want[place]).norm() / want[place].norm())
        assert error < bound, (place, error)
        assert int(decoder.token) == int(step.logits.argmax()) == int(step.history[place + 1])
        assert int(decoder.position) == place + 1


@pytest.mark.parametrize(
    ("length", "places"),
    [
        (300, (*range(14, 18), *range(30, 34), *range(126, 130), *range(254, 260), 280)),
        (1200, (5, 127, 128, 1023, 1024, 1030, 1150)),  # more chunks than warps: a ring of them
    ],
)
@torch.no_grad()
def test_attention_spans_chunks_warps_and_blocks(emulate, length, places):
    """From the first position of a chunk to the last, of a block to the next, and around in the warps of a block."""
    long = {"num_hidden_layers": 1, "max_position_embeddings": 2048}
    _, exact, decoder, step = build("int8", length=length, **long)
    tokens = torch.arange(places[-1] + 1) * 31 % 512
    want = exact(tokens.unsqueeze(0), use_cache=False).logits[0]
    decoder.prefill(tokens.unsqueeze(0))  # once: what lies behind a position must have no weight
    for place in places:
        decoder.position.fill_(place)
        decoder.token.fill_(int(tokens[place]))
        step.launch()
        error = float((step.logits - want[place]).norm() / want[place].norm())
        assert error < 5e-3, (place, error)


@pytest.mark.parametrize(("hidden", "heads", "kv_heads"), [(256, 8, 1), (768, 6, 2), (256, 2, 2)])
def test_any_group_of_up_to_8_query_heads(emulate, hidden, heads, kv_heads):
    shape = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    _, exact, decoder, step = build("int8", LENGTH, head_dim=128, num_hidden_layers=1, **shape)
    held_against(exact, decoder, step, 3, 2e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_a_step_gives_the_logits_of_the_same_weights_at_every_position(emulate, name):
    _, exact, decoder, step = build(name, LENGTH)
    held_against(exact, decoder, step, 5, 2e-2 if name == "bf16" else 2e-3)


@pytest.mark.parametrize("name", ["int8", "ternary"])  # a scale per row: of gate and of up, of every batch
def test_a_block_whose_tiles_come_in_several_batches_scales_each_by_its_own_rows(emulate, monkeypatch, name):
    """As gate_up of Llama-3.1-70B in 128 blocks: here 104 row tiles of gate_up and 16 of the head for each of 4."""
    for module in (geometry, product_launch):
        monkeypatch.setattr(module, "BLOCKS", 4)
    wide = {"hidden_size": 512, "intermediate_size": 3328, "vocab_size": 1024, "num_hidden_layers": 1}
    _, exact, decoder, step = build(name, LENGTH, **wide)
    products = [one for one in step.plan if one.kernel in runner.PRODUCTS.values()]
    several = {one.kernel for one in products if one.grid[0] * one.argument.batch < one.argument.tiles}
    assert several == {runner.PRODUCTS["gate_up"], runner.PRODUCTS["head"]}
    held_against(exact, decoder, step, 2, 2e-3)


@pytest.mark.parametrize(("name", "kv"), [("int8", "int8"), ("int8", "fp8"), ("bf16", "fp8")])
@torch.no_grad()
def test_a_step_goes_on_in_the_cache_of_codes_that_the_prompt_has_filled(emulate, name, kv):
    """Against fp32 modules over the suite's own cache of the same format: the codes are theirs, but for roundings."""
    _, exact, decoder, step = build(name, LENGTH, kv=kv)
    other = generate.Decoder(exact, 1, LENGTH, torch.float32, kv=kv)
    ids = torch.arange(24).unsqueeze(0) * 31 % 512
    decoder.prefill(ids[:, :20])
    other.prefill(ids[:, :20])
    for place in range(20, 24):
        for one in (decoder, other):
            one.token.fill_(int(ids[0, place]))
        want = generate.decoder.decode_logits(exact, other.token, other.position, other.cache).flatten()
        step.launch()
        other.position.add_(1)
        assert float((step.logits - want).norm() / want.norm()) < (2e-2 if name == "bf16" else 1e-2)
    for mine, theirs in zip(decoder.cache.layers, other.cache.layers, strict=True):
        for side in ("key", "value"):
            ours, wanted = (
                kvcache.decode(kv, (getattr(layer, f"{side}s"), getattr(layer, f"{side}_scale")), torch.float32)
                for layer in (mine, theirs)
            )
            # a rounding of activations now and then moves a code, by 1/16 in e4m3
            assert float((ours - wanted).norm() / wanted.norm()) < (5e-2 if name == "bf16" else 2e-2)


@pytest.mark.parametrize("name", [*FORMATS, "nvfp4"])  # whose matrices have a scale each, in one stream too
def test_streams_are_dequantized_exactly(emulate, name):
    streamed, exact, _, _ = build(name, LENGTH)
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"):
        want = exact.get_submodule(path).weight
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(streamed.get_submodule(path).dequantize(dtype), want.to(dtype)), path


def noted(asked, dequantize, dtype, *rows):
    asked.append(rows)
    return dequantize(dtype, *rows)


@pytest.mark.parametrize("name", ["int8", "int4_g128", "nvfp4", "bf16"])
@torch.no_grad()
def test_a_large_matrix_is_dequantized_and_multiplied_in_pieces(emulate, name, monkeypatch):
    """A head of 525 million weights takes 1 GiB in 16 bits: here 2 tiles at a time, of parts of streams too."""
    streamed, _, _, _ = build(name, LENGTH)
    dtype = streamed.model.embed_tokens.weight.dtype
    for path in ("lm_head", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"):
        linear = streamed.get_submodule(path)
        x = torch.randn(2, 3, linear.k, dtype=dtype)
        whole, weight = linear(x), linear.dequantize(dtype)
        asked, get = [], linear.dequantize
        with monkeypatch.context() as patch:
            patch.setattr(weights, "PIECE", 40 * linear.k)
            patch.setattr(linear, "dequantize", partial(noted, asked, get))
            found = linear(x)
        assert asked == [(row, min(row + 32, linear.n)) for row in range(0, linear.n, 32)]
        assert torch.equal(torch.cat([linear.dequantize(dtype, *rows) for rows in asked]), weight)
        assert found.shape == whole.shape
        torch.testing.assert_close(found, whole, rtol=2**-7 if dtype is torch.bfloat16 else 2**-10, atol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_a_prompt_gives_the_logits_and_the_cache_of_the_same_weights(emulate, name):
    """The step that follows finds the prompt in the cache."""
    streamed, exact, decoder, step = build(name, LENGTH)
    tokens = torch.arange(24) * 31 % 512
    want = exact(tokens.unsqueeze(0), use_cache=False).logits[0]
    bound = 2e-2 if name == "bf16" else 2e-3
    for prompt in (1, 17):
        run = prefill.NativePrefill(step, streamed, decoder.cache)
        for layer in decoder.cache.layers:
            layer.keys.fill_(torch.nan), layer.values.fill_(torch.nan)
        run(tokens[:prompt].unsqueeze(0))
        for place in range(prompt - 1, prompt + 1):
            error = float((step.logits - want[place]).norm() / want[place].norm())
            assert error < bound, (prompt, place, error)
            assert int(decoder.position) == place + 1
            assert int(decoder.token) == int(step.logits.argmax()) == int(step.history[place + 1])
            decoder.token.fill_(int(tokens[place + 1]))
            step.launch()


@pytest.mark.parametrize(
    ("linears", "head", "table"),
    [("int4_g128", "int8", "int4_g128"), ("ternary", "int4_sym_g32", "int3_g128"), ("nvfp4", "int3_g128", "nvfp4")],
)
@torch.no_grad()
def test_formats_mix_and_the_embedding_may_be_packed(emulate, linears, head, table):
    streamed, exact = model(torch.float16), model(torch.float32)
    for path, linear in list(streamed.named_modules()):
        if isinstance(linear, nn.Linear):
            name = head if path == "lm_head" else "int8" if "down" in path else linears
            packed = quantize(linear.weight.detach(), name)
            exact.get_submodule(path).weight.data = weights.dequantize(packed)
            streamed.set_submodule(path, NativeLinear(packed))
    streamed.model.embed_tokens = NativeEmbedding.from_embedding(streamed.model.embed_tokens, table)
    exact.model.embed_tokens.weight.data = weights.dequantize(streamed.model.embed_tokens.packed)
    stream_modules.attach(streamed, lambda module: module.packed if isinstance(module, NativeLinear) else None)
    decoder = generate.Decoder(streamed, 1, LENGTH, torch.float16)
    step = runner.NativeStep(streamed, decoder.cache, decoder.token, decoder.position)
    held_against(exact, decoder, step, 3, 2e-3)


@torch.no_grad()
def test_a_token_that_is_drawn_is_the_one_that_goes_on(emulate):
    streamed, _, decoder, _ = build("int8", LENGTH)
    step = runner.NativeStep(
        streamed, decoder.cache, decoder.token, decoder.position, pick=lambda logits: logits.argmin(-1)
    )
    step.launch()
    assert int(decoder.token) == int(step.logits.argmin()) == int(step.history[1])
    before = step.logits.clone()
    step.launch()
    assert not torch.equal(step.logits, before)
    assert int(decoder.position) == 2
