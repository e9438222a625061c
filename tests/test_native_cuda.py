"""The decode kernels on the GPU they are written for. Skipped elsewhere: no other machine can run them."""

from __future__ import annotations

import gc

import pytest
import torch
from streaming import build
from torch import nn

from lowbit import native_step
from lowbit.generate.decoder import decode_logits
from lowbit.generate.proof import NATIVE_BOUNDS
from lowbit.kernels import geometry, nvrtc, weights
from lowbit.kernels.keeping import kept_together
from lowbit.kernels.prefill import NativePrefill
from lowbit.kernels.stream import LAYOUTS

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
pytestmark = pytest.mark.skipif(
    CAPABILITY != geometry.NEEDED_SM or nvrtc.available() is not None,
    reason=f"needs a GPU of compute capability 9.0 and NVRTC, found {CAPABILITY}",
)
LENGTH = 400


@pytest.fixture(params=sorted(LAYOUTS))
def made(request):
    return build(request.param, LENGTH, "cuda")


def test_streams_are_dequantized_exactly(made):
    plain, exact, _, _ = made
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "lm_head"):
        want = exact.get_submodule(path).weight
        dtype = plain.model.embed_tokens.weight.dtype
        assert torch.equal(plain.get_submodule(path).dequantize(dtype), want.to(dtype)), path


@torch.no_grad()
def test_a_large_matrix_is_dequantized_and_multiplied_in_pieces(made, monkeypatch):
    plain, _, _, _ = made
    dtype = plain.model.embed_tokens.weight.dtype
    bound = 2e-2 if dtype is torch.bfloat16 else 2e-3
    for path in ("lm_head", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"):
        linear = plain.get_submodule(path)
        x = torch.randn(3, 40, linear.k, device="cuda", dtype=dtype)
        whole, weight = linear(x), linear.dequantize(dtype)
        rows = [(row, min(row + 32, linear.n)) for row in range(0, linear.n, 32)]
        assert torch.equal(torch.cat([linear.dequantize(dtype, *piece) for piece in rows]), weight), path
        with monkeypatch.context() as patch:
            patch.setattr(weights, "PIECE", 40 * linear.k)
            found = linear(x)
        assert float((found - whole).norm() / whole.norm()) < bound, path


@torch.no_grad()
def test_logits_are_those_of_the_same_weights_in_fp32_at_every_position(made):
    _, exact, decoder, step = made
    count = LENGTH - 16
    tokens = torch.arange(count, device="cuda") * 31 % 512
    want = exact(tokens.unsqueeze(0), use_cache=False).logits[0]
    decoder.position.zero_()
    bound = 2e-2 if step.shape.dtype is torch.bfloat16 else 5e-3
    for place in range(count):
        decoder.token.fill_(int(tokens[place]))
        step()
        error = (step.logits - want[place]).norm() / want[place].norm()
        assert error < bound, (place, float(error))
        assert int(decoder.token) == int(step.logits.argmax())
        assert int(decoder.position) == place + 1


@pytest.mark.parametrize("kv", ["", "int8", "fp8"])
@pytest.mark.parametrize("name", ["int4_g128", "bf16"])
@torch.no_grad()
def test_long_caches_of_every_kind_give_the_modules_logits_and_the_same_bits(name, kv):
    """From short caches, where a warp has one chunk, to long ones, whose warps go around several times."""
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    for length, places in ((1008, (1, 16, 700, 1000)), (9000, (40, 1030, 4100, 8900))):
        streamed, _, decoder, step = build(name, length, "cuda", kv=kv, max_position_embeddings=16384)
        ids = torch.arange(length, device="cuda").unsqueeze(0) * 31 % 512
        for place in places:
            found = []
            for _ in range(20):
                decoder.prefill(ids[:, :place])
                decoder.token.fill_(int(ids[0, place]))
                step.launch()
                found.append(step.logits.clone())
            assert all(torch.equal(logits, found[0]) for logits in found), (length, place)
            decoder.prefill(ids[:, :place])
            decoder.token.fill_(int(ids[0, place]))
            want = decode_logits(streamed, decoder.token, decoder.position, decoder.cache).flatten().float()
            error = float((found[0] - want).norm() / want.norm())
            assert error < NATIVE_BOUNDS[dtype] / 2, (length, place, error)


@torch.no_grad()
def test_the_same_prompt_gives_the_same_bits_200_times(made):
    """128 tokens each: a kernel that let the next one start too early gave other bits in 1 of 10 runs."""
    _, _, decoder, step = made
    ids = torch.arange(24, device="cuda").unsqueeze(0)
    first = None
    for run in range(200):
        decoder.prefill(ids)
        logits = []
        for _ in range(128):
            step()
            logits.append(step.logits.clone())
        found = step.history.clone(), torch.stack(logits)
        first = first or found
        assert all(torch.equal(now, then) for now, then in zip(found, first, strict=True)), run


@torch.no_grad()
def test_10000_tokens_take_no_memory(made):
    _, _, decoder, step = made
    decoder.prefill(torch.arange(24, device="cuda").unsqueeze(0))
    step()
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free
    for _ in range(10_000 // 250):
        step.position.fill_(24)
        for _ in range(250):
            step()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]) == held


@torch.no_grad()
def test_a_few_steps_launched_one_by_one(made):
    """For compute-sanitizer (docs/kernels.md): every kernel of a step, from the cache's first place to its last."""
    _, _, decoder, step = made
    for place in (0, 15, 16, LENGTH - 1):
        decoder.position.fill_(place)
        decoder.token.fill_(place)
        step.launch()
        assert step.logits.isfinite().all()
        assert int(decoder.position) == place + 1


