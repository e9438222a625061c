"""Bytes and floating-point operations that a model must move and do: what mbu and mfu are held against.

Pure arithmetic on a Llama config (any object with transformers' names: hidden_size, num_hidden_layers …). Only the
useful work counts: no padding of a static cache, no recomputation, no weights read twice.
"""

from __future__ import annotations

from typing import Any


def head_dim(config: Any) -> int:
    """Width of one attention head. Some configs leave it out: then hidden_size / num_attention_heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def linear_parameters(config: Any) -> int:
    """Weights of the seven linears of every decoder layer, without lm_head: 6,979,321,856 in Llama-3.1-8B."""
    hidden, width = config.hidden_size, head_dim(config)
    query_output = 2 * hidden * config.num_attention_heads * width
    key_value = 2 * hidden * config.num_key_value_heads * width
    feed_forward = 3 * hidden * config.intermediate_size
    return int(config.num_hidden_layers * (query_output + key_value + feed_forward))


def head_parameters(config: Any) -> int:
    """Weights of lm_head, tied to the embedding or not: a tied table is streamed as the head all the same."""
    return int(config.vocab_size * config.hidden_size)


def norm_parameters(config: Any) -> int:
    """Weights of the two RMSNorms of every layer and of the final one."""
    return int((2 * config.num_hidden_layers + 1) * config.hidden_size)


def kv_bytes_per_token(config: Any, itemsize: int = 2) -> int:
    """Key and value of one position in every layer: 131,072 bytes in Llama-3.1-8B at bf16."""
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * itemsize)


def mean_context(prompt_tokens: int, new_tokens: int) -> float:
    """Cached positions that a decoded step reads, on average over the steps.

    Step i of ``new_tokens`` (i from 0) attends to ``prompt_tokens + i`` positions cached before it; the position that
    it writes itself is not read back from memory. The mean is therefore ``prompt_tokens + (new_tokens - 1) / 2``.
    Raises ValueError without a step.
    """
    if new_tokens < 1:
        raise ValueError(f"mean_context: expected at least 1 decoded token, got {new_tokens}")
    return prompt_tokens + (new_tokens - 1) / 2


def kv_bytes_per_step(config: Any, batch: int, prompt_tokens: int, new_tokens: int, itemsize: int = 2) -> float:
    """Bytes of KV cache read by one decoded step of the whole batch, at the mean context of the decoded steps.

    Linear in the context, so mean bytes × steps is exactly the sum over the steps. To be added to the weight bytes
    that ``backends.coverage`` counts (linears, norms, head; no embedding table) for the bytes streamed per step.
    """
    return batch * kv_bytes_per_token(config, itemsize) * mean_context(prompt_tokens, new_tokens)


def prefill_flop(config: Any, batch: int, tokens: int, *, last_logits_only: bool = True) -> float:
    """Floating-point operations of one prefill over ``batch`` prompts of ``tokens``; a multiply-add is two.

    Linears 2 × weights × tokens. Causal attention: position s meets s keys, 2 × heads × head_dim for the scores and
    as much for the values, so 4 × layers × heads × head_dim × tokens × (tokens + 1) / 2. The head runs on the last
    position alone unless ``last_logits_only`` is False. Norms, rope, softmax and the embedding row are left out (less
    than 1 %), as usual for MFU (Chowdhery et al. 2022, PaLM, appendix B).
    """
    linears = 2 * linear_parameters(config) * tokens
    pairs = tokens * (tokens + 1) / 2
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim(config) * pairs
    head = 2 * head_parameters(config) * (1 if last_logits_only else tokens)
    return float(batch * (linears + attention + head))


def decode_ceiling_tok_s(streamed_bytes_per_step: float, batch: int, read_gb_s: float) -> float:
    """Decoded tokens per second if memory were read at ``read_gb_s`` (10^9 bytes/s) without a pause: mbu = 1."""
    return batch * read_gb_s * 1e9 / streamed_bytes_per_step
