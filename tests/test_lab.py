"""Lab on a CPU, with a real Llama of two layers read from disk: nothing is faked but the runner of rounds."""

from __future__ import annotations

import dataclasses
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_lab import CPU, CPU_FORMATS, DECODE, PREFILL, decode, make_lab, run_rounds, take

from lowbit import lab, measure, metrics, models, process_state, quantized, scoring, texts
from lowbit.backends import coverage
from lowbit.backends.torchao import unpacking
from lowbit.cases import Case
from lowbit.ceilings import Ceilings
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.record import Record
from lowbit.truth import TruthError


def expected_metrics(kind):
    return {name for name, row in metrics.METRICS.items() if kind in row.kinds}


def accounted_for(record):
    return {metrics.find(name).name for name in record.metrics} | set(record.unavailable)


# -- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [decode(), Case("prefill", FORMATS["bf16-torch"], "eager", PREFILL), Case("quality", FORMATS["a8w8-torchao"])],
    ids=lambda case: case.kind,
)
def test_a_record_has_every_metric_of_its_kind_or_the_reason(tiny_bench, case):
    record = take(tiny_bench, case)
    assert accounted_for(record) == expected_metrics(case.kind)
    assert all(value == value and value >= 0 for value in record.metrics.values())
    assert set(record.unavailable.values()) <= {"needs an NVIDIA GPU"}
    assert not {*record.metrics} & {*record.unavailable}
    assert (record.outcome, record.dtype, record.info["notes"]) == ("measured", "bf16", [])
    assert record.info["coverage"]["linears"] == 14
    assert record.info["wall_s"] > 0
    assert Record.from_dict(record.to_dict()) == record


def test_a_quality_record_proves_its_kernels(tiny_bench):
    record = take(tiny_bench, Case("quality", FORMATS["a16w8-torchao"]))
    assert 0 < record.metrics["kernel_rel_error"] < 2**-7
    assert len(record.info["truth"]) == 7
    assert max(one["kernel"] for one in record.info["truth"].values()) == record.metrics["kernel_rel_error"]
    assert 0 < record.info["truth"]["model.layers.0.mlp.up_proj"]["weight"] < 0.02  # against the master's own weights
    assert 8 < record.metrics["bits_per_weight"] < 8.5


def test_a_library_that_hides_its_weights_says_so_in_the_record(tiny_bench, monkeypatch):
    monkeypatch.delattr("lowbit.backends.torchao.dequantize")
    record = take(tiny_bench, Case("quality", FORMATS["a16w8-torchao"]))
    assert record.unavailable["kernel_rel_error"] == "torchao gives its weights back in no way that lowbit knows"
    assert "kernel_rel_error" not in record.metrics


def test_a_wrong_kernel_fails_its_case(tiny_bench, monkeypatch):
    def spoilt(module, size):
        return (1.05 * block for block in unpacking.dequantize_blocks(module, size))

    monkeypatch.setattr("lowbit.backends.torchao.dequantize_blocks", spoilt)
    with pytest.raises(TruthError, match=r"a16w8-torchao: .* relative error of at most 0\.00781 .*q_proj 0\.04"):
        take(tiny_bench, Case("quality", FORMATS["a16w8-torchao"]))


def test_samples_are_those_of_the_rounds(tiny_bench):
    record = take(tiny_bench, decode(), lambda target, setup, rounds: run_rounds(target, setup, 4))
    lengths = {name: len(values) for name, values in record.samples.items()}
    assert lengths == {"decode_s": 4, "prefill_s": 4, "step_s": 4 * DECODE.new_tokens, "yardstick_s": 4}
    tokens = DECODE.batch * DECODE.new_tokens
    assert record.metrics["decode_tok_s"] == pytest.approx(tokens / sorted(record.samples["decode_s"])[1], rel=2)


