"""What every format that runs on a CPU promises beside its numbers: whatever ran before it, whatever it leaves behind.

One layer is enough: a library's state is the same for all of them.
"""

from __future__ import annotations

import random

import pytest
import tiny_llama
import torch

from lowbit import backends, models, process_state, quantized
from lowbit.device import Device
from lowbit.formats import FORMATS

CPU = Device("cpu", 0, "a test's CPU", "cpu-test", None, 100_000.0, 2, driver=None, cuda=None)
SHAPE = {
    "hidden_size": 256,
    "head_dim": 32,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "initializer_range": 0.05,
}
COMPILES = "_compile_"
"""hqq's rows that compile each product take half a minute: tests/test_hqq.py has them."""
IDS = torch.arange(48).view(1, 48) * 7 % 512
TOKENS = torch.arange(128).view(2, 64) * 11 % 512


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tiny_llama.save(tmp_path_factory.mktemp("model"), **SHAPE)
    return models.load(models.choose(str(folder), "auto", CPU, {}))


def settings():
    """Everything global that a library might turn: Inductor's and Dynamo's flags, dtypes, determinism, precision."""
    return {
        "compilers": [dict(config.get_config_copy()) for config in process_state.configs()],
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "matmul": (
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        ),
    }


@torch.no_grad()
def logits(host, fmt):
    made = quantized.build(host, fmt, CPU, TOKENS if fmt.calibration_windows else None)
    return made.model(IDS, use_cache=False).logits


def test_two_random_orders_give_the_same_logits_and_leave_master_and_process_as_they_were(host):
    rows = [
        row
        for row in FORMATS.values()
        if COMPILES not in row.name and row.scheme != "auto" and backends.unmet(row, CPU, host.config) is None
    ]
    assert len(rows) > 40
    for row in rows:
        backends.get(row.backend)
    logits(host, FORMATS["bf16-torch"])
    before, master = settings(), host.checksum()
    found = []
    for seed in (1, 2):
        random.Random(seed).shuffle(rows)
        found.append({})
        for row in rows:
            state = torch.random.get_rng_state()
            found[-1][row.id] = logits(host, row)
            assert torch.isfinite(found[-1][row.id]).all(), row.id
            assert settings() == before, row.id
            assert torch.equal(torch.random.get_rng_state(), state), row.id
            assert host.checksum() == master, row.id
    first, second = found
    assert list(first) != list(second)
    for name, seen in first.items():
        assert torch.equal(seen, second[name]), name
