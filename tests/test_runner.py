"""The native decode step, as far as it can be checked without its GPU: what it needs, what it launches with what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import config, model
from torch import nn

from lowbit import generate
from lowbit.errors import LowbitError
from lowbit.kernels import geometry, runner, stream, stream_modules
from lowbit.kernels.geometry import Geometry
from lowbit.kernels.modules import NativeEmbedding
from lowbit.kernels.quantizer import quantize
from lowbit.kernels.runner import NativeStep
from lowbit.kernels.stream import LAYOUTS

H200 = (9, 0)


# -- what it needs -----------------------------------------------------------------------------------------------------


def test_a_llama_in_a_streamed_format_on_an_h200_can_run():
    for name in LAYOUTS:
        assert geometry.unmet(config(), name, H200) is None


@pytest.mark.parametrize(
    ("changes", "name", "capability", "batch", "kind", "words"),
    [
        ({}, "int8", None, 1, "capability", "needs a CUDA device"),
        ({}, "int8", (8, 0), 1, "capability", "needs SM90 (bulk copies, dependent launch; compiled and measured"),
        ({}, "int8", (12, 0), 1, "capability", "this is SM120"),
        ({}, "int4_zp_g64", H200, 1, "capability", "no decode kernel streams int4_zp_g64; there are ones for bf16"),
        ({}, "int8", H200, 9, "shape", "decodes 1 to 8 sequences, this case has 9"),
        ({"intermediate_size": 640}, "int8", H200, 1, "shape", "multiple of 256"),
        ({"head_dim": 48, "num_attention_heads": 16}, "int8", H200, 1, "shape", "head_dim must be 32, 64 or 128"),
        ({"num_attention_heads": 16, "num_key_value_heads": 1}, "int8", H200, 1, "shape", "at most 8 query heads"),
        ({"attention_bias": True}, "int8", H200, 1, "shape", "no bias"),
    ],
)  # fmt: skip
def test_what_it_can_not_run_is_said_with_the_requirement(changes, name, capability, batch, kind, words):
    found, reason = geometry.unmet(config(**changes), name, capability, batch)
    assert found == kind
    assert words in reason


def test_o_and_down_have_one_batch_of_row_tiles_per_block_in_the_widest_model():
    widest = Geometry("int8", geometry.MOST_HIDDEN, 1024, 8, 8, 128, 1e-5)
    blocks, tiles = geometry.BLOCKS, widest.hidden // 16
    assert -(-tiles // blocks) == widest.shared(widest.inter, tiles)[1] < -(-(tiles + 1) // blocks)
    assert geometry.unmet(config(hidden_size=widest.hidden, head_dim=128), "int8", H200) is None
    wider = config(hidden_size=widest.hidden + 256, head_dim=128)
    kind, told = geometry.unmet(wider, "int8", H200)
    assert kind == "shape"
    assert told.startswith("hidden may be at most 28,672 (14 row tiles of o and down per block with one sequence), ")
    assert told.endswith("this model has 28,928")
    assert geometry.unmet(wider, "int8", H200, 2) is None  # several sequences add their slices' sums in the norm after


def test_caches_of_8_bits_can_run_and_others_are_told_from_them():
    for kv in ("", "int8", "fp8"):
        assert geometry.unmet(config(), "int4_g128", H200, kv=kv) is None
    told = "attention in the native step reads a KV cache of 16 bits, int8, fp8; this one is int4"
    assert geometry.unmet(config(), "int4_g128", H200, kv="int4") == ("capability", told)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "widths",
    [(4096, 14336, 32, 8, 128), (2048, 8192, 32, 8, 64), (3072, 8192, 24, 8, 128), (256, 768, 8, 2, 32)],
    ids=["8b", "1b", "3b", "small"],
)
def test_a_block_has_shared_memory_for_a_ring_that_deals_slots_evenly(name, widths):
    shape = Geometry(name, *widths, eps=1e-5)
    hidden, inter, heads, kv, dim = widths
    for k, rows in (
        (hidden, (heads + 2 * kv) * dim),
        (heads * dim, hidden),
        (hidden, 2 * inter),
        (inter, hidden),
        (hidden, 128256),
    ):
        tiles = rows // 16
        ring, batch, total = shape.shared(k, tiles)
        assert ring % shape.warps == 0  # a slot belongs to one warp
        assert shape.warps <= ring <= geometry.MAX_RING
        assert total <= geometry.RING_BYTES <= 227 * 1024
        per_block = -(-tiles // min(geometry.BLOCKS, tiles))
        assert batch == min(per_block, geometry.BATCH_TILES)
        assert shape.warps * 32 >= batch * 16  # one thread per row of an epilogue


# -- what it launches --------------------------------------------------------------------------------------------------


class Recorder:
    """In the place of a loaded cubin."""

    def __init__(self):
        self.launched = []

    def function(self, kernel):
        return kernel

    def launch(self, kernel, grid, threads, argument, *, shared_bytes=0, overlap=False, cluster=1):
        self.launched.append((kernel, grid, threads, argument, shared_bytes, overlap))
        assert cluster == (grid[1] if kernel.startswith("attention") else 1)


@pytest.fixture
def module(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(runner, "load", lambda shape, device, progress=None: found)
    return found


def streamed(name="int4_g128", head="", **changes):
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    made = model(dtype, **changes)

    def packed(linear):
        fmt = head if head and linear.out_features == made.config.vocab_size else name
        return quantize(linear.weight.detach(), fmt, search=False) if isinstance(linear, nn.Linear) else None

    assert stream_modules.attach(made, packed) == 2 * 7 + 1
    return made, dtype


def decoder_of(made, dtype, length=160):
    return generate.Decoder(made, 1, length, dtype)


def step_of(made, dtype, **changes):
    decoder = decoder_of(made, dtype)
    parts = {"model": made, "cache": decoder.cache, "token": decoder.token, "position": decoder.position} | changes
    return NativeStep(**parts), decoder


@pytest.mark.parametrize("name", ["int4_g128", "int8", "bf16", "ternary"])
def test_a_step_is_5_kernels_per_layer_in_order_with_the_models_own_memory(module, name):
    made, dtype = streamed(name)
    step, decoder = step_of(made, dtype)
    step.launch()
    kernels = [kernel for kernel, *_ in module.launched]
    layer = [
        runner.PRODUCTS["qkv"],
        "attention_kernel<1, 4>",
        runner.PRODUCTS["o"],
        runner.PRODUCTS["gate_up"],
        runner.PRODUCTS["down"],
    ]
    assert kernels == ["embed_kernel", *layer, *layer, runner.PRODUCTS["head"]]
    assert [overlap for *_, overlap in module.launched] == [False] + [True] * 11  # the first waits for the step before
    embed, qkv, attention, o, gate_up, down = (one[3] for one in module.launched[:6])
    body = made.model
    assert embed.table == body.embed_tokens.weight.data_ptr()
    assert qkv.weights == body.layers[0].self_attn.v_proj.part.stream.data.data_ptr()
    assert qkv.norm == body.layers[0].input_layernorm.weight.data_ptr()
    assert (qkv.tiles, qkv.rows) == ((8 + 4) * 32 // 16, 12 * 32)
    assert attention.keys == decoder.cache.layers[0].keys.data_ptr()
    assert attention.length == decoder.cache.layers[0].keys.shape[2]
    assert attention.position == decoder.position.data_ptr()
    assert gate_up.norm == body.layers[0].post_attention_layernorm.weight.data_ptr()
    assert gate_up.rows == 2 * 768
    assert o.out == down.out == embed.x == step.residual.data_ptr()
    head = module.launched[-1][3]
    assert head.norm == body.norm.weight.data_ptr()
    assert (head.token, head.rows) == (decoder.token.data_ptr(), 512)
    assert (qkv.token, qkv.history) == (None, None)  # only the head hands out tokens
    assert (qkv.row_scale is None) == (name in ("bf16", "int4_g128"))


@pytest.mark.parametrize(("length", "stages"), [(1024, 1), (1040, 3)])
def test_attention_over_a_short_cache_leaves_room_for_a_product(module, length, stages):
    made, dtype = streamed("int4_g128", max_position_embeddings=2048)
    decoder = decoder_of(made, dtype, length)
    step = NativeStep(made, decoder.cache, decoder.token, decoder.position)
    assert step.attention == f"KV cache in float16, {step.shape.attention(length)}"
    step.launch()
    kernel, grid, threads, _, shared_bytes, _ = module.launched[2]
    assert (kernel, grid, threads) == (f"attention_kernel<{stages}, 8>", (2, geometry.SPLITS), 256)
    assert shared_bytes == step.shape.attention(length).shared_bytes
    beside = module.launched[1][4] + shared_bytes + 2 * geometry.RESERVED_BYTES
    assert (step.shape.beside(step.shape.attention(length)) == geometry.RING_BYTES) == (length > 1024)
    assert length > 1024 or beside <= geometry.SHARED_BYTES


@pytest.mark.parametrize("name", LAYOUTS)
def test_8bs_attention_over_few_positions_has_half_the_warps_and_a_products_ring_stays_beside_it(name):
    shape = Geometry(name, 4096, 14336, 32, 8, 128, 1e-5)
    few, short = shape.attention(512), shape.attention(528)
    assert (few.kernel, short.kernel) == ("attention_kernel<1, 4>", "attention_kernel<1, 8>")
    assert set(shape.attentions) == {few.kernel, short.kernel, shape.attention(1040).kernel}
    if LAYOUTS[name].bits <= 8:  # 16-bit weights: the whole ring is what they have, and attention waits
        for tiles in (384, 256):  # qkv, o
            _, _, room = shape.shared(4096, tiles, shape.beside(few))
            assert room + few.shared_bytes + 2 * geometry.RESERVED_BYTES <= geometry.SHARED_BYTES
    several = Geometry(name, 4096, 14336, 32, 8, 128, 1e-5, batch=2)
    assert several.attention(512).warps == geometry.ATTENTION_WARPS


def test_products_leave_room_to_the_attention_that_is_launched(module, monkeypatch):
    made, dtype = streamed("int4_g128", head="int2_g128")
    rooms, shared = [], Geometry.shared

    def recorded(shape, k, tiles, room=geometry.RING_BYTES):
        rooms.append(room)
        return shared(shape, k, tiles, room)

    monkeypatch.setattr(Geometry, "shared", recorded)
    step, _ = step_of(made, dtype)
    step.launch()
    attention = step.shape.attention(step.length)
    assert attention.kernel in {kernel for kernel, *_ in module.launched}
    beside = [room for room in rooms if room != geometry.RING_BYTES]
    assert len(beside) == 2 * 2  # qkv and o of two layers
    assert {room + attention.shared_bytes + 2 * geometry.RESERVED_BYTES for room in beside} == {geometry.SHARED_BYTES}


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("queries", range(1, 9))
def test_a_block_of_attention_has_a_thread_per_output_that_it_finishes(queries, dim):
    found = []
    for batch in range(1, geometry.MOST_SEQUENCES + 1):
        shape = Geometry("int4_g128", 8 * queries * dim, 14336, 8 * queries, 8, dim, 1e-5, batch=batch)
        for length in (256, 1024, 9216):
            plan = shape.attention(length)
            assert queries * dim // plan.splits <= plan.warps * 32
            assert plan.splits > 1  # else st.async is undefined
        found.append(shape.splits)
    assert found == sorted(found, reverse=True)
    assert found[:2] == [8, 8]
    assert found[-1] == (4 if queries * dim > 512 else 2)


@pytest.mark.parametrize("kv", geometry.KV_CODES)
def test_8bs_attention_fits_a_multiprocessor_and_over_a_short_cache_beside_a_product(kv):
    shape = Geometry("int4_g128", 4096, 14336, 32, 8, 128, 1e-5, kv)
    long, short = shape.attention(8192), shape.attention(1024)
    assert long.shared_bytes <= 227 * 1024
    assert 2 * (long.shared_bytes + geometry.RESERVED_BYTES) > geometry.SHARED_BYTES  # it has one for itself
    room = shape.beside(short)
    assert room + short.shared_bytes + 2 * geometry.RESERVED_BYTES <= geometry.SHARED_BYTES
    assert shape.shared(4096, 384, room)[0] >= shape.warps


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_a_cache_of_codes_is_read_with_its_scales(module, kv):
    made, dtype = streamed("int8", max_position_embeddings=2048)
    for length, words in ((160, "8 blocks per KV head, 1 chunk"), (1040, "8 blocks per KV head, 4 chunks")):
        decoder = generate.Decoder(made, 1, length, dtype, kv=kv)
        step = NativeStep(made, decoder.cache, decoder.token, decoder.position)
        assert step.attention == f"KV cache in {kv}, {words} ahead"
        assert step.shape.macros()["KV"] == geometry.KV_CODES[kv]
        module.launched.clear()
        step.launch()
        attention, layer = module.launched[2][3], decoder.cache.layers[0]
        assert (attention.keys, attention.values) == (layer.keys.data_ptr(), layer.values.data_ptr())
        assert (attention.key_scale, attention.value_scale) == (
            layer.key_scale.data_ptr(),
            layer.value_scale.data_ptr(),
        )


def test_a_cache_that_attention_can_not_read_is_refused(module):
    made, dtype = streamed("int8")
    decoder = generate.Decoder(made, 1, 160, dtype, kv="int4")
    with pytest.raises(LowbitError, match="reads a KV cache of 16 bits, int8 or fp8, this is int4"):
        NativeStep(made, decoder.cache, decoder.token, decoder.position)
    decoder = generate.Decoder(made, 1, 160, torch.bfloat16, kv="int8")
    with pytest.raises(LowbitError, match=r"wants keys and values in torch.float16, got torch.bfloat16"):
        NativeStep(made, decoder.cache, decoder.token, decoder.position)
    decoder = generate.Decoder(made, 1, 160, dtype, kv="fp8")
    decoder.cache.layers[0].keys = decoder.cache.layers[0].keys[:, :, :150]
    with pytest.raises(LowbitError, match="is read 16 positions at a time, this one has 150"):
        NativeStep(made, decoder.cache, decoder.token, decoder.position)


def test_positions_have_the_models_own_rotation(module):
    made, dtype = streamed()
    step, _ = step_of(made, dtype)
    cos, sin = made.model.rotary_emb(torch.zeros(1), torch.arange(160).unsqueeze(0))
    assert torch.equal(step.rope[:, :, 0], cos[0, :, :16].float())
    assert torch.equal(step.rope[:, :, 1], sin[0, :, :16].float())


def test_what_a_step_can_not_run_is_refused_by_name(module):
    made, dtype = streamed()
    decoder = generate.Decoder(made, 2, 160, dtype)
    with pytest.raises(LowbitError, match="one sequence"):
        NativeStep(made, decoder.cache, decoder.token, decoder.position)
    decoder = generate.Decoder(made, 1, 160, torch.bfloat16)
    with pytest.raises(LowbitError, match=r"wants keys and values in torch.float16, got torch.bfloat16"):
        NativeStep(made, decoder.cache, decoder.token, decoder.position)
    plain, _ = streamed()
    plain.model.layers[1].mlp.down_proj = nn.Linear(768, 256, bias=False, dtype=dtype)
    with pytest.raises(LowbitError, match="needs streamed weights, but layer 1's down_proj is a Linear"):
        step_of(plain, dtype)
    mixed, _ = streamed()
    weight = mixed.model.layers[0].self_attn.o_proj.packed
    mixed.model.layers[0].self_attn.o_proj = alone(quantize(torch.randn(weight.n, weight.k).bfloat16(), "bf16"))
    with pytest.raises(LowbitError, match=r"activations in one dtype, torch.float16 .* but o is bf16"):
        step_of(mixed, dtype)
    mixed.model.embed_tokens = NativeEmbedding.from_embedding(mixed.model.embed_tokens.bfloat16(), "bf16")
    with pytest.raises(LowbitError, match=r"looks up no table packed as bf16: leave it in 16 bits"):
        step_of(mixed, dtype)


def alone(packed):
    return stream_modules.StreamLinear(stream_modules.StreamPart(stream.pack_stream(packed), packed.n))


def test_why_a_model_is_not_for_the_step_is_said():
    made, _ = streamed()
    assert runner.unstreamed(made) is None
    head = made.lm_head
    made.lm_head = nn.Linear(256, 512, bias=False)
    assert runner.unstreamed(made) == "lm_head is a Linear without a stream"
    made.lm_head = alone(quantize(torch.randn(512, 256).bfloat16(), "bf16"))
    assert "lm_head wants activations in torch.bfloat16, others in torch.float16" == runner.unstreamed(made)
    made.lm_head = head
    made.model.norm.to(torch.bfloat16)
    assert runner.unstreamed(made) == "its norms are in torch.bfloat16, its streams want torch.float16"


# -- the decoder that runs it ------------------------------------------------------------------------------------------


class FakeStep:
    """A native step that does what the eager one does, ``wrong`` by a factor."""

    wrong = 1.0

    def __init__(self, made, cache, token, position, progress=None, pick=None):
        self.pick = pick
        self.model, self.cache, self.token, self.position = made, cache, token, position
        self.attention = f"a fake's: {getattr(cache.layers[0], 'name', '16 bits')}"
        self.shape = Geometry.of(made.config, "int4_g128")
        self.history = torch.zeros(cache.layers[0].keys.shape[2] + 1, dtype=torch.int64)
        self.captured = False

    def launch(self):
        found = generate.decode_logits(self.model, self.token, self.position, self.cache).flatten().float()
        self.logits = found * self.wrong
        self.token.fill_(int(found.argmax()))
        self.position += 1
        self.history[int(self.position)] = self.token.item()

    def capture(self):
        self.captured = True

    __call__ = launch


class FakePrefill:
    """A native prefill that does what the eager one does, ``wrong`` by a factor, and counts its prompts."""

    wrong = 1.0

    def __init__(self, step, made, cache, progress=None):
        self.step, self.model, self.cache = step, made, cache
        self.prompts, self.forgotten = [], 0

    @staticmethod
    def takes(cache, dtype):
        return cache.layers[0].keys.dtype == dtype

    def __call__(self, ids):
        self.prompts.append(ids.shape[1])
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()
        found = generate.decoder.prefill_logits(self.model, self.cache, ids)
        self.step.logits = found.flatten().float() * self.wrong
        self.step.token.copy_((self.step.pick or generate.decoder.greedy)(found))
        self.step.position.fill_(ids.shape[1])

    def forget(self):
        self.forgotten += 1


def fake_kernels(monkeypatch, step=FakeStep):
    """Let decoders run natively here."""
    monkeypatch.setattr("lowbit.generate.decoder.NativeStep", step)
    monkeypatch.setattr("lowbit.generate.decoder.NativePrefill", FakePrefill)


def test_native_tokens_are_the_eager_ones_and_the_count_is_checked(monkeypatch):
    fake_kernels(monkeypatch)
    made = model(torch.float16)
    ids = torch.arange(8).unsqueeze(0)
    eager = decoder_of(made, torch.float16).generate(ids, 12)
    native = decoder_of(made, torch.float16)
    native.run_natively(ids, "a case")
    seen = []
    assert native.native_prefill.prompts == [8]  # the proof
    first = native.prefill(ids).clone()
    assert native.native_prefill.prompts == [8, 8]
    tokens = native.decode(12, on_step=lambda: seen.append(1))
    assert torch.equal(torch.cat([first.view(1, 1), tokens], 1), eager)
    assert len(seen) == 12
    native.check_length("a case")
    native.position -= 1  # a graph that did nothing
    with pytest.raises(LowbitError, match="a case: the KV cache should hold"):
        native.check_length("a case")


@pytest.mark.parametrize(("kind", "what"), [(FakeStep, "step"), (FakePrefill, "prefill")])
def test_native_kernels_that_compute_something_else_are_an_error(monkeypatch, kind, what):
    fake_kernels(monkeypatch)
    monkeypatch.setattr(kind, "wrong", 1.05)
    native = decoder_of(model(torch.float16), torch.float16)
    with pytest.raises(LowbitError, match=rf"a case: the native {what}'s logits .* differ by 5.00e-02"):
        native.run_natively(torch.arange(8).unsqueeze(0), "a case")
    assert native.native is None


def test_over_a_cache_of_codes_the_modules_prefill(monkeypatch):
    fake_kernels(monkeypatch)
    monkeypatch.setattr(FakePrefill, "takes", lambda cache, dtype: False)
    native = decoder_of(model(torch.float16), torch.float16)
    native.run_natively(torch.arange(8).unsqueeze(0), "a case")
    assert native.native is not None
    assert native.native_prefill is None
    assert int(native.prefill(torch.arange(8).unsqueeze(0))) >= 0


def test_a_prompt_longer_than_the_cache_is_refused_and_one_that_follows_a_longer_one_starts_anew(monkeypatch):
    fake_kernels(monkeypatch)
    native = decoder_of(model(torch.float16), torch.float16, length=32)
    native.run_natively(torch.arange(8).unsqueeze(0), "a case")
    with pytest.raises(LowbitError, match="the KV cache holds 32 tokens"):
        native.prefill(torch.arange(33).unsqueeze(0))
    for count in (20, 5):
        native.prefill(torch.arange(count).unsqueeze(0))
        assert [int(layer.cumulative_length) for layer in native.cache.layers] == [count, count]
        native.decode(3)
        native.check_length("a case")
    native.pick_natively(greedily=False)
    assert native.native_prefill.forgotten == 1  # its graph holds the pick


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_window_is_moved_by_four_stages_and_holds_something_back(name):
    one = Geometry(name, 4096, 14336, 32, 8, 128, eps=1e-5)
    window = one.macros()["WINDOW"]
    assert window % 4 == 0
    assert window < one.shared(4096, 1792)[0]
    eight = replace(one, batch=8).macros()
    assert eight["WINDOW"] == eight["PACE"] == 0  # measured at batch 1 alone
