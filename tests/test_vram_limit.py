"""LOWBIT_VRAM_MIB: a smaller card than there is, for cases, ceilings, the allocator and what a run says."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import fake_pynvml
import fakes
import pytest
import tiny
import torch
from live_bytes import LiveBytes
from test_device import cards
from tiny_lab import CPU, decode, make_lab, run_rounds, take
from transformers import LlamaConfig

from lowbit import ceilings, device, measure, models, quality, quantized, scoring, truth, vram_limit
from lowbit.backends import native
from lowbit.cases import Case
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.hostmodel import HostModel
from lowbit.kernels import stream, stream_modules, weights
from lowbit.presets import PRESETS

pytest_plugins = ["pytester"]

MIB = 1024 * 1024
SMALL = dataclasses.replace(fake_pynvml.CARD, total_mib=12_288.0, limit_mib=12_288.0)


def test_unset_is_no_limit():
    assert vram_limit.read({}) is None
    assert vram_limit.read({"LOWBIT_VRAM_MIB": ""}) is None
    assert vram_limit.read({"LOWBIT_VRAM_MIB": "12288"}) == 12_288


@pytest.mark.parametrize("given", ["0", "-5", "nan", "inf", "24GB"])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(LowbitError, match=f"LOWBIT_VRAM_MIB: expected a size in MiB, a number above 0, got '{given}'"):
        vram_limit.read({"LOWBIT_VRAM_MIB": given})


def test_a_card_is_as_small_as_told_and_its_environment_says_so(monkeypatch):
    cards(monkeypatch, "NVIDIA H200")
    monkeypatch.setenv("LOWBIT_VRAM_MIB", "12288")
    found = device.detect()
    assert found == SMALL
    assert device.environment(found)["LOWBIT_VRAM_MIB"] == "12288"
    monkeypatch.setenv("LOWBIT_VRAM_MIB", "1e9")
    assert device.detect().total_mib == fake_pynvml.CARD.total_mib
    monkeypatch.delenv("LOWBIT_VRAM_MIB")
    assert "LOWBIT_VRAM_MIB" not in device.environment(device.detect())


def test_auto_takes_what_fits_the_smaller_card(monkeypatch, tmp_path):
    monkeypatch.setattr(models.hub, "cache_folder", lambda env: tmp_path)
    assert models.choose("auto", "auto", fake_pynvml.CARD, {}).name == "llama-3.1-8b"
    assert models.choose("auto", "auto", SMALL, {}).name == "llama-3.2-3b"


def test_what_is_free_stays_within_the_limit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000 * MIB, 143_771 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000 * MIB)
    assert measure.memory_fits(SMALL, 11_288) is None
    assert str(measure.memory_fits(SMALL, 11_289)) == (
        "memory: needs 11,289 MiB, 11,288 of 12,288 MiB are free on NVIDIA H200"
    )
    assert ceilings._cuda_read_bytes(SMALL) == (12_288 - 3000) * MIB // 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2000 * MIB, 143_771 * MIB))
    assert vram_limit.free_bytes(SMALL.torch, SMALL.limit_mib) == 2000 * MIB
    assert vram_limit.free_bytes(SMALL.torch, 2000) == 0


def test_the_allocator_is_told(monkeypatch):
    told = []
    total = SimpleNamespace(total_memory=143_771 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share))
    vram_limit.enforce(SMALL.torch, 143_771 / 4)
    vram_limit.enforce(SMALL.torch, 1e9)
    vram_limit.enforce(SMALL.torch, None)
    assert told == [0.25, 1.0]


def test_a_run_says_how_small_and_streams_what_does_not_fit(monkeypatch, tiny_folder, story):
    monkeypatch.setenv("LOWBIT_VRAM_MIB", "4")
    bench = make_lab(tiny_folder, story, device.detect())
    record = take(bench, Case("quality", FORMATS["a16w8-torchao"]))
    (note,) = record.info["notes"]
    assert "4 of 4 MiB are free" in note
    assert note.endswith("reference logits streamed layer by layer")
    bench.close()


def test_what_cant_be_scored_is_told_before_it_runs_out_of_memory(tiny_folder, story, monkeypatch):
    """Of the 8B shape in int8: the finished model with blocks of logits and a piece of its head takes more than the
    layer that is quantized last, which was all that was asked for."""
    monkeypatch.setattr(measure, "_host_available_mib", lambda: 1e6)
    config = LlamaConfig(**PRESETS["llama-3.1-8b"].values)
    fmt = FORMATS["a16w8-lowbit"]
    scratch = scoring.scoring_mib(fmt, config, 2048)
    assert scratch == 5 * 64 + 256
    layer = 218_103_808 * 2 / MIB
    needed = quantized.needed_mib(fmt, config, None, scratch)
    assert needed - quantized.needed_mib(fmt, config) == pytest.approx(scratch - layer)
    between = dataclasses.replace(CPU, total_mib=needed - 1)
    bench = make_lab(tiny_folder, dataclasses.replace(story, window=2048), between)
    bench.choice = dataclasses.replace(bench.choice, config=config)
    assert bench.unmet(decode(fmt.id)) is None
    room = f"{needed - 1:,.0f} of {needed - 1:,.0f} MiB are free on a test's CPU"
    assert str(bench.unmet(Case("quality", fmt))) == (
        f"memory: quantized weights and scoring: needs {needed:,.0f} MiB, {room}"
    )
    bench.device = dataclasses.replace(between, total_mib=12_288.0)
    assert bench.unmet(Case("quality", fmt)) is None
    bench.close()


def test_a_whole_quality_case_stays_within_what_was_asked_for(monkeypatch, story):
    """Quantized, proven and scored, a large head included: the steps of an H200, all sizes that bound them 32 times
    smaller. The proof took 12 bytes for each of the head's weights."""
    rows, fmt = 32768, FORMATS["a16w8-lowbit"]
    for module, name in ((weights, "CHUNK"), (weights, "PIECE"), (scoring, "PIECE"), (truth, "CHUNK")):
        monkeypatch.setattr(module, name, getattr(module, name) // 32)
    monkeypatch.setattr(stream, "CHUNK_WEIGHTS", stream.CHUNK_WEIGHTS // 32)
    monkeypatch.setattr(quality, "CHUNK_BYTES", quality.CHUNK_BYTES // 32)
    monkeypatch.setattr(native, "streams", lambda device: True)
    monkeypatch.setattr(stream_modules.StreamLinear, "dequantize", by_reference)
    master = tiny.model(vocab_size=rows, num_hidden_layers=1).requires_grad_(False)
    host = HostModel("tiny", "auto", master.config, master, [], 0)
    scorer = scoring.Scorer(CPU, story, measure.VramMeter(CPU, None), progress=lambda text: None)
    scorer._text = quality.Text("noise", torch.randint(rows, (2 * 64,)), 64)
    scorer.prepare(host, fmt)
    case, record = Case("quality", fmt), Case("quality", fmt).record("a test", "tiny", "auto")
    with LiveBytes() as made:
        built = quantized.build(host, fmt, CPU)
        found = scorer.measure(built, host, case, record, run_rounds, own=True)
    assert isinstance(built.model.lm_head, stream_modules.StreamLinear)
    assert found.quality.kld < 0.1
    assert set(record.info["truth"]) >= {"lm_head", "model.layers.0.mlp.down_proj"}
    asked = quantized.needed_mib(fmt, master.config, None, scoring.scoring_mib(fmt, master.config, 64))
    assert 0.8 * asked < made.peak / MIB < asked
    scorer.close()


def by_reference(linear, dtype, start, stop):
    """As the kernel does, of which no CPU has one: nothing beside the result."""
    out = torch.empty(stop - start, linear.k, dtype=dtype)
    for row in range(start, stop, 256):
        last = min(row + 256, stop)
        out[row - start : last - start] = weights.dequantize(linear.rows(row, last))
    return out


def test_a_packed_kv_cache_is_scored_at_longer_contexts():
    config = LlamaConfig(**PRESETS["llama-3.1-8b"].values)
    plain, cached = (scoring.scoring_mib(FORMATS[fmt], config, 2048) for fmt in ("bf16-torch", "bf16_kv_int8-torch"))
    assert plain == 5 * 64
    activations = 2 * 8192 * (4 * 4096 + 3 * 14336) / MIB
    cache = quantized.kv_bytes_per_token(FORMATS["bf16_kv_int8-torch"], config) * 8192 / MIB
    assert cached == pytest.approx(activations + cache)
    assert 500 < cache < 600


def test_the_header_says_it(bench):
    bench.monkeypatch.setattr(fakes, "FAKE_GPU", dataclasses.replace(fakes.FAKE_GPU, limit_mib=12_288.0))
    assert "lowbit: measured as on a card of 12,288 MiB (LOWBIT_VRAM_MIB)" in bench.run("--collect-only").stdout.str()
