"""Held against the byte counts of Llama-3.1-8B and against sums written out step by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from shapes import LLAMA_8B

from lowbit import roofline


def test_llama_8b_counts():
    assert roofline.linear_parameters(LLAMA_8B) == 6_979_321_856
    assert roofline.head_parameters(LLAMA_8B) == 525_336_576
    assert roofline.norm_parameters(LLAMA_8B) == 266_240
    assert roofline.linear_parameters(LLAMA_8B) + roofline.head_parameters(LLAMA_8B) == 7_504_658_432
    assert roofline.kv_bytes_per_token(LLAMA_8B) == 131_072


def test_all_parameters_of_llama_8b():
    tables = 2 * roofline.head_parameters(LLAMA_8B)
    total = roofline.linear_parameters(LLAMA_8B) + roofline.norm_parameters(LLAMA_8B) + tables
    assert total == 8_030_261_248


@pytest.mark.parametrize(("bytes_per_weight", "expected"), [(2, 308), (1, 617), (0.5 + 4 / 128, 1161)])
def test_decode_ceilings_of_an_h200(bytes_per_weight, expected):
    streamed = 7_504_658_432 * bytes_per_weight
    assert int(roofline.decode_ceiling_tok_s(streamed, 1, 4632)) == expected


def test_batch_multiplies_the_ceiling():
    assert roofline.decode_ceiling_tok_s(1e9, 8, 100) == pytest.approx(800)


def test_head_dim_may_be_absent_or_none():
    fields = vars(LLAMA_8B) | {"head_dim": None}
    assert roofline.head_dim(SimpleNamespace(**fields)) == 128
    del fields["head_dim"]
    assert roofline.linear_parameters(SimpleNamespace(**fields)) == 6_979_321_856


def test_a_head_dim_of_its_own_is_taken():
    wide = SimpleNamespace(**(vars(LLAMA_8B) | {"head_dim": 256}))
    per_layer = 2 * 4096 * 32 * 256 + 2 * 4096 * 8 * 256 + 3 * 4096 * 14336
    assert roofline.linear_parameters(wide) == 32 * per_layer
    assert roofline.kv_bytes_per_token(wide) == 262_144


@pytest.mark.parametrize(("batch", "prompt", "new"), [(1, 5, 128), (8, 5, 128), (1, 2048, 128), (2, 0, 1)])
def test_kv_bytes_per_step_is_the_mean_over_the_steps(batch, prompt, new):
    steps = [batch * 131_072 * (prompt + i) for i in range(new)]
    assert roofline.kv_bytes_per_step(LLAMA_8B, batch, prompt, new) == pytest.approx(sum(steps) / new, rel=1e-12)


def test_kv_bytes_follow_the_cache_dtype():
    half = roofline.kv_bytes_per_step(LLAMA_8B, 1, 100, 10, itemsize=1)
    assert half == roofline.kv_bytes_per_step(LLAMA_8B, 1, 100, 10) / 2


def test_no_decoded_step_has_no_mean():
    with pytest.raises(ValueError, match="at least 1 decoded token, got 0"):
        roofline.mean_context(5, 0)


def test_prefill_flop_counted_one_position_at_a_time():
    tokens, batch = 17, 3
    flop = 0
    for position in range(1, tokens + 1):
        flop += 2 * 6_979_321_856  # the linears
        flop += 32 * 32 * (2 * 128 * position + 2 * 128 * position)  # scores and values against the keys so far
    flop += 2 * 525_336_576  # the head, last position
    assert roofline.prefill_flop(LLAMA_8B, batch, tokens) == pytest.approx(batch * flop, rel=1e-12)


def test_all_logits_cost_the_head_at_every_position():
    one = roofline.prefill_flop(LLAMA_8B, 1, 512)
    every = roofline.prefill_flop(LLAMA_8B, 1, 512, last_logits_only=False)
    assert every - one == 2 * 525_336_576 * 511
