"""Generation: prefill, one decoded token after the other over a static KV cache; the Generator that streams text."""

from __future__ import annotations

from lowbit.generate.decoder import (
    CACHE_MULTIPLE,
    Decoder,
    PrefillStep,
    Step,
    decode,
    decode_logits,
    decode_one_token,
    make_cache,
    prefill,
)
from lowbit.generate.generator import Generator, Token
from lowbit.generate.proof import check_finite
from lowbit.generate.runner import Runner, make_runner, register_runner

__all__ = [
    "CACHE_MULTIPLE",
    "Decoder",
    "Generator",
    "PrefillStep",
    "Runner",
    "Step",
    "Token",
    "check_finite",
    "decode",
    "decode_logits",
    "decode_one_token",
    "make_cache",
    "make_runner",
    "prefill",
    "register_runner",
]
