from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.errors import LowbitError
from lowbit.generate import CACHE_MULTIPLE, Decoder, check_finite, decode_logits, make_cache, prefill

PROMPT, NEW = 7, 12


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights, wide enough apart that the greedy choice is never a tie."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=128,
        initializer_range=0.2,
        attn_implementation="sdpa",
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prompt(batch: int, tokens: int = PROMPT, seed: int = 0) -> Tensor:
    return torch.randint(128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate_with_transformers(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """Its own greedy search over a growing cache: [B, new_tokens]."""
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, use_cache=True)
    return output[:, ids.shape[1] :]


def compile_with(backend: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    return lambda step: torch.compile(step, fullgraph=True, dynamic=False, backend=backend)


def count_compiles() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [PROMPT + NEW, 100])
def test_greedy_tokens_are_those_of_transformers(model: Any, batch: int, length: int) -> None:
    ids = prompt(batch)
    tokens = Decoder(model, batch, length).generate(ids, NEW)
    assert torch.equal(tokens, generate_with_transformers(model, ids, 1 + NEW))
    assert len(tokens.unique()) > 3  # else agreement would mean little


def test_a_one_token_prompt_is_not_attended_with_the_empty_cache(model: Any) -> None:
    ids = prompt(2, tokens=1)
    tokens = Decoder(model, 2, 60).generate(ids, NEW)
    assert torch.equal(tokens, generate_with_transformers(model, ids, 1 + NEW))


def test_step_logits_are_those_of_the_whole_sequence(model: Any) -> None:
    ids = prompt(2, tokens=10)
    cache = make_cache(model, 2, 64)
    with torch.no_grad():
        prefill(model, cache, ids[:, :9])
        logits = decode_logits(model, ids[:, 9:], torch.tensor([9]), cache)
        expected = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_rounds_repeat_and_do_not_remember(model: Any) -> None:
    decoder = Decoder(model, 1, 40)
    first = decoder.generate(prompt(1, seed=0), NEW)
    other = decoder.generate(prompt(1, tokens=11, seed=1), NEW)
    assert torch.equal(decoder.generate(prompt(1, seed=0), NEW), first)
    assert not torch.equal(other, first)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("batch", [1, 8])
def test_one_graph_serves_every_step_and_round(model: Any, batch: int) -> None:
    ids = prompt(batch)
    expected = Decoder(model, batch, 40).generate(ids, NEW)
    decoder = Decoder(model, batch, 40)
    decoder.compile(compile_with("eager"))
    assert torch.equal(decoder.generate(ids, NEW), expected)
    assert count_compiles() == 1
    for seed in (1, 2):
        decoder.generate(prompt(batch, seed=seed), NEW)
    assert torch.equal(decoder.generate(ids, NEW), expected)
    assert count_compiles() == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_prefill_gives_the_same_tokens(model: Any) -> None:
    expected = Decoder(model, 2, 40).generate(prompt(2), NEW)
    decoder = Decoder(model, 2, 40)
    decoder.compile_prefill(compile_with("eager"))
    for _ in range(2):
        assert torch.equal(decoder.generate(prompt(2), NEW), expected)
    assert count_compiles() == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("default")  # Inductor's own
def test_inductor_gives_the_same_tokens(model: Any) -> None:
    expected = Decoder(model, 1, 40).generate(prompt(1), NEW)
    decoder = Decoder(model, 1, 40)
    decoder.compile(compile_with("inductor"))
    assert torch.equal(decoder.generate(prompt(1), NEW), expected)


def test_addresses_never_change(model: Any) -> None:
    decoder = Decoder(model, 1, 40)

    def addresses() -> list[int]:
        layers = [tensor for layer in decoder.cache.layers for tensor in (layer.keys, layer.values)]
        return [tensor.data_ptr() for tensor in (*layers, decoder.token, decoder.position)]

    before = addresses()
    decoder.generate(prompt(1), NEW)
    decoder.generate(prompt(1, seed=1), NEW)
    assert addresses() == before


def test_on_step_is_called_once_per_step(model: Any) -> None:
    decoder, calls = Decoder(model, 1, 40), []
    decoder.prefill(prompt(1))
    decoder.decode(5, on_step=lambda: calls.append(decoder.position.item()))
    assert calls == [PROMPT + step for step in range(1, 6)]


def test_cache_is_allocated_at_once_in_the_given_dtype(model: Any) -> None:
    cache = make_cache(model, 3, 33, torch.bfloat16)
    keys = cache.layers[1].keys
    assert keys.shape == (3, 2, 48, 16)
    assert keys.shape[2] % CACHE_MULTIPLE == 0
    assert keys.dtype is torch.bfloat16
    assert make_cache(model, 1, 8).layers[0].values.dtype is torch.float32


def test_a_full_cache_is_refused(model: Any) -> None:
    decoder = Decoder(model, 1, PROMPT + 2)
    decoder.prefill(prompt(1))
    decoder.decode(2)
    with pytest.raises(LowbitError, match=r"holds 9 tokens: 9 used, 1 more"):
        decoder.decode(1)


def test_again_repeats_the_decode_without_the_prompt(model: Any) -> None:
    decoder = Decoder(model, 2, 40)
    first = decoder.prefill(prompt(2)).clone()
    expected = decoder.decode(NEW)
    for _ in range(2):
        decoder.token.copy_(first)
        assert torch.equal(decoder.again(NEW), expected)


def test_inference_mode_around_changes_nothing(model: Any, fresh_dynamo: None) -> None:
    expected = Decoder(model, 1, 40).generate(prompt(1), NEW)
    with torch.inference_mode():
        decoder = Decoder(model, 1, 40)
        decoder.compile(compile_with("eager"))
        decoder.compile_prefill(compile_with("eager"))
        for _ in range(2):
            assert torch.equal(decoder.generate(prompt(1), NEW), expected)
    assert count_compiles() == 2  # one step, one prefill


def test_a_context_beyond_the_model_is_refused(model: Any) -> None:
    with pytest.raises(LowbitError, match="129 tokens does not fit the model: its config allows 128"):
        make_cache(model, 1, 129)


def test_nan_logits_are_named(model: Any) -> None:
    decoder = Decoder(model, 1, 40)
    decoder.check_finite(prompt(1), "bf16-torch")
    norm = model.model.norm.weight
    kept = norm[0].item()
    norm[0] = float("nan")
    try:
        with pytest.raises(LowbitError, match="NaN/Inf logits from a16w4_g128-torchao"):
            decoder.check_finite(prompt(1), "a16w4_g128-torchao")
    finally:
        norm[0] = kept


def test_check_finite_counts(model: Any) -> None:
    check_finite(torch.ones(4), "x")
    with pytest.raises(LowbitError, match="2 of 4"):
        check_finite(torch.tensor([1.0, float("inf"), float("nan"), 0.0]), "x")


def test_a_step_that_does_not_advance_the_cache_is_found(model: Any) -> None:
    decoder = Decoder(model, 1, 12)
    ids = torch.tensor([[1, 2, 3]])
    decoder.prefill(ids)
    decoder.decode(4)
    decoder.check_length("decode[a]")
    decoder.compile(lambda step: lambda token, position: token)  # what an empty CUDA graph replays
    decoder.prefill(ids)
    decoder.decode(4)
    with pytest.raises(LowbitError, match=r"decode\[a\]: the KV cache should hold 7 tokens.*its layers count 3"):
        decoder.check_length("decode[a]")
