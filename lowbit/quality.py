"""Quality of a format on a text: token perplexity, and KL divergence and top-1 agreement against this run's base model.

Protocol: the text is tokenized whole, with one BOS at its front, and cut into non-overlapping windows; a last partial
window is dropped. Each window is one forward pass that sees nothing of the others, and all its tokens but the first
are scored. Perplexity is exp(mean negative log likelihood): with 2048 tokens on WikiText-2 this is the protocol of
GPTQ (arXiv 2210.17323), and for each window it is transformers' own loss. One window per forward pass, always:
formats that look at a whole batch of activations (LLM.int8 outliers) would otherwise depend on the batch size.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.generate import check_finite, make_cache
from lowbit.logits_store import LogitsStore
from lowbit.metrics import Quality

REFERENCE_WINDOWS = 16
"""Windows that KL and top-1 are taken over: the reference logits of a whole WikiText-2 would be 74 GB."""

CHUNK_BYTES = 64 * 1024 * 1024
"""Size of one fp32 [positions, vocab] block; the few of them alive at a time are what scoring adds to the model."""

SCORED_BLOCKS = 5
"""Blocks alive at most while logits are scored, a 16-bit one counted as half: 4.4 with KL, 3.2 without and while a
reference is built (tests/test_quality.py counts them): 320 MiB with Llama-3's vocabulary of 128,256."""

WIKITEXT2_FILE = "wiki.test.raw"


@dataclass(frozen=True, eq=False)
class Text:
    """A tokenized text. ids: [n] int64 on the host; ``window``: tokens per forward pass."""

    name: str
    ids: Tensor
    window: int

    def __post_init__(self) -> None:
        if self.window < 2:
            raise LowbitError(f"text {self.name!r}: a window needs at least 2 tokens, got {self.window}")
        if len(self.ids) < self.window:
            raise LowbitError(
                f"text {self.name!r} is too short: one window is {self.window} tokens, got {len(self.ids)}; "
                "give a longer text"
            )

    @property
    def protocol(self) -> str:
        """The name under which its metrics are stored, e.g. ``wikitext2_2048``."""
        return f"{self.name}_{self.window}"

    def windows(self, limit: int | None = None) -> Tensor:
        """[W, window]: the non-overlapping windows, at most ``limit`` of them; a last partial one is dropped."""
        count = len(self.ids) // self.window
        count = count if limit is None else min(count, limit)
        return self.ids[: count * self.window].view(count, self.window)


def name_text(path: Path) -> str:
    """The name of the text in a file, fit for a metric's name: ``wikitext2`` for ``wiki.test.raw``, else the stem."""
    return "wikitext2" if path.name == WIKITEXT2_FILE else "".join(c if c.isalnum() else "_" for c in path.stem)


def encode_text(name: str, text: str, tokenizer: Any, window: int) -> Text:
    """Tokenize a string whole, with one BOS at its front if the tokenizer has one, whatever its template would add."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Text(name, torch.tensor(bos + ids, dtype=torch.int64), window)


def load_text(path: Path, tokenizer: Any, window: int) -> Text:
    """Read a UTF-8 file as one text, named after the file.

    ``wiki.test.raw``, the WikiText-2 raw test set, becomes ``wikitext2`` and gets the form in which the published
    perplexities were taken: lines joined by blank lines, as GPTQ joins the rows of the Hugging Face data set.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LowbitError(f"can't read the text {path}: {error}; expected a UTF-8 text file") from error
    if path.name == WIKITEXT2_FILE:
        content = join_wikitext(content)
    return encode_text(name_text(path), content, tokenizer, window)


def join_wikitext(content: str) -> str:
    """The raw file as ``"\\n\\n".join(dataset["text"])``: the data set keeps line ends and empties blank lines."""
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(content))


