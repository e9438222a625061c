"""The log-likelihood of a text under a causal model, one sequence at a time: the plainest loop that is right.

It is what lm-evaluation-harness's figures are held against (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F


@torch.no_grad()
def continuation(model: Any, context: Sequence[int], tokens: Sequence[int], limit: int) -> float:
    """ln P(tokens | context) in nats. Of a longer context than fits ``limit`` positions the end is kept."""
    sequence = [*context, *tokens][-(limit + 1) :]
    ids = torch.tensor(sequence, device=model.model.norm.weight.device)
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]  # [S, V]
    scores = F.log_softmax(logits[-len(tokens) :].float(), dim=-1)
    return float(scores.gather(1, ids[-len(tokens) :, None]).double().sum())


def rolling(model: Any, tokens: Sequence[int], prefix: int, limit: int) -> float:
    """ln P(tokens) in nats of a text of any length, each token scored once; ``prefix`` comes before the first."""
    return sum(continuation(model, context, scored, limit) for context, scored in windows(tokens, prefix, limit))


def windows(tokens: Sequence[int], prefix: int, limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, tokens to score) of a long text in pieces of ``limit`` tokens.

    Each piece sees the token before it; the last, shorter one sees as much of the text before it as fits.
    """
    text = [prefix, *tokens]
    for start in range(1, len(text), limit):
        stop = min(start + limit, len(text))
        first = start - 1 if start == 1 or stop - start == limit else max(stop - 1 - limit, 0)
        yield text[first:start], text[start:stop]
