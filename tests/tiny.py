"""A Llama of two layers, made in milliseconds, and a stand-in for any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lowbit.quiet import quiet_import


@dataclass(frozen=True)
class FakeDevice:
    """What the backends read of a lowbit.device.Device."""

    kind: str = "cpu"
    capability: tuple[int, int] | None = None
    total_mib: int = 100_000
    name: str = "a fake"

    @property
    def sm(self):
        return "SM{}{}".format(*self.capability) if self.capability else None

    def dtype_for(self, fmt):
        has_bf16 = self.capability is None or self.capability >= (8, 0)
        return next((name for name in fmt.dtypes if name != "bf16" or has_bf16), None)


CPU = FakeDevice()


def gpu(major, minor, **fields):
    return FakeDevice("cuda", (major, minor), **fields)


def config(**changes):
    """Hidden 256, feed-forward 768, 8 heads of 32, 2 of them for keys: every K a multiple of 128."""
    fields = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    quiet_import("transformers")
    from transformers import LlamaConfig

    return LlamaConfig(**fields | changes)


def model(dtype=torch.bfloat16, **changes):
    """A seeded Llama in evaluation mode."""
    quiet_import("transformers")
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(config(**changes)).to(dtype).eval()


class OneLinear(nn.Module):
    """What a backend quantizes, one target: ``q_proj``, seeded N(0, 0.02) weights [out, in]."""

    def __init__(self, out_features, in_features, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.q_proj = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
        self.q_proj.weight.data = (torch.randn(out_features, in_features, generator=generator) * 0.02).to(dtype)
        self.q_proj.weight.requires_grad = False
        self.eval()
