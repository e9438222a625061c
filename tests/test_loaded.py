"""What a lab has at hand: one format alive at a time, no memory left behind, and which cases can run there."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from tiny_lab import CPU, CPU_FORMATS, PREFILL, decode, make_lab
from torch._subclasses.fake_tensor import FakeTensor

from lowbit.cases import Case
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, recipes
from lowbit.workloads import Workload


def live_bytes():
    """Bytes of all storages that a tensor, however wrapped, still holds: what RSS, which glibc pads, can't say.

    Without a collection: what only cycles hold, and Lab has put out of the collector's sight, would be a leak too.
    """
    gc.unfreeze()
    storages = {}
    for held in gc.get_objects():
        # by type(): isinstance() asks for __class__, at which torch's deprecated objects warn
        kind = type(held)
        if not issubclass(kind, torch.Tensor) or issubclass(kind, FakeTensor):
            continue
        if not hasattr(held, "__tensor_flatten__"):  # what it wraps is in the list itself
            storage = held.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_thirteen_builds_take_no_more_memory_than_one(tiny_folder, story):
    bench = make_lab(tiny_folder, story)
    assert bench.host.checkpoint_bytes > 2**20  # read: the master counts before
    rows = [row for row in CPU_FORMATS if bench.unmet(decode(row.id)) is None]
    gc.collect()
    before = live_bytes()
    largest = 0
    for turn in range(13):
        fmt = rows[turn % len(rows)]
        largest = max(largest, bench.acquire(fmt).coverage.resident_bytes)
        if turn % 4 == 0:
            assert live_bytes() - before <= largest * 1.1, f"build {turn + 1}: {fmt.id}"
    bench.release()
    assert live_bytes() - before <= 0.1 * largest
    bench.close()


def test_one_format_is_alive_at_a_time(tiny_bench):
    first = tiny_bench.acquire(FORMATS["bf16-torch"])
    assert tiny_bench.acquire(FORMATS["bf16-torch"]) is first
    second = tiny_bench.acquire(FORMATS["a16w8-torchao"])
    assert second is not first
    tiny_bench.release()
    assert tiny_bench.acquire(FORMATS["a16w8-torchao"]) is not second


def test_a_context_beyond_the_models_is_unmet(tiny_bench):
    unmet = tiny_bench.unmet(decode(workload=Workload("b1_c300", "decode", 1, 300, 8, "small")))
    assert (unmet.kind, unmet.reason) == ("shape", "b1_c300 needs 308 positions, the model has 256")


@pytest.mark.parametrize("mode", ["reduce-overhead", "regional"])
def test_a_prefill_whose_head_can_not_be_compiled_for_its_last_token_is_unmet(tiny_bench, monkeypatch, mode):
    monkeypatch.setattr(tiny_bench, "device", dataclasses.replace(CPU, kind="cuda", capability=(9, 0)))
    parts = {"lm_head": "a8w8-torchao", "layers.*": "a16w8-torchao"}
    unmet = tiny_bench.unmet(Case("prefill", recipes.make(recipes.Recipe("mine", parts), FORMATS), mode, PREFILL))
    assert str(unmet) == (
        "shape: its compiled lm_head (a8w8-torchao) needs 17 tokens per forward pass, this case gives it 1"
    )


def test_the_native_mode_says_what_it_needs(tiny_bench):
    unmet = tiny_bench.unmet(decode("a16w8-lowbit", "native"))
    assert str(unmet) == "capability: needs cuda (lowbit's own kernels), this is cpu"


def test_what_does_not_fit_is_unmet_with_the_figures(tiny_folder, story):
    small = dataclasses.replace(CPU, total_mib=6.0)
    bench = make_lab(tiny_folder, story, small)
    assert bench.unmet(decode()) is None
    cache = Workload("b64_c192", "decode", 64, 192, 8, "small")
    unmet = bench.unmet(decode("a16w8-torchao", workload=cache))
    assert unmet.kind == "memory"
    # 0.8 + ... MiB of weights in int8, 1.6 of one bf16 layer, 64 x 200 x 512 bytes of keys and values
    assert unmet.reason == (
        f"quantized weights, KV cache and one 16-bit layer: needs {_needed(bench, cache):,.0f} MiB, "
        "6 of 6 MiB are free on a test's CPU"
    )
    assert bench.unmet(decode("a16w8-torchao")) is None
    bench.close()


def _needed(tiny_bench, workload):
    config = tiny_bench.host_config
    linears = 2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 768
    head = 2 * config.vocab_size * 256 * 2
    weights = 2 * linears * 8.5 / 8 + head + linears * 2
    return (weights + workload.batch * workload.context_tokens * 2 * 2 * 64 * 2) / 2**20


def test_a_format_without_a_dtype_here_is_an_error(tiny_bench):
    nothing = dataclasses.replace(FORMATS["bf16-torch"], name="none", dtypes=())
    with pytest.raises(LowbitError, match="none-torch needs one of "):
        tiny_bench.acquire(nothing)