def test_seconds_by_purpose_stay_within_the_wall(tiny_folder, story):
    bench = make_lab(tiny_folder, story)
    record = take(bench, Case("quality", FORMATS["bf16-torch"]))
    wall = record.info["wall_s"] + take(bench, decode()).info["wall_s"]
    spent = bench.spent
    assert min(spent.load, spent.quantize, spent.warmup, spent.measure, spent.quality) > 0
    assert spent.compile == 0
    assert spent.total() <= wall
    bench.close()


def test_a_compiled_case(tiny_bench):
    case = decode(mode="reduce-overhead", workload=dataclasses.replace(DECODE, batch=1))
    if unmet := tiny_bench.unmet(case):
        pytest.skip(str(unmet))
    record = take(tiny_bench, case)
    assert record.metrics["compile_s"] > 0
    assert (record.metrics["graph_breaks"], record.metrics["recompiles"]) == (0, 0)
    assert "cudagraph_skips" not in record.info  # a CPU has no graphs that could be given up
    assert accounted_for(record) == expected_metrics("decode")


def test_notes_of_the_host_model_reach_the_record(tiny_folder, story):
    bench = make_lab(tiny_folder, story)
    bench.host.notes.append("3 of 4 pieces of host memory are not page-locked")
    assert take(bench, decode()).info["notes"] == ["3 of 4 pieces of host memory are not page-locked"]
    bench.close()


def test_cuda_graphs_given_up_are_noted(tiny_bench, monkeypatch):
    monkeypatch.setattr(lab, "cudagraph_skips", lambda case, device: 2)
    record = take(tiny_bench, decode())
    assert record.info["cudagraph_skips"] == 2
    assert record.info["notes"] == ["decode[bf16-torch-eager-b2_c0]: Inductor gave up its CUDA graphs, 2 times"]


def test_the_runs_own_processes_do_not_disturb(tiny_folder, story, monkeypatch):
    seen = []
    read = lab.CardState.read
    monkeypatch.setattr(lab.CardState, "read", lambda nvml, own, *since: seen.append(own) or read(nvml, own, *since))
    bench = make_lab(tiny_folder, story, own_pids=lambda: {11, 12})
    take(bench, decode())
    assert seen == [{11, 12}, {11, 12}]
    bench.close()


def test_a_disturbed_card_voids_the_record(tiny_bench, monkeypatch):
    monkeypatch.setattr(lab, "disturbed", lambda before, after: "another process came to the card: pid 7")
    record = take(tiny_bench, decode())
    assert (record.outcome, record.error) == ("void", "another process came to the card: pid 7")
    assert record.metrics["decode_tok_s"] > 0


# -- isolation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", CPU_FORMATS, ids=lambda fmt: fmt.id)
def test_the_master_is_untouched_by_every_format(tiny_bench, fmt):
    before = tiny_bench.host.checksum()
    if unmet := tiny_bench.unmet(decode(fmt.id)):
        pytest.skip(str(unmet))
    assert take(tiny_bench, Case("quality", fmt)).outcome == "measured"
    assert take(tiny_bench, decode(fmt.id)).outcome == "measured"
    assert tiny_bench.host.checksum() == before


def settings():
    configs = [dict(config.get_config_copy()) for config in process_state.configs()]
    return *configs, torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()


@pytest.mark.parametrize("fmt", ["a16w8-torchao", "a16w4_g128-torchao", "a16w4_nf4_dq-bitsandbytes"])
def test_a_case_leaves_the_process_as_it_was(tiny_bench, fmt):
    tiny_bench.acquire(FORMATS[fmt])
    before = settings()
    take(tiny_bench, decode(fmt))
    take(tiny_bench, Case("quality", FORMATS[fmt]))
    assert settings() == before


def test_order_does_not_matter_to_quality(tiny_folder, story):
    """Two random orders, each in a lab of its own."""
    found = []
    for seed in (1, 2):
        bench = make_lab(tiny_folder, story)
        rows = [row for row in CPU_FORMATS if bench.unmet(Case("quality", row)) is None]
        random.Random(seed).shuffle(rows)
        found.append({row.id: take(bench, Case("quality", row)).metrics for row in rows})
        bench.close()
    first, second = found
    assert list(first) != list(second)
    assert len(first) >= 5
    for fmt, values in first.items():
        assert _quality(values) == _quality(second[fmt]), fmt


