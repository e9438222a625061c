"""Which text a model's quality is scored on, decided before any weights are read, so that a baseline can be checked."""

from __future__ import annotations

import os
import socket
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowbit import embedded, quality
from lowbit.errors import LowbitError

WINDOW = 2048
"""Tokens per window on real models: the protocol of the published WikiText-2 perplexities."""

WIKITEXT2_REPO, WIKITEXT2_ARCHIVE = "ggml-org/ci", "wikitext-2-raw-v1.zip"
WIKITEXT2_FOLDER, WIKITEXT2_VALIDATION = "wikitext-2-raw", "wiki.valid.raw"
"""The raw test set, and the validation set for calibration, as llama.cpp's own scripts fetch them
(scripts/get-wikitext-2.sh): a zip, no parquet reader needed."""


@dataclass(frozen=True)
class Source:
    """Where a text comes from; ``path`` is None for the embedded model's held-out text."""

    name: str
    window: int
    path: Path | None

    @property
    def protocol(self) -> str:
        return f"{self.name}_{self.window}"

    def load(self, tokenizer: Any) -> quality.Text:
        """Tokenize it. Raises LowbitError if the model came without a tokenizer."""
        if tokenizer is None:
            raise LowbitError(
                f"quality on {self.protocol} needs the model's tokenizer (tokenizer.json), which its folder does not "
                "have; add it, or leave the quality cases out with -k 'not quality'"
            )
        if self.path is None:
            return quality.encode_text(self.name, embedded.heldout_text(), tokenizer, self.window)
        return quality.load_text(self.path, tokenizer, self.window)


def choose_source(model: str, load_format: str, max_positions: int, text: Path | None) -> Source:
    """The text to score: the given file, else WikiText-2 if it can be had, else the embedded held-out text.

    The embedded model, and the embedded model beside dummy weights, is scored on its own held-out text unless a file
    is given. Raises LowbitError for a file beside dummy weights, whose quality is not applicable.
    """
    if load_format == "dummy":
        if text is not None:
            raise LowbitError("--text needs real weights: with --load-format dummy quality is not applicable")
        return Source("embedded", embedded.WINDOW, None)
    small = model == "embedded"
    window = min(embedded.WINDOW if small else WINDOW, max_positions)
    if text is not None:
        return Source(quality.name_text(text), window, text)
    if small:
        return Source("embedded", window, None)
    wikitext = find_wikitext2()
    return Source("wikitext2", window, wikitext) if wikitext else Source("embedded", window, None)


def _hub_answers(seconds: float = 3.0) -> bool:
    """Whether the hub can be reached at all: its client would retry for half a minute before it says no."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not address.hostname:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # the proxy answers for it
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=seconds):
            return True
    except OSError:
        return False


def find_wikitext2() -> Path | None:
    """The raw WikiText-2 test set from the Hugging Face cache or hub (4.7 MB, once), or None where it can't be had.

    The validation set is put beside it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        archive = Path(
            huggingface_hub.hf_hub_download(
                WIKITEXT2_REPO, WIKITEXT2_ARCHIVE, repo_type="dataset", local_files_only=not _hub_answers()
            )
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        return None  # said by the protocol's name: the metrics become ppl_embedded_…
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
    for name in (quality.WIKITEXT2_FILE, WIKITEXT2_VALIDATION):
        target = folder / name
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}")
            with zipfile.ZipFile(archive) as files:
                partial.write_bytes(files.read(f"{WIKITEXT2_FOLDER}/{name}"))
            partial.rename(target)
    return folder / quality.WIKITEXT2_FILE
