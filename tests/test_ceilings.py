"""Ceilings: the arithmetic with planted times, and one real run on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import sys

import pytest
import torch
from fake_pynvml import CARD

from lowbit import ceilings
from lowbit.ceilings import Ceilings, measure_ceilings
from lowbit.device import Device
from lowbit.errors import LowbitError

CPU = Device("cpu", 0, "AMD EPYC", "cpu-amd-epyc-2c", None, 24_000.0, 2, None, None)


def test_figures_from_times(monkeypatch):
    seconds = iter([2e-3, 1e-3, 4e-3, 1e-3])  # read, copy, product in bf16, product in fp32
    monkeypatch.setattr(ceilings, "_median_seconds", lambda device, call: next(seconds))
    found = ceilings._ceilings(CPU, read_bytes=4_000_000, side=100, dtypes=("bf16", "fp32"))
    assert found.read_gb_s == pytest.approx(2.0)
    assert found.copy_gb_s == pytest.approx(4.0)  # half read and half written in half the time
    assert found.matmul_tflop_s == pytest.approx(2e6 / 1e-3 / 1e12)
    assert found.matmul_method == "fp32 100x100x100"
    assert found.read_method == "torch.sum over 0.00 GiB"
    assert Ceilings(**found.to_dict()) == found


def test_the_faster_sum_counts(monkeypatch):
    monkeypatch.setattr(ceilings, "_sums", lambda device: [("slow", torch.sum), ("fast", torch.sum)])
    seconds = iter([2e-3, 1e-3, 1e-3, 1e-3])
    monkeypatch.setattr(ceilings, "_median_seconds", lambda device, call: next(seconds))
    found = ceilings._ceilings(CPU, 4_000_000, 16, ("fp32",))
    assert found.read_method.startswith("fast")
    assert found.read_gb_s == pytest.approx(4.0)


def test_a_wrong_sum_is_no_ceiling(monkeypatch):
    monkeypatch.setattr(
        ceilings, "_sums", lambda device: [("lazy", lambda source: source[: source.numel() // 2].sum())]
    )
    with pytest.raises(LowbitError, match="lazy on AMD EPYC: expected the sum 1000000, got 500000"):
        ceilings._ceilings(CPU, 4_000_000, 16, ("fp32",))


def test_without_triton_torch_alone_is_tried(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert [name for name, _ in ceilings._sums(CARD)] == ["torch.sum"]


@pytest.mark.parametrize(("free_gib", "expected"), [(140, 16 << 30), (6, 6 << 28)])
def test_a_small_card_reads_a_quarter_of_what_is_free(monkeypatch, free_gib, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib << 30, 141 << 30))
    assert ceilings._cuda_read_bytes(CARD) == expected
    assert expected % ceilings.CHUNK_BYTES == 0


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_the_matrix_rate_is_taken_in_a_dtype_that_the_card_has_and_memory_is_freed(monkeypatch, capability, dtype):
    asked = []
    freed = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(ceilings, "_ceilings", lambda device, size, side, dtypes: asked.append((side, dtypes)))
    measure_ceilings(dataclasses.replace(CARD, capability=capability))
    assert asked == [(8192, (dtype,))]
    assert freed == [True]


def test_passes_stop_at_the_budget_but_not_before_three(monkeypatch):
    monkeypatch.setattr(ceilings, "wall_seconds", lambda call: call())
    calls = []

    def half_a_second():
        calls.append(1)
        return 0.5

    assert ceilings._median_seconds(CPU, half_a_second) == 0.5
    assert len(calls) == 1 + 3
    times = iter([0, 9, 1, 2, 3, 4, 5, 6, 7, 8, 100])  # the first is the warm-up
    assert ceilings._median_seconds(CPU, lambda: next(times), passes=10, budget_s=1e9) == 5.5


def test_a_cpu_for_real_on_one_thread(monkeypatch):
    threads = []
    real = ceilings.wall_seconds
    monkeypatch.setattr(ceilings, "wall_seconds", lambda call: threads.append(torch.get_num_threads()) or real(call))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = measure_ceilings(CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}
    assert 0.1 < found.read_gb_s < 1000
    assert 0.1 < found.copy_gb_s < 1000
    assert 1e-4 < found.matmul_tflop_s < 10
    assert found.matmul_method in ("bf16 1024x1024x1024", "fp32 1024x1024x1024")
