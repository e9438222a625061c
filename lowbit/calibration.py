"""What a calibrated format sees of the world before it is quantized: text like the scored one, never that one.

A format that was fitted to the text it is scored on would look better than it is. So WikiText-2's test set is scored
and its validation set calibrates; everything else is calibrated on stories of the embedded model's own kind, from a
seed that neither its training nor its held-out text uses. Dummy weights have nothing to learn: any tokens do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import quality, texts
from lowbit.embedded import corpus
from lowbit.errors import LowbitError

SEED = 27182818
"""Of the stories; training has 20261121, the held-out text 31415926."""

DUMMY_WINDOW = 512

STORIES_AT_A_TIME = 16


def tokens(host: Any, source: texts.Source, windows: int) -> Tensor:
    """[windows, window] int64 on the host, the same in every run, for ``quantized.build``.

    ``host`` is the HostModel to be quantized. Raises LowbitError if it came without a tokenizer, or for a validation
    set that is too short.
    """
    if host.load_format == "dummy":
        ids: Tensor = (torch.arange(windows * DUMMY_WINDOW, dtype=torch.int64) * 7919 + 1013) % host.config.vocab_size
        return ids.view(windows, DUMMY_WINDOW)
    if host.tokenizer is None:
        raise LowbitError(
            f"{host.name}: a calibrated format needs the model's tokenizer (tokenizer.json), which its folder does not "
            "have; add it, or leave these formats out with -k 'not calibrated'"
        )
    text = _wikitext2(host, source) if source.name == "wikitext2" else None
    found = (text or _stories(host, source.window, windows)).windows(windows)
    if len(found) < windows:
        raise LowbitError(f"calibration needs {windows} windows of {source.window} tokens, the text has {len(found)}")
    return found


def _wikitext2(host: Any, source: texts.Source) -> quality.Text | None:
    path = source.path and source.path.with_name(texts.WIKITEXT2_VALIDATION)
    if path is None or not path.exists():
        return None
    content = quality.join_wikitext(path.read_text(encoding="utf-8"))
    return quality.encode_text("wikitext2_validation", content, host.tokenizer, source.window)


def _stories(host: Any, window: int, windows: int) -> quality.Text:
    """As many stories as it takes."""
    stories: list[str] = []
    ids: list[int] = []
    while len(ids) < window * windows:
        stories += corpus.tell_stories(SEED, STORIES_AT_A_TIME, len(stories))
        ids = host.tokenizer.encode(corpus.join_stories(iter(stories)), add_special_tokens=False, verbose=False)
    return quality.encode_text("stories", corpus.join_stories(iter(stories)), host.tokenizer, window)
