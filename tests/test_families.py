"""What every row that runs on a CPU loses on the embedded model: within a family, more bits never lose more.

hqq's bit widths are in test_hqq.py, the references' in test_reference_linear.py, the caches' in test_kvcache.py.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch

from lowbit import backends, embedded, models, quality, quantized
from lowbit.device import Device
from lowbit.formats import FORMATS

CPU = Device("cpu", 0, "a test's CPU", "cpu-test", None, 100_000.0, 2, driver=None, cuda=None)
WINDOWS = 2  # of 512 tokens: 1,022 scored


@cache
def host():
    return models.load(models.choose("embedded", "auto", CPU, {}))


@cache
def kl(name):
    """KL in nats against bf16; each row once."""
    fmt = FORMATS[name]
    unmet = backends.unmet(fmt, CPU, host().config)
    if unmet is not None:
        pytest.skip(str(unmet))
    tokens = torch.arange(1024).view(2, 512) if fmt.calibration_windows else None
    made = quantized.build(host(), fmt, CPU, tokens)
    return quality.score(made.model, text(), reference(), max_windows=WINDOWS).kld


@cache
def text():
    return quality.encode_text("embedded", embedded.heldout_text(), host().tokenizer, 512)


@cache
def reference():
    base = quantized.build(host(), FORMATS["bf16-torch"], CPU).model
    return quality.Reference.build(base, text(), windows=WINDOWS, max_windows=WINDOWS)


def rows(library, *names):
    return [f"{name}-{library}" for name in names]


FAMILIES = {  # fewest bits first
    "torchao: intx": rows("torchao", *(f"a16w{bits}_intx_g32" for bits in range(1, 9))),
    "torchao: intx with int8 activations": rows("torchao", *(f"a8w{bits}_intx_g32" for bits in range(1, 9))),
    "torchao: integers": rows("torchao", "a16w4_g128", "a16w4_g64", "a16w4_g32", "a16w8", "a16w8_g128"),
    "torchao: int4 by hqq": rows("torchao", "a16w4_hqq_g128", "a16w4_hqq_g64", "a16w4_hqq_g32"),
    "torchao: fp8": rows("torchao", "a16w8_e5m2", "a16w8_fp8"),
    "torchao: mx": rows("torchao", "a4w4_mxfp4_emulated", "a8w8_mxfp8_emulated"),
    "torchao: activations": rows("torchao", "a8w8_static", "a8w8", "a16w8"),
    "bitsandbytes: nf4": rows("bitsandbytes", *(f"a16w4_nf4{block}" for block in ("_g256", "_g128", "", "_g32"))),
    "bitsandbytes: fp4": rows("bitsandbytes", *(f"a16w4_fp4{block}" for block in ("_g128", "", "_g32"))),
    "bitsandbytes: int8": rows("bitsandbytes", "a16w4_nf4_g32", "a8w8_llmint8_t0", "a8w8_llmint8"),
    "lowbit: integers": rows(
        *("lowbit", "a16w1", "a16w158", "a16w2_g128", "a16w3_g128"),
        *("a16w4_g128", "a16w4_g64", "a16w4_g32", "a16w8", "bf16"),
    ),
    "lowbit: symmetric int4": rows("lowbit", "a16w4_sym_g128", "a16w4_sym_g64", "a16w4_sym_g32"),
    "lowbit: floats": rows("lowbit", "a16w4_mxfp4", "a16w4_nvfp4", "a16w8_fp8"),
    "tables": rows("tables", "a16w4_g64", "a16w8"),
    "recipes: the head": rows("recipe", "a16w4_g128_head4", "a16w4_g128_head8"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_more_bits_never_more_kl(family):
    found = {name: kl(name) for name in FAMILIES[family]}
    for fewer, more in pairwise(found):
        assert found[more] <= found[fewer], found
    assert all(value > 1e-6 for value in found.values()), found


@pytest.mark.parametrize("name", ["a16w4_nf4", "a16w4_fp4"])
def test_double_quantization_costs_next_to_nothing(name):
    """It rounds the scales up and down alike, by less than what 1,022 tokens can tell: no order, but no loss either."""
    assert kl(f"{name}_dq-bitsandbytes") == pytest.approx(kl(f"{name}-bitsandbytes"), rel=0.05)
