"""Attention in fp8: its roundings, its products, its cache, its quality."""

from __future__ import annotations

import pytest
import torch
from test_recipes import device, host
from tiny import CPU, config, gpu, model

from lowbit import attention, backends, compilers, generate, kvcache, process_state, quality, quantized
from lowbit.formats import FORMATS
from lowbit.generate import Decoder, make_cache
from lowbit.quality import Reference, Text

FMT = FORMATS["bf16_attn_fp8-torch"]


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(query, key, value, mask, scaling):
    """In fp64, with nothing rounded."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(shared, dim=1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scaling
    return (torch.softmax(scores + (0 if mask is None else mask), dim=-1) @ value).transpose(1, 2)


def causal(tokens, length):
    return torch.full((1, 1, tokens, length), -torch.inf).triu(1 + length - tokens)


def installed(dtype=torch.float32, **changes):
    made = model(dtype, **changes)
    attention.install(made)
    return made


def prompt(tokens, batch=1):
    return (torch.arange(batch * tokens) * 37 % 512).view(batch, tokens)


# -- the function ------------------------------------------------------------------------------------------------------


def test_a_product_is_that_of_the_codes():
    a, b = kvcache.encode("fp8", states(5, 64)), kvcache.encode("fp8", states(32, 64, seed=1))
    exact = a[0].view(torch.float8_e4m3fn).double() @ b[0].view(torch.float8_e4m3fn).double().t()
    assert (attention.product(a[0], b[0]).double() - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize(("batch", "tokens", "length"), [(1, 1, 48), (2, 16, 16), (1, 7, 32), (1, 9, 21)])
def test_it_is_attention_but_for_the_roundings_of_e4m3(batch, tokens, length):
    query, key, value = (
        states(batch, 8, tokens, 32),
        states(batch, 2, length, 32, seed=1),
        states(batch, 2, length, 32, seed=2),
    )
    mask = causal(tokens, length)
    out, _ = attention.attend(None, query, key, value, mask, scaling=32**-0.5)
    want = reference(query, key, value, mask, 32**-0.5)
    error = ((out - want).norm() / want.norm()).item()
    assert out.shape == (batch, tokens, 8, 32)
    assert 0.005 < error < 0.06  # three mantissa bits, twice


def test_without_a_mask_every_token_sees_every_other():
    query, key, value = states(1, 2, 3, 32), states(1, 1, 5, 32, seed=1), states(1, 1, 5, 32, seed=2)
    want = reference(query, key, value, None, 0.2)
    out, _ = attention.attend(None, query, key, value, None, 0.2)
    assert ((out - want).norm() / want.norm()) < 0.06


def test_what_the_cache_holds_gives_what_the_states_give():
    query, key, value = states(1, 8, 3, 32), states(1, 2, 16, 32, seed=1), states(1, 2, 16, 32, seed=2)
    packed = [kvcache.encode("fp8", x) for x in (key, value)]
    mask = causal(3, 16)
    assert torch.equal(
        attention.attend(None, query, *packed, mask, 0.2)[0], attention.attend(None, query, key, value, mask, 0.2)[0]
    )


def test_scales_of_keys_and_values_are_each_tokens_own():
    query, key, value = states(1, 2, 1, 32), states(1, 1, 16, 32, seed=1), states(1, 1, 16, 32, seed=2)
    key[0, 0, 3] *= 1e-3
    value[0, 0, 5] *= 1e3
    want = reference(query, key, value, None, 0.2)
    out, _ = attention.attend(None, query, key, value, None, 0.2)
    assert ((out - want).norm() / want.norm()) < 0.08


def test_a_token_that_is_masked_weighs_nothing():
    query, key, value = states(1, 2, 1, 32), states(1, 1, 16, 32, seed=1), states(1, 1, 16, 32, seed=2)
    mask = torch.zeros(1, 1, 1, 16)
    mask[..., 9:] = torch.finfo(torch.bfloat16).min
    out, _ = attention.attend(None, query, key, value, mask, 0.2)
    value[:, :, 9:] = 1e4
    assert torch.equal(attention.attend(None, query, key, value, mask, 0.2)[0], out)


# -- in a model --------------------------------------------------------------------------------------------------------


def test_a_row_installs_it_in_its_own_model_alone():
    source = host()
    made = quantized.build(source, FMT, device())
    assert made.model.config._attn_implementation == attention.NAME
    assert source.master.config._attn_implementation == "sdpa"
    plain = quantized.build(source, FORMATS["bf16-torch"], device()).model
    ids = prompt(16)
    with torch.no_grad():
        want, got = plain(ids).logits.float(), made.model(ids).logits.float()
    error = ((got - want).norm() / want.norm()).item()
    assert 1e-4 < error < 0.06


def test_a_step_after_a_prefill_is_a_longer_prefill():
    made, ids = installed(), prompt(13, batch=2)
    decoder = Decoder(made, 2, 32, kv="fp8_attn")
    decoder.prefill(ids[:, :12])
    stepped = generate.decode_logits(made, ids[:, 12:], torch.tensor([12]), decoder.cache)
    cache = make_cache(made, 2, 32, kv="fp8_attn")
    whole = made(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:]
    torch.testing.assert_close(stepped, whole, rtol=1e-3, atol=1e-4)
    assert kvcache.bytes_per_token(decoder.cache) == quantized.kv_bytes_per_token(FMT, config())


def test_the_compiled_step_gives_the_eager_tokens():
    made = installed()
    expected = Decoder(made, 1, 40, kv="fp8_attn").generate(prompt(12), 6)
    with process_state.preserved_state():
        decoder = Decoder(made, 1, 40, kv="fp8_attn")
        decoder.compile(lambda step: compilers.compile_call(step, "regional", CPU, {}, list(made.model.layers)))
        with torch.no_grad():
            assert torch.equal(decoder.generate(prompt(12), 6), expected)
        assert process_state.counters() == (0, 0)
        decoder.check_length("a test")


def test_its_quality_is_its_own():
    made = model(torch.float32)
    ids = (torch.arange(1024) * 7919 + (torch.arange(1024) // 7) * 13) % 512
    text = Text("toy", ids, 64)
    with Reference.build(made, text, windows=4) as base:
        cached = quality.score(made, text, base, max_windows=4, kv="fp8").kld
        attended = quality.score(installed(), text, base, max_windows=4, kv="fp8_attn").kld
    assert 0 < cached < attended < 0.05  # queries and probabilities are rounded too


# -- the row -----------------------------------------------------------------------------------------------------------


def test_the_row_asks_for_its_hardware_and_says_that_it_is_a_reference(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    assert backends.unmet(FMT, CPU, config()) is None
    assert backends.unmet(FMT, gpu(9, 0), config()) is None
    told = "capability: needs SM89 (fp8 products), this is SM80"
    assert str(backends.unmet(FMT, gpu(8, 0), config())) == told
    small = config(head_dim=8)
    assert str(backends.unmet(FMT, CPU, small)) == (
        "shape: fp8 products need head_dim in multiples of 16, this model's is 8"
    )
    assert not FMT.fast
    assert {"attention", "fp8", "kv"} <= FMT.selectors
