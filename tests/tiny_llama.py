"""Tiny Llamas on disk, for the tests that read checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models

from lowbit.quiet import quiet_import

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save(folder: Path, *, dtype: torch.dtype = torch.bfloat16, shard: str = "1GB", **changes: object) -> Path:
    """Save a seeded Llama (hidden 64, 2 layers, vocab 128) with random norms too; returns the folder."""
    transformers = quiet_import("transformers")
    values = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "rope_parameters": dict(LLAMA3_ROPE),
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    torch.manual_seed(11)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def edit_config(folder: Path, *drop: str, **changes: object) -> Path:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in drop}))
    return folder


def edit_weights(folder: Path, change) -> Path:
    """Rewrite the single file of a folder with ``change(name -> tensor)`` applied to its dict."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def add_tokenizer(folder: Path) -> Path:
    words = {word: number for number, word in enumerate(["<s>", "once", "upon", "a", "time"])}
    tokenizer = Tokenizer(token_models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
