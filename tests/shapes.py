"""Configs that are looked at and never built."""

from __future__ import annotations

from types import SimpleNamespace

LLAMA_8B = SimpleNamespace(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    tie_word_embeddings=False,
)