@torch.no_grad()
def test_a_prompt_gives_the_same_bits_with_and_without_its_graph(made):
    plain, exact, decoder, step = made
    run = NativePrefill(step, plain, decoder.cache)
    bound = 2e-2 if step.shape.dtype is torch.bfloat16 else 5e-3
    for count in (24, 130, 1):
        ids = torch.arange(count, device="cuda").unsqueeze(0) * 31 % 512
        want = exact(ids, use_cache=False).logits[0, -1]
        found = []
        for _ in range(30):
            run(ids)
            keys = torch.stack([layer.keys[:, :, :count] for layer in decoder.cache.layers])
            found.append((step.logits.clone(), keys))
        assert (found[0][0] - want).norm() / want.norm() < bound
        assert int(decoder.token) == int(step.logits.argmax())
        assert all(torch.equal(logits, found[0][0]) and torch.equal(keys, found[0][1]) for logits, keys in found)
    assert run.recorded == [24, 130, 1]


# -- 2 to 8 sequences --------------------------------------------------------------------------------------------------


EIGHT = ("bf16", "int8", "int4_g128", "int4_g32", "int2_g128", "ternary", "fp8_e4m3", "mxfp4")


@pytest.fixture(params=[*((name, 8) for name in EIGHT), ("int4_g128", 2), ("int4_g128", 5)], ids=str)
def several(request):
    name, count = request.param
    return build(name, LENGTH, "cuda", batch=count)


@torch.no_grad()
def test_every_sequence_has_the_logits_of_the_same_weights_in_fp32(several):
    _, exact, decoder, step = several
    sequences, count = step.logits.shape[0], LENGTH - 16
    tokens = (torch.arange(sequences, device="cuda").unsqueeze(1) * 97 + torch.arange(count, device="cuda") * 31) % 512
    want = exact(tokens, use_cache=False).logits
    decoder.position.zero_()
    bound = 2e-2 if step.shape.dtype is torch.bfloat16 else 5e-3
    for place in range(count):
        decoder.token.copy_(tokens[:, place : place + 1])
        step()
        error = (step.logits - want[:, place]).norm(dim=-1) / want[:, place].norm(dim=-1)
        assert float(error.max()) < bound, (place, error)
        assert torch.equal(decoder.token, step.logits.argmax(-1, keepdim=True))
        assert int(decoder.position) == place + 1


@torch.no_grad()
def test_the_same_prompts_give_the_same_bits_every_time(several):
    _, _, decoder, step = several
    ids = torch.arange(24, device="cuda") + 31 * torch.arange(step.logits.shape[0], device="cuda").unsqueeze(1)
    runs = []
    for _ in range(30):
        decoder.prefill(ids)
        for _ in range(200):
            step()
        runs.append((step.history.clone(), step.logits.clone()))
    assert all(torch.equal(history, runs[0][0]) and torch.equal(logits, runs[0][1]) for history, logits in runs)


@torch.no_grad()
def test_several_prompts_give_the_same_bits_with_and_without_their_graph(several):
    plain, exact, decoder, step = several
    run = NativePrefill(step, plain, decoder.cache)
    bound = 2e-2 if step.shape.dtype is torch.bfloat16 else 5e-3
    sequences = torch.arange(step.logits.shape[0], device="cuda").unsqueeze(1)
    for count in (24, 130, 1):
        ids = (sequences * 97 + torch.arange(count, device="cuda") * 31) % 512
        want = exact(ids, use_cache=False).logits[:, -1]
        found = []
        for _ in range(10):
            run(ids)
            keys = torch.stack([layer.keys[:, :, :count] for layer in decoder.cache.layers])
            found.append((step.logits.clone(), keys))
        error = (found[0][0] - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(error.max()) < bound, (count, error)
        assert all(torch.equal(logits, found[0][0]) and torch.equal(keys, found[0][1]) for logits, keys in found)


@pytest.mark.parametrize("kv", ["", "int8", "fp8"])
@torch.no_grad()
def test_several_sequences_over_long_caches_of_every_kind_give_the_modules_logits(kv):
    streamed, _, decoder, step = build("int4_g128", 3000, "cuda", kv=kv, batch=4, max_position_embeddings=4096)
    ids = (torch.arange(3000, device="cuda") * 31 + torch.arange(4, device="cuda").unsqueeze(1)) % 512
    for place in (1, 700, 2900):
        found = []
        for _ in range(20):
            decoder.prefill(ids[:, :place])
            decoder.token.copy_(ids[:, place : place + 1])
            step.launch()
            found.append(step.logits.clone())
        assert all(torch.equal(logits, found[0]) for logits in found), place
        decoder.prefill(ids[:, :place])
        decoder.token.copy_(ids[:, place : place + 1])
        want = decode_logits(streamed, decoder.token, decoder.position, decoder.cache)[:, 0].float()
        error = (found[0] - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(error.max()) < NATIVE_BOUNDS[torch.float16] / 2, (place, error)


@torch.no_grad()
def test_streams_hold_little_more_of_the_card_than_their_bytes():
    gc.collect()
    torch.cuda.empty_cache()
    before, kept = torch.cuda.memory_reserved(), []
    with kept_together(torch.device("cuda", torch.cuda.current_device())):
        for _ in range(12):
            linears = nn.ModuleDict({"o_proj": nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.float16)})
            native_step.attach(linears, "int4_g128")
            kept.append(linears)
    del linears
    gc.collect()
    torch.cuda.empty_cache()
    size = sum(one["o_proj"].part.stream.data.numel() for one in kept)
    assert torch.cuda.memory_reserved() - before < 1.2 * size + (32 << 20)
