"""bitsandbytes on a CPU: every row's weights, its activations, and that they are quantized where they lie."""

from __future__ import annotations

import pytest
import torch
from tiny import CPU, OneLinear, config, gpu

from lowbit import backends, compilers
from lowbit.backends import bitsandbytes as backend
from lowbit.backends import coverage
from lowbit.formats import FORMATS

ROWS = [row for row in FORMATS.values() if row.backend == "bitsandbytes"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
K, N = 2048, 64  # every block size divides it


@pytest.fixture(params=ROWS, ids=lambda row: row.id)
def case(request):
    row, dtype = request.param, DTYPES[request.param.dtypes[0]]
    holder = OneLinear(N, K, dtype)
    weight = holder.q_proj.weight.float()
    backend.quantize(holder, row, dtype)
    return row, dtype, weight, holder.q_proj


# ||dequantized - weight|| / ||weight|| of these normal weights, blocks of 32 to 2048: measured 0.0083 (llm_int8), 0.087
# to 0.107 (nf4), 0.114 to 0.129 (fp4, to blocks of 128). Less would be too good to be true, more a wrong scale.
WEIGHT_ERROR = {"llm_int8": (0.007, 0.010), "nf4": (0.08, 0.12), "fp4": (0.11, 0.14)}


def test_weight_error_is_the_schemes(case):
    row, _, weight, module = case
    got = backend.dequantize(module)
    assert got.shape == weight.shape
    low, high = WEIGHT_ERROR[row.scheme]
    assert low < ((got - weight).norm() / weight.norm()).item() < high


def test_the_product_is_that_of_its_own_weights(case):
    row, dtype, _, module = case
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, K, generator=generator)
    x[1], x[2, 7] = 0, 100.0
    x = x.to(dtype)
    for rows in (x[:1], x[2:3], x):
        used = backend.quantize_activations(module, rows) if row.activation_bits < 16 else rows.float()
        want = used @ backend.dequantize(module).T
        with torch.no_grad():
            got = module(rows).float()
        bound = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
        norms = want.norm(dim=1)
        error = (got - want).norm(dim=1)[norms > 0] / norms[norms > 0]
        assert error.max() <= bound
        assert not got[norms == 0].any()


def test_only_threshold_six_keeps_outliers_in_16_bits(case):
    row, dtype, _, module = case
    if row.scheme != "llm_int8":
        return
    x = torch.linspace(-1, 1, K).to(dtype).repeat(2, 1)
    x[0, 5] = 100.0
    used = backend.quantize_activations(module, x)
    outlier_kept = torch.equal(used[:, 5], x[:, 5].float())
    others = (used[0] - x[0].float()).abs()[6:].max().item()
    assert outlier_kept == (row.options["threshold"] > 0)
    assert (others > 0.1) == (row.options["threshold"] == 0)


def test_more_blocks_cost_more_bits_and_no_accuracy():
    errors, bits = [], []
    for row in sorted((row for row in ROWS if row.scheme == "nf4" and not row.options), key=lambda row: row.group_size):
        holder = OneLinear(N, K, torch.bfloat16)
        weight = holder.q_proj.weight.float()
        backend.quantize(holder, row, torch.bfloat16)
        errors.append((backend.dequantize(holder.q_proj) - weight).norm().item())
        bits.append(8 * coverage.storage_bytes(coverage.tensors_of(holder.q_proj)) / weight.numel())
    assert len(errors) == 7
    assert errors == sorted(errors)
    assert bits == sorted(bits, reverse=True)
    assert 4 < bits[-1] < bits[0] < 5.1


def test_the_rows_of_issue_3_are_there():
    schemes = {(row.scheme, row.options.get("threshold"), row.options.get("double_quant", False)) for row in ROWS}
    assert schemes >= {
        ("llm_int8", 0.0, False),
        ("llm_int8", 6.0, False),
        ("nf4", None, False),
        ("nf4", None, True),
        ("fp4", None, False),
        ("fp4", None, True),
    }
    assert {row.group_size for row in ROWS if row.scheme == "nf4"} >= {32, 64, 128, 256, 512, 1024, 2048}
    assert {row.id for row in ROWS if row.suite == "quick"} >= {
        "a8w8_llmint8-bitsandbytes",
        "a16w4_nf4_dq-bitsandbytes",
    }


def test_only_the_search_for_outliers_keeps_cuda_graphs_away():
    h200 = gpu(9, 0)
    assert compilers.unmet("reduce-overhead", h200, FORMATS["a8w8_llmint8-bitsandbytes"]).kind == "capability"
    assert compilers.unmet("reduce-overhead", h200, FORMATS["a8w8_llmint8_t0-bitsandbytes"]) is None


def test_a_block_that_does_not_divide_k_is_said():
    reason = backends.unmet(FORMATS["a16w4_nf4_g512-bitsandbytes"], CPU, config())
    assert str(reason).startswith("shape: group 512 does not divide q_proj (K=256)")
