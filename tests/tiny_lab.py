"""A Lab on a CPU with a Llama of two layers, read from disk; nothing is faked but the runner of rounds."""

from __future__ import annotations

from pathlib import Path

import tiny
import tiny_llama

from lowbit import lab, models, texts
from lowbit.cases import Case
from lowbit.ceilings import Ceilings
from lowbit.device import Device
from lowbit.formats import FORMATS
from lowbit.workloads import Workload

CPU = Device("cpu", 0, "a test's CPU", "cpu-test", None, 100_000.0, 2, driver=None, cuda=None)
SHAPE = {name: value for name, value in tiny.config().to_dict().items() if name in ("hidden_size", "head_dim")} | {
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "initializer_range": 0.05,
}
CPU_FORMATS = [row for row in FORMATS.values() if "cpu" in row.devices and row.suite == "quick"]
"""All rows: tests/test_isolation.py, with one layer."""
DECODE = Workload("b2_c0", "decode", 2, 5, 6, "small")
PREFILL = Workload("p24", "prefill", 1, 24, 0, "small")
WORDS = "once upon a time a time upon once "


def run_rounds(target, setup=None, rounds=1):
    """What ``benchmark.pedantic`` does with these arguments."""
    for _ in range(rounds):
        if setup is not None:
            setup()
        target()


def save_model(folder: Path) -> Path:
    return tiny_llama.add_tokenizer(tiny_llama.save(folder, **SHAPE))


def write_story(folder: Path) -> texts.Source:
    path = folder / "story.txt"
    path.write_text(WORDS * 20)
    return texts.Source("story", 32, path)


def make_lab(folder, source, device=CPU, **fields):
    choice = models.choose(str(folder), "auto", CPU, {})
    made = lab.Lab(device, choice, source, progress=lambda text: None, **fields)
    made._ceilings = Ceilings(10.0, 10.0, 0.1)  # measured in test_ceilings.py; half a second each
    return made


def decode(fmt="bf16-torch", mode="eager", workload=DECODE):
    return Case("decode", FORMATS[fmt], mode, workload)


def take(bench, case, rounds=run_rounds):
    return bench.measure(case, f"benches/test_{case.kind}.py::test_{case.name}", rounds)
