from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, config, gpu, model

from lowbit import backends, compilers, generate, kvcache, process_state, quality, quantized, roofline
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, recipes
from lowbit.formats.row import KV_FORMATS
from lowbit.generate import Decoder, make_cache
from lowbit.quality import Reference, Text
from lowbit.scoring import Scorer

NAMES = tuple(name for name in KV_FORMATS if name != "fp8_attn")  # its attention: test_attention.py
BF16_BYTES = 2 * 2 * 2 * 32 * 2  # layers, key and value, kv heads, head_dim, bytes
ROUNDING = {"int8": 0.01, "fp8": 0.04, "int4": 0.15}
"""Relative error of normal numbers, 64 to a scale: half a step of the largest, or of e4m3's 3 bits of mantissa."""


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(batch=1, tokens=12):
    return (torch.arange(batch * tokens) * 37 % 512).view(batch, tokens)


# -- codes and scales --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_stands_for_what_went_in(name):
    x = states(2, 4, 8, 64)
    parts = kvcache.encode(name, x)
    back = kvcache.decode(name, parts, torch.float32)
    error = ((back - x).norm() / x.norm()).item()
    assert ROUNDING[name] / 10 < error < ROUNDING[name]
    bits = sum(8 * part.nbytes for part in parts) / x.numel()
    number, extra = KV_FORMATS[name]
    assert bits == number + extra / 64


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_belongs_to_one_head_and_token(name):
    x = states(1, 2, 3, 64)
    alone = kvcache.decode(name, kvcache.encode(name, x), torch.float32)
    x[0, 1, 2] *= 1000.0
    beside = kvcache.decode(name, kvcache.encode(name, x), torch.float32)
    assert torch.equal(alone[0, 0], beside[0, 0])
    assert torch.equal(alone[0, 1, :2], beside[0, 1, :2])
    assert ((beside - x).norm(dim=-1) / x.norm(dim=-1)).max() < 2 * ROUNDING[name]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_an_outlier_stay_finite(name):
    x = torch.zeros(1, 1, 3, 64)
    x[0, 0, 1, 7], x[0, 0, 2] = 30_000.0, -1e-30
    back = kvcache.decode(name, kvcache.encode(name, x), torch.float32)
    assert torch.equal(back[0, 0, 0], torch.zeros(64))
    assert back.isfinite().all()
    assert back[0, 0, 1, 7].item() == pytest.approx(30_000.0, rel=2e-3)
    assert back[0, 0, 2].abs().max() < 1e-6


def test_int4_has_a_zero_point():
    x = 100 + states(1, 1, 4, 64)  # far from zero: a symmetric code would keep nothing of it
    back = kvcache.decode("int4", kvcache.encode("int4", x), torch.float32)
    assert (back - x).abs().max() < 0.3


