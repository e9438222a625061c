"""What the weight formats lose on the embedded model: KL divergence of its next-token distributions."""

from __future__ import annotations

import pytest
import torch

from lowbit import embedded
from lowbit.kernels import dequantize, quantize
from lowbit.quiet import quiet_import

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def kl():
    """KL in nats of a weight format against the plain model, 1,024 tokens; each format once."""
    transformers = quiet_import("transformers")
    folder = embedded.load_path()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = torch.tensor(tokenizer(embedded.heldout_text()).input_ids[:1024]).view(2, 512)
    linears = {path: module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] in LINEARS}
    masters = {path: linear.weight.detach().clone() for path, linear in linears.items()}
    found: dict[tuple[str, bool], float] = {}

    @torch.no_grad()
    def log_probabilities():
        return model(ids).logits.log_softmax(-1)

    reference = log_probabilities()

    @torch.no_grad()
    def measure(name, *, search=True):
        if (name, search) not in found:
            for path, linear in linears.items():
                linear.weight.copy_(dequantize(quantize(masters[path], name, search=search)))
            found[name, search] = (reference.exp() * (reference - log_probabilities())).sum(-1).mean().item()
        return found[name, search]

    return measure


@pytest.mark.parametrize("name", ["int4_g128", "int4_sym_g128", "int3_g128", "int2_g128", "nvfp4"])
def test_the_search_lowers_kl(kl, name):
    assert kl(name) < kl(name, search=False)


@pytest.mark.parametrize(
    ("more", "fewer"),
    [
        ("bf16", "int8"),
        ("int8", "int4_g32"),
        ("int4_g32", "int4_g64"),
        ("int4_g64", "int4_g128"),
        ("int4_g128", "int3_g128"),
        ("int3_g128", "int2_g128"),
        ("int2_g128", "ternary"),
        ("ternary", "binary"),
        ("fp8_e4m3", "nvfp4"),
        ("nvfp4", "mxfp4"),
        ("int4_sym_g32", "int4_sym_g64"),
        ("int4_sym_g64", "int4_sym_g128"),
    ],
)
def test_more_bits_lose_less(kl, more, fewer):
    assert kl(more) < kl(fewer)


@pytest.mark.parametrize(("name", "limit"), [("bf16", 1e-6), ("int8", 1e-4), ("int4_g128", 0.006), ("int3_g128", 0.03)])
def test_kl_stays_where_it_was_measured(kl, name, limit):
    assert kl(name) < limit
