"""The model that ships with the package: a small trained Llama-3.1, its tokenizer and a text it has never seen.

``README.md`` in this folder says how it was made and what it scores; ``python -m lowbit.embedded.train`` makes it
again.
"""

from __future__ import annotations

from pathlib import Path

WINDOW = 512
"""Tokens per window that quality is scored at: the context the model was trained with."""


def load_path() -> Path:
    """The Hugging Face folder: config.json, model.safetensors (bf16), tokenizer.json, generation_config.json."""
    return Path(__file__).parent


def heldout_text() -> str:
    """About 57,000 characters, more than 16 windows, from a seed that training does not use."""
    return (load_path() / "heldout.txt").read_text(encoding="utf-8")