def test_an_unknown_format_lists_the_known_ones():
    for call in (lambda: kvcache.encode("int5", states(1, 4)), lambda: make_cache(model(), 1, 16, kv="int5")):
        with pytest.raises(LowbitError, match="unknown KV cache format 'int5'; known: fp8, fp8_attn, int4, int8"):
            call()
    with pytest.raises(LowbitError, match="unknown KV cache format 'int5'"):
        kvcache.decode("int5", (states(1), states(1)), torch.float32)


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_written_where_the_cache_stands(name):
    cache = make_cache(model(), 2, 32, kv=name)
    layer = cache.layers[0]
    first, second = states(2, 2, 5, 32).bfloat16(), states(2, 2, 1, 32, seed=1).bfloat16()
    addresses = [tensor.data_ptr() for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
    layer.update(first, -first)
    keys, values = layer.update(second, -second)
    assert keys.shape == values.shape == (2, 2, 32, 32)
    assert keys.dtype == torch.bfloat16
    want = torch.cat([first, second], dim=2).float()
    assert ((keys[:, :, :6].float() - want).norm() / want.norm()) < ROUNDING[name]
    assert ((values[:, :, :6].float() + want).norm() / want.norm()) < ROUNDING[name]
    assert not keys[:, :, 6:].any()
    assert int(layer.cumulative_length) == 6
    assert addresses == [tensor.data_ptr() for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize(
    ("name", "bits"), [("", 16), ("int8", 8 + 16 / 32), ("fp8", 8 + 16 / 32), ("int4", 4 + 32 / 32)]
)
def test_bytes_per_token_are_those_of_the_tensors(name, bits):
    cache = make_cache(model(), 3, 48, kv=name)
    assert kvcache.bytes_per_token(cache) == BF16_BYTES * bits / 16
    fmt = next(row for row in FORMATS.values() if row.kv == name)
    assert quantized.kv_bytes_per_token(fmt, config()) == kvcache.bytes_per_token(cache)
    held = sum(t.nbytes for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor))
    assert held - 2 * 8 == 3 * 48 * kvcache.bytes_per_token(cache)  # two int64 lengths


def test_the_8b_shape_saves_what_it_says():
    shape = SimpleNamespace(num_hidden_layers=32, num_key_value_heads=8, head_dim=128)
    each = {row.kv: quantized.kv_bytes_per_token(row, shape) for row in FORMATS.values()}
    assert each[""] == roofline.kv_bytes_per_token(shape) == 131_072
    assert each["int8"] == each["fp8"] == each["fp8_attn"] == 131_072 * 8.125 / 16
    assert each["int4"] == 131_072 * 4.25 / 16


# -- decoding with it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_step_after_a_prefill_is_a_longer_prefill(name):
    made, ids = model(torch.float32), prompt(tokens=13)
    decoder = Decoder(made, 1, 32, kv=name)
    decoder.prefill(ids[:, :12])
    stepped = generate.decode_logits(made, ids[:, 12:], torch.tensor([12]), decoder.cache)
    whole = made(input_ids=ids, past_key_values=make_cache(made, 1, 32, kv=name), use_cache=True).logits[:, -1:]
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_near_those_of_a_plain_cache(name):
    made, ids = model(torch.float32), prompt(tokens=40)
    plain = made(input_ids=ids, use_cache=False).logits
    packed = made(input_ids=ids, past_key_values=make_cache(made, 1, 48, kv=name), use_cache=True).logits
    error = ((packed - plain).norm() / plain.norm()).item()
    assert 0 < error < 2 * ROUNDING[name]


def test_rounds_begin_anew():
    made = model()
    decoder = Decoder(made, 2, 40, kv="int4")
    first = decoder.generate(prompt(2), 6)
    assert torch.equal(decoder.generate(prompt(2), 6), first)
    decoder.check_length("a test")
    decoder.again(4)
    decoder.check_length("a test")


@pytest.mark.parametrize(("name", "mode"), [("int8", "regional"), ("fp8", "default"), ("int4", "default")])
def test_the_compiled_step_gives_the_eager_tokens(name, mode):
    made, device = model(torch.float32), CPU
    expected = Decoder(made, 1, 40, kv=name).generate(prompt(), 6)
    with process_state.preserved_state():
        decoder = Decoder(made, 1, 40, kv=name)
        decoder.compile(lambda step: compilers.compile_call(step, mode, device, {}, list(made.model.layers)))
        with torch.no_grad():
            assert torch.equal(decoder.generate(prompt(), 6), expected)
        counted = process_state.counters()
        decoder.check_length("a test")
    assert counted == (0, 0)


# -- its quality -------------------------------------------------------------------------------------------------------


def text(window):
    ids = (torch.arange(2048) * 7919 + (torch.arange(2048) // 7) * 13) % 512
    return Text("toy", ids, window)


@pytest.mark.parametrize("name", NAMES)
def test_quality_goes_through_the_cache(name):
    made, windows = model(torch.float32), text(64)
    with Reference.build(made, windows, windows=4) as reference:
        plain = quality.score(made, windows, reference, max_windows=4)
        packed = quality.score(made, windows, reference, max_windows=4, kv=name)
    assert plain.kld < 1e-9 < packed.kld < 0.05


def test_fewer_bits_lose_more():
    made, windows = model(torch.float32), text(64)
    with Reference.build(made, windows, windows=4) as reference:
        kld = {name: quality.score(made, windows, reference, max_windows=4, kv=name).kld for name in NAMES}
    assert kld["int8"] < kld["fp8"] < kld["int4"]


@pytest.mark.parametrize(
    ("own", "tokens", "limit", "windows"),
    [
        (512, 13_312, 4096, [512, 2048]),  # the embedded model
        (2048, 289_077, 131_072, [2048, 8192]),  # Llama-3.1 and WikiText-2
        (2048, 5_000, 131_072, [2048]),  # a text that is too short
    ],
)
def test_longer_contexts_follow_from_model_and_text(own, tokens, limit, windows):
    scorer = Scorer(CPU, SimpleNamespace(load=lambda _: Text("toy", torch.arange(tokens), own)), None, print)
    host = SimpleNamespace(name="toy", tokenizer=None, config=SimpleNamespace(max_position_embeddings=limit))
    assert [text.window for text in scorer.texts(host, FORMATS["bf16_kv_int4-torch"])] == windows
    left_out = [str(window) for window in (2048, 8192) if window not in windows]
    told = f"no KV cache is scored at contexts of {', '.join(left_out)} tokens: toy has {limit} positions"
    scorer.texts(host, FORMATS["bf16_kv_int8-torch"])  # once, whatever the format
    assert scorer.notes == ([f"{told}, its text {tokens} tokens"] if left_out else [])
    assert [text.window for text in scorer.texts(host, FORMATS["bf16-torch"])] == [own]


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: object())


def test_every_cache_is_a_row_that_says_that_it_is_a_reference():
    rows = {row.kv: row for row in FORMATS.values() if row.kv and not row.parts}
    assert set(rows) == set(KV_FORMATS)
    for name in NAMES:
        row = rows[name]
        assert {"kv", row.kv} <= row.selectors
        assert not row.fast
        assert not row.is_baseline
        assert "dequantized before attention" in row.note


def test_fp8_asks_for_its_hardware(installed):
    fmt = FORMATS["bf16_kv_fp8-torch"]
    assert str(backends.unmet(fmt, gpu(8, 0), config())) == (
        "capability: needs SM89 (fp8 e4m3 in Triton), this is SM80"
    )
    assert backends.unmet(fmt, gpu(9, 0), config()) is None
    assert backends.unmet(fmt, CPU, config()) is None


def test_a_recipes_cache_asks_for_its_hardware_too(installed):
    parts = {"lm_head": "a16w8-torchao"}
    for kv, what in (("fp8", "fp8 e4m3 in Triton"), ("fp8_attn", "fp8 products")):
        fmt = recipes.make(recipes.Recipe("mine", parts, kv=kv), FORMATS)
        assert str(backends.unmet(fmt, gpu(8, 0), config())) == f"capability: needs SM89 ({what}), this is SM80"
        assert backends.unmet(fmt, gpu(8, 9), config()) is None


def test_a_recipe_has_a_cache_too(tmp_path):
    fmt = FORMATS["a16w4_g128_head8_kv_int8-recipe"]
    assert fmt.kv == "int8"
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "parts": {"lm_head": "a16w8-torchao"}, "kv": "int4"}))
    assert recipes.read(path, FORMATS).kv == "int4"
    path.write_text(json.dumps({"name": "mine", "parts": {"lm_head": "a16w8-torchao"}, "kv": "int5"}))
    with pytest.raises(LowbitError, match="recipe mine: unknown KV cache format 'int5'"):
        recipes.read(path, FORMATS)
    path.write_text(json.dumps({"name": "mine", "parts": {"lm_head": "bf16_kv_int8-torch"}}))
    with pytest.raises(LowbitError, match="a format of the KV cache; say it as its kv"):
        recipes.read(path, FORMATS)
