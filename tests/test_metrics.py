"""Every metric on numbers worked out by hand, its direction, its limits and where it is gated."""

from __future__ import annotations

import pytest

from lowbit import metrics
from lowbit.metrics import METRICS, MIB, Limit, Measurement, Quality


def decode() -> Measurement:
    """Batch 2, 10 new tokens after 5: prefills of 10, 20, 30 ms; decodes of 1, 2, 4 s; steps of 100 to 200 ms."""
    return Measurement(
        kind="decode",
        batch=2,
        prompt_tokens=5,
        new_tokens=10,
        prefill_s=[0.01, 0.03, 0.02],
        decode_s=[4.0, 1.0, 2.0],
        step_s=[0.100 + 0.010 * i for i in range(11)],
        yardstick_s=[2.0, 1.0, 3.0],
        issue_s=[1.0, 0.5, 0.5],
        streamed_bytes_per_step=100e9,
        kv_bytes_per_token=MIB / 2,
        read_gb_s=4000.0,
        matmul_tflop_s=800.0,
        weights_bytes=3 * MIB,
        checkpoint_bytes=5_000_000,
        vram_start_mib=100.0,
        vram_end_mib=110.0,
        vram_peak_mib=200.0,
        vram_alloc_peak_mib=150.0,
        vram_quantize_peak_mib=180.0,
        energy_j=300.0,
        energy_tokens=600,
        load_s=1.5,
        quantize_s=2.5,
        compile_s=20.0,
        graph_breaks=1,
        recompiles=2,
        compiled_anew=3,
    )


def prefill() -> Measurement:
    return Measurement(
        kind="prefill", batch=4, prompt_tokens=512, prefill_s=[0.5, 0.25, 1.0], yardstick_s=[0.5, 0.5, 0.5],
        prefill_flop=2e14, matmul_tflop_s=800.0,
    )  # fmt: skip


def quality() -> Measurement:
    scored = Quality(
        "embedded_512", 9000, 12.5, 8192, kld=0.02, top1=0.97, ln_ppl_ratio=0.01, ln_ppl_ratio_stderr=0.001
    )
    sizes = {"weights_bytes": MIB, "checkpoint_bytes": 2_500_000, "bits_per_weight": 4.25}
    return Measurement(kind="quality", quality=scored, kernel_error=0.002, **sizes)


EXPECTED = {
    "decode_tok_s": 2 * 10 / 2.0,  # the median round is 2 s
    "speed_ratio": 1.0,  # 2/4, 1/1, 3/2: the median
    "host_share": 0.25,  # 1/4, 0.5/1, 0.5/2: the median
    "tpot_ms_p50": 150.0,
    "tpot_ms_p90": 190.0,
    "tpot_ms_p99": 199.0,
    "prompt_ttft_ms": 20.0,
    "prefill_tok_s": 2 * 5 / 0.02,
    "throughput_tok_s": 20 / 2.02,
    "latency_ms": 2020.0,
    "weights_mib": 3.0,
    "kv_bytes_per_tok": MIB / 2,
    "kv_cache_mib": 0.5 * 2 * 15,
    "vram_peak_mib": 200.0,
    "vram_alloc_peak_mib": 150.0,
    "vram_quantize_peak_mib": 180.0,
    "vram_start_mib": 100.0,
    "vram_end_mib": 110.0,
    "energy_j_per_tok": 0.5,
    "mbu": 100e9 * 5 / 4e12,  # 5 steps a second
    "load_s": 1.5,
    "quantize_s": 2.5,
    "compile_s": 20.0,
    "graph_breaks": 1.0,
    "recompiles": 2.0,
    "compiled_anew": 3.0,
}


def test_a_decode_has_these_metrics_and_no_other() -> None:
    assert metrics.derive(decode()) == pytest.approx(EXPECTED)


def test_a_prefill_has_these_metrics_and_no_other() -> None:
    assert metrics.derive(prefill()) == pytest.approx(
        {
            "ttft_ms": 500.0,
            "prefill_tok_s": 4 * 512 / 0.5,
            "speed_ratio": 1.0,  # 1, 2, 0.5: the median
            "mfu": 2e14 / 0.5 / 8e14,
        }
    )


def test_quality_names_carry_the_protocol_and_the_count() -> None:
    assert metrics.derive(quality()) == pytest.approx(
        {
            "ppl_embedded_512": 12.5,
            "kld_embedded_512_8192tok": 0.02,
            "top1_embedded_512_8192tok": 0.97,
            "ln_ppl_ratio_embedded_512": 0.01,
            "weights_mib": 1.0,
            "checkpoint_mb": 2.5,
            "bits_per_weight": 4.25,
            "kernel_rel_error": 0.002,
        }
    )


@pytest.mark.parametrize("kind", ["prefill", "decode", "quality"])
def test_nothing_measured_gives_no_metric(kind: str) -> None:
    assert metrics.derive(Measurement(kind=kind)) == {}


