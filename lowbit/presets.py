"""The models that ``--model`` knows by name: hub ids and true configs, as data, so that dummy weights need no hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EMBEDDED = "embedded"
"""The small trained model that ships with the package."""


@dataclass(frozen=True)
class Preset:
    """One row. ``values`` is what the config.json of ``hub_id`` says; None for the embedded model, with its own."""

    name: str
    hub_id: str | None
    values: Mapping[str, Any] | None
    description: str


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, head_dim: int, *, factor: float, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "dtype": "bfloat16",
    }


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(EMBEDDED, None, None, "ships with the package; trained, runs on any machine"),
        Preset(
            "llama-3.1-8b",
            "meta-llama/Llama-3.1-8B",
            _llama(4096, 14336, 32, 32, 128, factor=8.0, tied=False),
            "8.03 billion parameters, untied head",
        ),
        Preset(
            "llama-3.2-1b",
            "meta-llama/Llama-3.2-1B",
            _llama(2048, 8192, 16, 32, 64, factor=32.0, tied=True),
            "1.24 billion parameters, tied head",
        ),
        Preset(
            "llama-3.2-3b",
            "meta-llama/Llama-3.2-3B",
            _llama(3072, 8192, 28, 24, 128, factor=32.0, tied=True),
            "3.21 billion parameters, tied head",
        ),
    )
}

LLAMA_8B_IDS = (
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B-Instruct",
)
"""The ids under which a Llama-3.1-8B lies in a local cache, the plain one first."""
