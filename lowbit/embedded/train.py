"""Makes the embedded model again: text generator → tokenizer → model. ``python -m lowbit.embedded.train --out DIR``.

What comes out the same on any machine, bit for bit: the text, the tokenizer (its training has no randomness), the
initial weights and the order of the training windows. What does not: the trained weights. bf16 sums differ between
devices and library versions, and on a GPU between runs, so a second training ends at other weights of the same
quality (README.md in this folder gives the figures of what ships).

Takes about a minute on an H200; on a CPU pass ``--steps`` of a few hundred and patience.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from lowbit.embedded import WINDOW, corpus
from lowbit.embedded.evaluate import heldout_ids, perplexity, scored_positions, token_logprobs, tokenize_stories

VOCAB = 2048
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
STORIES = 60_000
STORIES_PER_BOOK = 8
SEED = 1  # of the initial weights and of the order of windows
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": WINDOW,
    },
}


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over the first stories, digits apart, BOS prepended as Llama 3 does. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.tell_stories(corpus.TRAINING_SEED, corpus.TOKENIZER_STORIES), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json and the config that makes AutoTokenizer take it as it is."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL["max_position_embeddings"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tokenize_part(part: tuple[str, int, int]) -> NDArray[np.uint16]:
    text, start, count = part
    tokenizer = Tokenizer.from_str(text)
    books = []
    for book in range(start, start + count, STORIES_PER_BOOK):
        size = min(STORIES_PER_BOOK, start + count - book)
        ids = tokenize_stories(tokenizer, corpus.tell_stories(corpus.TRAINING_SEED, size, book))
        books.append(np.concatenate([np.array([0], np.uint16), ids, np.array([1], np.uint16)]))
    return np.concatenate(books)


def make_training_ids(tokenizer: Tokenizer, stories: int, workers: int) -> NDArray[np.uint16]:
    """The training text as one stream: books of eight stories, each between BOS and EOS."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    size = 125 * STORIES_PER_BOOK
    parts = [(tokenizer.to_str(), start, min(size, stories - start)) for start in range(0, stories, size)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return np.concatenate(list(pool.map(_tokenize_part, parts)))


def make_model() -> nn.Module:
    """LlamaForCausalLM in fp32 with N(0, 0.02) weights of a fixed seed; outputs of residual branches scaled down."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**MODEL, bos_token_id=0, eos_token_id=1, pad_token_id=None, attn_implementation="sdpa")
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * MODEL["num_hidden_layers"]) if deep else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
    return model  # type: ignore[no-any-return]


class Batches:
    """Windows of 513 tokens in random order, the cut moved every epoch; every eighth starts at a book's BOS."""

    def __init__(self, ids: NDArray[np.uint16], batch: int, device: torch.device) -> None:
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.batch, self.device = batch, device
        books = torch.from_numpy(np.flatnonzero(ids == 0))
        self.books = books[books < len(ids) - WINDOW - 1]
        self.generator = torch.Generator().manual_seed(SEED)
        self.queue = torch.empty(0, dtype=torch.int64)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Inputs and the tokens that follow them: [batch, 512] each."""
        if len(self.queue) < self.batch:
            shift = int(torch.randint(WINDOW, (1,), generator=self.generator))
            starts = torch.arange(shift, len(self.ids) - WINDOW - 1, WINDOW)
            self.queue = starts[torch.randperm(len(starts), generator=self.generator)]
        starts, self.queue = self.queue[: self.batch].clone(), self.queue[self.batch :]
        some = torch.randint(len(self.books), (len(starts[::8]),), generator=self.generator)
        starts[::8] = self.books[some]
        windows = self.ids[(starts[:, None] + torch.arange(WINDOW + 1)).to(self.device)].long()
        return windows[:, :-1], windows[:, 1:]


def train_model(model: nn.Module, batches: Batches, steps: int, rate: float) -> None:
    """AdamW with warm-up and cosine decay to zero, gradients clipped at 1, products in bf16."""
    device = batches.device
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    warm_up = max(1, min(200, steps // 10))
    began = time.perf_counter()
    for step in range(steps):
        done = (step - warm_up) / max(1, steps - warm_up)
        for group in optimizer.param_groups:
            group["lr"] = rate * (step / warm_up if done < 0 else 0.5 + 0.5 * math.cos(math.pi * done))
        inputs, targets = batches.draw()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(inputs, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Write heldout.txt, the tokenizer and the trained model into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64, help="windows of 512 tokens per step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--stories", type=int, default=STORIES)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(corpus.write_heldout(), encoding="utf-8")
    tokenizer = train_tokenizer()
    write_tokenizer(tokenizer, out)
    ids = make_training_ids(tokenizer, options.stories, options.workers)
    print(f"{len(ids)} training tokens, {options.steps * options.batch * WINDOW / len(ids):.1f} epochs", flush=True)
    model = make_model()
    train_model(model, Batches(ids, options.batch, torch.device(options.device)), options.steps, options.rate)
    heldout = torch.from_numpy(heldout_ids(out))
    model.cpu()
    for dtype in (torch.float32, torch.bfloat16):
        logprobs = token_logprobs(model.to(dtype), heldout, WINDOW).numpy()
        print(f"held-out ppl, window {WINDOW}, {dtype}: {perplexity(logprobs, scored_positions(len(heldout))):.4f}")
    model.save_pretrained(out)  # type: ignore[operator]


if __name__ == "__main__":
    main()
