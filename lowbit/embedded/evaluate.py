"""Figures of the embedded model: perplexity by window, a trigram's, and KL by bits.

``python -m lowbit.embedded.evaluate`` prints them all; README.md in this folder quotes them.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowbit.embedded import WINDOW, corpus, load_path
from lowbit.embedded.ngram import Trigram

DEVELOPMENT_SEED = 27182818
STRIDE = 64  # a token at a multiple of this has no context in the short window, so no comparison scores it
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def scored_positions(tokens: int) -> NDArray[np.bool_]:
    """Which tokens every comparison scores: [tokens], those that a window of 64 and one of 512 both predict."""
    scored: NDArray[np.bool_] = np.arange(tokens) % STRIDE != 0
    return scored


@torch.no_grad()
def token_logprobs(model: nn.Module, ids: Tensor, window: int, batch_tokens: int = 4096) -> Tensor:
    """ln p of each token in its non-overlapping window, fp32: [tokens]; nan at each window's first token."""
    out = torch.full(ids.shape, math.nan)
    rows = ids.view(-1, window)
    per_batch = max(1, batch_tokens // window)
    for start in range(0, len(rows), per_batch):
        batch = rows[start : start + per_batch]
        logits = model(batch).logits[:, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, batch[:, 1:, None]).squeeze(-1)
        out.view(-1, window)[start : start + per_batch, 1:] = picked.cpu()
    return out


def perplexity(logprobs: NDArray[np.float64], scored: NDArray[np.bool_]) -> float:
    """exp of the mean negative ln p over the scored tokens."""
    return float(np.exp(-logprobs[scored].mean()))


@torch.no_grad()
def round_to_nearest(weight: Tensor, bits: int, group: int = 64) -> Tensor:
    """Asymmetric min-max rounding in groups along K, and back: [N, K] of the same dtype."""
    grouped = weight.float().view(weight.shape[0], -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-10)
    rounded: Tensor = ((grouped - low) / scale).round() * scale + low
    return rounded.view_as(weight).to(weight.dtype)


def rounded_copy(model: nn.Module, bits: int) -> nn.Module:
    """A copy whose seven linears per layer are rounded to ``bits``; head, embedding and norms stay."""
    rounded = copy.deepcopy(model)
    for name, module in rounded.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS and isinstance(module, nn.Linear):
            module.weight.data.copy_(round_to_nearest(module.weight.data, bits))
    return rounded


@torch.no_grad()
def mean_kl(model: nn.Module, other: nn.Module, windows: Tensor) -> float:
    """Mean KL(model || other) in nats over all positions of windows [B, S]."""
    total = 0.0
    for start in range(0, len(windows), 4):
        p, q = (m(windows[start : start + 4]).logits.float().log_softmax(-1) for m in (model, other))
        total += float((p.exp() * (p - q)).sum())
    return total / windows.numel()


def tokenize_stories(tokenizer: object, stories: Iterable[str]) -> NDArray[np.uint16]:
    """Stories as one stream of tokens, as join_stories joins them. tokenizer: tokenizers.Tokenizer."""
    encoded = tokenizer.encode_batch_fast([f"{s}\n\n" for s in stories], add_special_tokens=False)  # type: ignore[attr-defined]
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded])


def heldout_ids(path: Path) -> NDArray[np.int64]:
    """Held-out text as whole windows of 512 tokens, without BOS: [tokens]."""
    from tokenizers import Tokenizer

    text = (path / "heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return np.array(ids[: len(ids) // WINDOW * WINDOW], dtype=np.int64)


def score_trigram(path: Path, stories: int) -> tuple[float, int]:
    """Perplexity of a trigram trained on the first ``stories`` training stories, and how many tokens those are."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    parts = [
        tokenize_stories(tokenizer, corpus.tell_stories(corpus.TRAINING_SEED, min(5000, stories - start), start))
        for start in range(0, stories, 5000)
    ]
    training = np.concatenate(parts)
    trigram = Trigram(training.astype(np.int64), tokenizer.get_vocab_size())
    trigram.tune(tokenize_stories(tokenizer, corpus.tell_stories(DEVELOPMENT_SEED, 40)).astype(np.int64))
    ids = heldout_ids(path)
    # the trigram never restarts: it has its two tokens at every window's start too
    logprobs = np.concatenate([[math.nan] * 2, np.log(trigram.probabilities(ids))])
    return perplexity(logprobs, scored_positions(len(ids)) & ~np.isnan(logprobs)), len(training)


def main(arguments: list[str] | None = None) -> None:
    """Print every figure of README.md."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--path", type=Path, default=load_path())
    parser.add_argument("--trigram-stories", type=int, default=20_000, help="training stories for the trigram")
    options = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(options.path, dtype=torch.bfloat16).eval()
    ids = heldout_ids(options.path)
    tokens, scored = torch.from_numpy(ids), scored_positions(len(ids))
    print(f"held-out: {len(ids)} tokens, {scored.sum()} scored")
    for window in (512, 256, 128, 64):
        print(f"ppl, window {window}, bf16: {perplexity(token_logprobs(model, tokens, window).numpy(), scored):.4f}")
    exact = copy.deepcopy(model).float()
    ppl = perplexity(token_logprobs(exact, tokens, WINDOW).numpy(), scored)
    print(f"ppl, window {WINDOW}, bf16 weights in fp32: {ppl:.4f}")
    for bits in (8, 4, 3, 2, 1):
        kl = mean_kl(model, rounded_copy(model, bits), tokens[: 16 * WINDOW].view(16, WINDOW))
        print(f"mean KL, {bits} bits, group 64, 16 windows: {kl:.5f}")
    ppl, seen = score_trigram(options.path, options.trigram_stories)
    print(f"ppl, Kneser-Ney trigram of {seen} training tokens: {ppl:.4f}")


if __name__ == "__main__":
    main()