def _quality(values):
    return {name: value for name, value in values.items() if name.startswith(("ppl_", "kld_", "top1_"))}


def test_quality_beside_dummy_weights_keeps_no_model_of_the_format_before(tiny_folder):
    choice = models.choose(str(tiny_folder), "dummy", CPU, {})
    bench = lab.Lab(CPU, choice, texts.choose_source(choice.name, "dummy", 512, None), progress=lambda text: None)
    bench._ceilings = Ceilings(10.0, 10.0, 0.1)
    take(bench, Case("quality", FORMATS["bf16-torch"]))  # the reference is made here, and what was loaded freed for it
    take(bench, decode())
    model = bench.acquire(FORMATS["bf16-torch"]).model
    model.__dict__["itself"] = [model]  # compiled modules hang in cycles: only a collection frees them
    held = weakref.ref(model)
    del model
    record = take(bench, Case("quality", FORMATS["a16w8-torchao"]))
    assert record.info["quality_model"] == "embedded"
    assert "kld_embedded_512_8176tok" in record.metrics
    assert record.unavailable["ppl"] == "dummy weights: quality is not applicable"
    bench.acquire(FORMATS["a16w8-torchao"])
    assert held() is None
    bench.close()


# -- what can't be measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [decode(), Case("quality", FORMATS["a16w8-torchao"])], ids=lambda case: case.kind)
def test_nan_weights_are_an_error_that_names_the_case(tiny_folder, story, case):
    bench = make_lab(tiny_folder, story)
    if case.kind == "quality":
        bench._scorer.reference(bench.host)  # of whole weights: the format's own NaN must show
    with torch.no_grad():
        bench.host.master.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LowbitError, match="NaN/Inf logits from " + case.name.replace("[", r"\[")):
        take(bench, case)
    bench.close()


def test_a_reference_that_does_not_fit_is_streamed(tiny_folder, story):
    """On a card too small for bf16 the reference logits come layer by layer, and are the same."""
    case = Case("quality", FORMATS["a16w8-torchao"])
    whole = make_lab(tiny_folder, story)
    expected = take(whole, case)
    whole.close()
    small = make_lab(tiny_folder, story, dataclasses.replace(CPU, total_mib=4.0))
    need = scoring.reference_mib(FORMATS["bf16-torch"], small.host_config, 32)
    assert measure.memory_fits(small.device, need).kind == "memory"
    record = take(small, case)
    assert _quality(record.metrics) == _quality(expected.metrics)
    (note,) = record.info["notes"]
    assert note.startswith("bf16-torch does not fit (needs ")
    assert note.endswith("4 of 4 MiB are free on a test's CPU): reference logits streamed layer by layer")
    assert expected.info["notes"] == []
    small.close()


def test_quality_beside_dummy_weights_is_the_embedded_models(tiny_folder, story):
    bench = make_lab(tiny_folder, story)
    stand_in = bench.host
    bench.choice = dataclasses.replace(bench.choice, load_format="dummy")
    bench._embedded = dataclasses.replace(stand_in, name="embedded")
    record = take(bench, Case("quality", FORMATS["a16w8-torchao"]))
    assert record.info["quality_model"] == "embedded"
    assert record.unavailable["ppl"] == "dummy weights: quality is not applicable"
    assert "weights_mib" not in record.metrics
    assert "checkpoint_mb" not in record.metrics
    bench.close()


def test_coverage_is_proven_before_anything_is_measured(tiny_bench, monkeypatch):
    tiny_bench.release()
    monkeypatch.setattr(quantized.backends, "get", lambda name: SimpleNamespace(PACKAGES=(), quantize=_nothing))
    with pytest.raises(coverage.CoverageError):
        take(tiny_bench, decode("a16w8-torchao"))
    tiny_bench.release()


def _nothing(module, fmt, dtype):
    """A library that leaves every linear as it is, without a word."""