def test_zero_is_a_value_and_not_an_absence() -> None:
    made = Measurement(kind="decode", compile_s=0.0, graph_breaks=0, recompiles=0, energy_j=0.0, energy_tokens=10)
    assert metrics.derive(made) == {"compile_s": 0.0, "graph_breaks": 0.0, "recompiles": 0.0, "energy_j_per_tok": 0.0}


def test_a_ratio_needs_a_yardstick_before_every_round() -> None:
    made = decode()
    made.yardstick_s.pop()
    assert "speed_ratio" not in metrics.derive(made)


def test_percentiles_of_one_step() -> None:
    made = metrics.derive(Measurement(kind="decode", step_s=[0.004]))
    assert made == pytest.approx({"tpot_ms_p50": 4.0, "tpot_ms_p90": 4.0, "tpot_ms_p99": 4.0})


def test_percentiles_do_not_need_sorted_steps() -> None:
    made = metrics.derive(Measurement(kind="decode", step_s=[0.003, 0.001, 0.002]))
    assert made["tpot_ms_p50"] == pytest.approx(2.0)
    assert made["tpot_ms_p90"] == pytest.approx(2.8)


def test_better_directions() -> None:
    higher = {"decode_tok_s", "speed_ratio", "prefill_tok_s", "throughput_tok_s", "mbu", "mfu", "top1"}
    lower = {"ttft_ms", "tpot_ms_p50", "latency_ms", "weights_mib", "vram_peak_mib", "energy_j_per_tok", "compile_s"}
    lower |= {"graph_breaks", "recompiles", "ppl", "kld", "ln_ppl_ratio", "checkpoint_mb", "load_s", "quantize_s"}
    lower |= {"bits_per_weight", "kernel_rel_error", "kv_bytes_per_tok", "kv_cache_mib"}
    assert {METRICS[name].better for name in higher} == {"higher"}
    assert {METRICS[name].better for name in lower} == {"lower"}


def test_gated_metrics_and_their_floors() -> None:
    """The floors to start from, as the issue states them."""
    floors = {
        "decode_tok_s": Limit(relative=0.02),
        "ttft_ms": Limit(relative=0.03),
        "speed_ratio": Limit(relative=0.25),
        "weights_mib": Limit(relative=1e-9),
        "vram_peak_mib": Limit(absolute=64),
        "energy_j_per_tok": Limit(relative=0.05),
        "compile_s": Limit(relative=0.50, absolute=5.0),
        "graph_breaks": Limit(absolute=0.5),
        "recompiles": Limit(absolute=0.5),
        "ppl": Limit(relative=0.001),
        "kld": Limit(relative=0.05, absolute=1e-6),
        "checkpoint_mb": Limit(relative=1e-9),
        "bits_per_weight": Limit(relative=1e-9),
        "kv_bytes_per_tok": Limit(relative=1e-9),
        "kernel_rel_error": Limit(relative=0.50, absolute=1e-4),
    }
    assert {name: METRICS[name].limit for name in floors} == floors
    for name in ("decode_tok_s", "ttft_ms"):
        assert METRICS[name].host_bound_limit == Limit(relative=0.10)


def test_on_a_cpu_seconds_are_not_gated_and_the_ratio_is() -> None:
    gated = {name for name, metric in METRICS.items() if metric.limit is not None and "cpu" in metric.gated_on}
    assert "speed_ratio" in gated
    assert not gated & {"decode_tok_s", "ttft_ms", "compile_s"}
    assert METRICS["speed_ratio"].gated_on == ("cpu",)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("decode_tok_s", "decode_tok_s"),
        ("ppl_wikitext2_2048", "ppl"),
        ("kld_embedded_512_8192tok", "kld"),
        ("ln_ppl_ratio_embedded_512", "ln_ppl_ratio"),
        ("top1_embedded_512_8192tok", "top1"),
        ("pplx_embedded", None),
        ("tok_s_of_tomorrow", None),
    ],
)
def test_find_the_row_behind_a_stored_name(stored: str, name: str | None) -> None:
    assert metrics.find(stored) is (METRICS[name] if name else None)


def test_units_are_in_the_names() -> None:
    endings = {"ms": "_ms", "MiB": "_mib", "MB": "_mb", "s": "_s", "tok/s": "_tok_s", "J/tok": "_j_per_tok"}
    for name, metric in METRICS.items():
        if metric.unit in endings and not name.startswith("tpot_ms_"):
            assert name.endswith(endings[metric.unit]), name
        assert metric.description, name
        assert metric.kinds, name


def test_longer_contexts_stand_behind_the_first_protocol():
    measured = quality()
    measured.further_quality = [Quality("embedded_2048", 8000, 13.5, 8188, kld=0.03, top1=0.9)]
    found = metrics.derive(measured)
    assert found["kld_embedded_2048_8188tok"] == 0.03
    assert found["ppl_embedded_2048"] == 13.5
    assert "ln_ppl_ratio_embedded_2048" not in found
    assert next(name for name in found if name.startswith("kld_")) == "kld_embedded_512_8192tok"
    assert metrics.find("kld_embedded_2048_8188tok") is metrics.METRICS["kld"]
