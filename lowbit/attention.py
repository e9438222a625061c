"""Attention with both of its products in fp8: queries, keys, probabilities and values are e4m3 where they multiply.

    scores = e4m3(q) e4m3(k)^T × s_q s_k / sqrt(D)   a scale per head and token, as in the fp8 KV cache
    out = e4m3(softmax(scores) s_v) e4m3(v) × s_p    a scale per head and query; a value's own goes into its weight

Sums are fp32. The products are torch._scaled_mm: tensor cores from SM89 on, exact on a CPU. It knows no batches and no
masks, so each key/value head's scores are written out: the reference path, for quality and memory, not for speed.
FlashAttention-3 (arXiv 2407.08608, section 3.3) multiplies in e4m3 within one kernel, with a scale per block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kvcache import encode
from lowbit.quiet import quiet_import

NAME = "lowbit_fp8"
"""Of this attention among transformers' attention functions."""

MULTIPLE = 16
"""torch._scaled_mm wants K and P to be multiples of it: head_dim and tokens. Static caches are."""

Packed = tuple[Tensor, ...]
"""Codes [..., D] uint8 of e4m3 and scales [..., 1] fp16, as lowbit.kvcache.encode gives them."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] by b [P, K] transposed, both codes of e4m3 -> [M, P] fp32. K and P must be multiples of 16."""
    one = torch.ones((), device=a.device)
    left, right = a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn).t()
    return torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.float32)


def attend_head(query: Packed, key: Packed, value: Packed, mask: Tensor, scaling: float) -> Tensor:
    """One key/value head: query [M, D], key and value [L, D], mask [M, L], added -> [M, D] fp32."""
    scores = product(query[0], key[0]) * (query[1].float() * scaling) * key[1].float().t()
    weights = torch.softmax(scores + mask, dim=-1)
    codes, scale = encode("fp8", weights * value[1].float().t())
    return product(codes, value[0].t().contiguous()) * scale.float()


def attend(
    module: Any,
    query: Tensor,
    key: Tensor | Packed,
    value: Tensor | Packed,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, heads, S, D] -> [B, S, heads, D] in the query's dtype.

    ``key`` and ``value`` are what the cache holds, or states [B, kv_heads, L, D] where there is no cache. The mask, [B,
    1, S, L] or the same for all, is added; without one every token sees every other.
    """
    batch, heads, tokens, width = query.shape
    keys, values = (_packed(states) for states in (key, value))
    if attention_mask is None:
        attention_mask = query.new_zeros(1, 1, tokens, key.shape[2] if isinstance(key, Tensor) else key[0].shape[2])
    mask = _mask(attention_mask, batch, keys[0].shape[2])
    shared = heads // keys[0].shape[1]  # query heads of one key/value head
    queries = [part.view(batch, -1, shared * tokens, part.shape[-1]) for part in encode("fp8", query.contiguous())]
    out = []
    for b in range(batch):
        here = mask[b, 0].float().repeat(shared, 1)
        for h in range(keys[0].shape[1]):
            q, k, v = (tuple(part[b, h] for part in packed) for packed in (queries, keys, values))
            out.append(attend_head(q, k, v, here, scaling))
    merged = torch.stack(out).view(batch, heads, tokens, width)
    return merged.transpose(1, 2).contiguous().to(query.dtype), None


def _packed(states: Tensor | Packed) -> Packed:
    """What a cache holds, or states without one: encoded, and filled up to as many tokens as a product takes."""
    if isinstance(states, Tensor):
        return encode("fp8", F.pad(states, (0, 0, 0, -states.shape[2] % MULTIPLE)))
    return states


def _mask(mask: Tensor, batch: int, length: int) -> Tensor:
    """For every sequence, and for the tokens that were filled up: they weigh nothing."""
    return F.pad(mask, (0, length - mask.shape[-1]), value=torch.finfo(mask.dtype).min).expand(batch, -1, -1, -1)


def added_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """transformers' mask for SDPA, always there, as numbers to add: 0, or the least of ``dtype``.

    Its own such mask (masking_utils.eager_mask, 5.17 and 5.23) brings a zero from the host, which no CUDA graph holds.
    """
    from transformers.masking_utils import sdpa_mask

    seen: Tensor = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def install(model: Any) -> None:
    """Let this model attend in fp8 from now on, with the cache ``fp8_attn`` or without one."""
    quiet_import("transformers")
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, added_mask)
    model.config._attn_implementation = NAME