class Reference:
    """What the base model says about a text: the loss of every token, and the logits of the first windows.

    ``nll``: [W, window - 1] fp32 on the host. The logits, [windows, window - 1, V] in the dtype that the model gives
    (so exact), are in host memory, or in a nameless temporary file when they exceed ``host_bytes``. Use as a context
    manager or call ``close``.
    """

    def __init__(self, text: Text, nll: Tensor, logits: LogitsStore) -> None:
        self.text = text
        self.nll = nll
        self.logits = logits

    @classmethod
    def build(
        cls,
        model: Any,
        text: Text,
        *,
        windows: int = REFERENCE_WINDOWS,
        max_windows: int | None = None,
        directory: Path | None = None,
        host_bytes: int | None = None,
        source: str = "the base model",
    ) -> Reference:
        """Score ``text`` with the base model (on any device), keeping the logits of its first ``windows`` windows.

        ``directory`` is where the temporary file goes (default: the system's), ``host_bytes`` the size above which
        there is one (default: a quarter of the host's memory). Raises LowbitError on NaN/Inf logits or a full disk.
        """
        ids = text.windows(max_windows)
        kept = min(windows, len(ids))
        store = LogitsStore((kept, text.window - 1), directory=directory, host_bytes=host_bytes)
        nll = torch.empty(len(ids), text.window - 1)
        try:
            for index, start, logits, targets in _stream_logits(model, ids):
                if index < kept:
                    store.append(logits)
                nll[index, start : start + len(targets)] = _token_nll(logits.float(), targets).cpu()
            check_finite(nll, source)
            store.seal()
        except BaseException:  # a temporary file of gigabytes must not wait for the garbage collector
            store.close()
            raise
        return cls(text, nll, store)

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the logits and their file."""
        self.logits.close()


def score(
    model: Any,
    text: Text,
    reference: Reference | None = None,
    *,
    max_windows: int | None = None,
    source: str = "the model",
    kv: str = "",
) -> Quality:
    """Score a model on a text; with a reference also KL divergence, top-1 agreement and the paired ln(PPL ratio).

    KL is KL(base || model) in nats, averaged over all positions of the reference's windows. The standard error of the
    ratio comes from the window means: windows share no context, whereas the differences of neighbouring tokens are
    correlated, and treating those as independent would understate it. None for one window. With ``kv`` (Format.kv) each
    window goes through a KV cache in that format, as a prompt does: every token, its own included, is attended to as
    the cache holds it. Raises LowbitError, with ``source`` in its text, on NaN/Inf logits.
    """
    ids = text.windows(max_windows)
    nll = torch.empty(len(ids), text.window - 1)
    compared = min(len(reference.logits), len(ids)) if reference else 0
    kld: list[Tensor] = []
    agree: list[Tensor] = []
    if reference is not None:
        _check_same_text(reference, text, len(ids))
    for index, start, logits, targets in _stream_logits(model, ids, kv):
        positions = slice(start, start + len(targets))
        full = logits.float()
        nll[index, positions] = _token_nll(full, targets).cpu()
        if reference is not None and index < compared:
            base = reference.logits.read(index, positions).to(full.device).float()
            kld.append(divergence(base, full).cpu())
            agree.append((base.argmax(-1) == full.argmax(-1)).cpu())
    check_finite(nll, source)
    quality = Quality(text.protocol, nll.numel(), ppl=math.exp(nll.double().mean().item()), kld_tokens=0)
    if reference is None:
        return quality
    every_kld = torch.cat(kld)
    check_finite(every_kld, source)
    quality.kld_tokens = every_kld.numel()
    quality.kld = max(0.0, every_kld.double().mean().item())  # rounding alone can leave equal models at -1e-9
    quality.top1 = torch.cat(agree).double().mean().item()
    of_windows = (nll.double() - reference.nll[: len(ids)].double()).mean(dim=1)  # [W]
    quality.ln_ppl_ratio = of_windows.mean().item()
    if len(ids) > 1:
        quality.ln_ppl_ratio_stderr = of_windows.std().item() / math.sqrt(len(ids))
    return quality


def scored_bytes(vocab: int, window: int) -> int:
    """What scoring logits takes at most, beside the model and the window's hidden states."""
    return SCORED_BLOCKS * min(CHUNK_BYTES, 4 * window * vocab)


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(base || other) in nats per position, of logits [P, V] in fp32 -> [P].

    The bits of ``F.kl_div(log_target=True)``, in two blocks of [P, V] instead of five.
    """
    p, q = F.log_softmax(base, dim=-1), F.log_softmax(other, dim=-1)
    difference = q.neg_().add_(p)
    return difference.mul_(p.exp_()).sum(-1)


@torch.no_grad()
def _stream_logits(model: Any, windows: Tensor, kv: str = "") -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (window, first position, logits [P, V], targets [P]) over all scored positions, in order.

    The head is applied to a few positions at a time, so that [window, V] never exists: 1 GB in fp32 for Llama-3.
    Those few are equal shares of the window, not a fixed number and a rest: int8 kernels refuse very short blocks.
    """
    head = model.lm_head
    vocab = model.config.vocab_size
    device = model.model.norm.weight.device
    length = windows.shape[1]
    shares = -(-length * vocab * 4 // CHUNK_BYTES)
    cache = make_cache(model, 1, length, kv=kv) if kv else None
    cached = {"past_key_values": cache, "use_cache": True} if cache else {"use_cache": False}
    for index, ids in enumerate(windows.to(device)):
        if cache is not None:
            for layer in cache.layers:
                layer.cumulative_length.zero_()
        hidden = model.model(input_ids=ids[None], **cached).last_hidden_state[0]  # [window, H]
        start = 0
        for block in hidden.tensor_split(shares):
            stop = min(start + len(block), length - 1)  # the last position has no target
            if stop > start:
                yield index, start, head(block)[: stop - start], ids[start + 1 : stop + 1]
            start = stop


def _token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    # [P, V] fp32, [P] -> [P]; NaN where any logit is not finite (a -inf beside the target would not show otherwise)
    nll = F.cross_entropy(logits, targets, reduction="none")
    return nll.masked_fill(~torch.isfinite(logits).all(dim=-1), math.nan)


def _check_same_text(reference: Reference, text: Text, windows: int) -> None:
    same = reference.text.protocol == text.protocol and torch.equal(
        reference.text.windows(windows), text.windows(windows)
    )
    if not same or len(reference.nll) < windows:
        raise LowbitError(
            f"the reference was built on {reference.text.protocol} ({len(reference.nll)} windows), "
            f"the model is scored on {text.protocol} ({windows} windows): build a reference on the same text"
        )
